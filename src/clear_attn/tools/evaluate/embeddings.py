"""CLIP and DINO, and how alike they find pictures and captions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer

from clear_attn.tools.evaluate.metrics import STUDENT, TEACHER, Batch
from clear_attn.utils.optional_dependencies import Missing, pretrained, pretrained_model


class Embedding(nn.Module, ABC):
    """Pictures as points on a sphere; resized and cropped as the model's own settings say.

    Args:
        name: Hub id or folder of a model of transformers.
        download: whether it may be fetched.

    Raises:
        Missing: it is not at hand.
    """

    def __init__(self, name: str, download: bool) -> None:
        super().__init__()
        self.name = name
        self.model = pretrained_model(name, download)
        # Pillow's way of resizing, whether torchvision is installed or not.
        self.processor = pretrained(AutoImageProcessor, name, download, backend="pil")

    def images(self, pictures: Tensor) -> Tensor:
        """uint8 `[pictures, 3, height, width]` to float32 `[pictures, features]` of length 1."""
        pixels = self.processor(
            images=list(pictures.cpu().numpy()), input_data_format="channels_first", return_tensors="pt"
        )
        return F.normalize(self.features(pixels["pixel_values"].to(self.model.device)), dim=-1)

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Of pixels as the model wants them, one row a picture."""


class Dino(Embedding):
    """The class token of a DINO or DINOv2 (arXiv 2104.14294, 2304.07193), or another vision transformer with one."""

    def features(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


class Clip(Embedding):
    """CLIP's projected features of pictures and texts (arXiv 2103.00020)."""

    def __init__(self, name: str, download: bool) -> None:
        super().__init__(name, download)
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise Missing(f"{name} is a {type(self.model).__name__}, not a CLIP")
        self.tokenizer = pretrained(AutoTokenizer, name, download)
        self.text_tokens = self.model.config.text_config.max_position_embeddings

    def features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to float32 `[prompts, features]` of length 1; those too long are cut."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.text_tokens, return_tensors="pt"
        ).to(self.model.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)

    def too_long(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than the model reads."""
        return sum(len(tokens) > self.text_tokens for tokens in self.tokenizer(list(prompts)).input_ids)


class ImageSimilarity(nn.Module):
    """100 x the cosine of the embeddings of the teacher's and the student's picture: CLIP-I with CLIP, DINO with DINO.

    Raises:
        Missing: from the embedding.
    """

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        teacher, student = self.embedding.images(batch.teacher), self.embedding.images(batch.student)
        return {STUDENT: 100 * (teacher * student).sum(dim=-1)}


class TextSimilarity(nn.Module):
    """100 x the cosine of the embeddings of a picture and its caption, for either model: CLIP-T."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        texts = self.clip.texts(batch.prompts)
        pictures = {TEACHER: batch.teacher, STUDENT: batch.student}
        return {row: 100 * (self.clip.images(each) * texts).sum(dim=-1) for row, each in pictures.items()}
