"""The command `clear-attn bench`: time attention and whole steps, next to dense attention and raster order."""

TOKEN = 16  # pixels, of FLUX.1
