"""Training data: images with captions, the teacher's own images, and the cache of their latents and embeddings."""
