"""The command `clear-attn bench`: how fast attention is, and a whole step, beside dense and beside raster order."""
