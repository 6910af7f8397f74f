"""Embeddings of images and prompts by CLIP and DINO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from clear_attn.utils.optional_dependencies import Missing, pretrained, pretrained_image_processor, pretrained_model


class Embedding(ABC):
    """Images as unit vectors; resized and cropped as the model's own settings say.

    Args:
        name: Hub id or folder of a transformers model.
        download: whether it may be downloaded.

    Raises:
        Missing: it cannot be loaded.
    """

    def __init__(self, name: str, download: bool) -> None:
        self.model = pretrained_model(name, download)
        self.processor = pretrained_image_processor(name, download)

    def images(self, images: Tensor) -> Tensor:
        """Return uint8 `[images, 3, height, width]` as float32 `[images, features]` of length 1, on their device."""
        pixels = self.processor(
            images=list(images.cpu().numpy()), input_data_format="channels_first", return_tensors="pt"
        )
        self.model.to(images.device)
        return F.normalize(self.features(pixels["pixel_values"].to(images.device)), dim=-1)

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Return the features of processed pixels, one row per image."""


class Dino(Embedding):
    """The class token of DINO or DINOv2 (arXiv 2104.14294, 2304.07193), or of another vision transformer with one."""

    def features(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


class Clip(Embedding):
    """CLIP's projected features of images and texts (arXiv 2103.00020)."""

    def __init__(self, name: str, download: bool) -> None:
        super().__init__(name, download)
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise Missing(f"{name} is a {type(self.model).__name__}, not a CLIP")
        self.tokenizer = pretrained(AutoTokenizer, name, download)
        self.text_tokens = self.model.config.text_config.max_position_embeddings

    def features(self, pixels: Tensor) -> Tensor:
        return _features_of(self.model.get_image_features(pixel_values=pixels))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return prompts as float32 `[prompts, features]` of length 1; those that are too long are cut."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.text_tokens, return_tensors="pt"
        ).to(self.model.device)
        return F.normalize(_features_of(self.model.get_text_features(**tokens)), dim=-1)

    def too_long(self, prompts: Sequence[str]) -> int:
        """Return how many prompts have more tokens than the model reads."""
        return sum(len(tokens) > self.text_tokens for tokens in self.tokenizer(list(prompts)).input_ids)


def _features_of(output: Any) -> Tensor:
    """Return the projected features of CLIP, which transformers 4 returns as they are."""
    features: Tensor = getattr(output, "pooler_output", output)
    return features
