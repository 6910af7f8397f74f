"""Image processors of transformers that resize with Pillow."""

import transformers


def pillow_processor(model):
    """Return the class for a model, such as "CLIP". transformers 4 has no suffix in its name."""
    name = f"{model}ImageProcessor"
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
