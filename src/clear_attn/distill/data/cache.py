"""Latents and text embeddings, computed once: safetensors shards, and an index that says what they are of."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.image_processor import VaeImageProcessor
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clear_attn.distill.data.buckets import fit
from clear_attn.distill.data.examples import Example, check_same_origin
from clear_attn.distill.data.seeds import hash_of
from clear_attn.distill.step import Batch
from clear_attn.models import TrainingAdapter
from clear_attn.utils.atomic import atomic_file, atomic_text

logger = logging.getLogger(__name__)

INDEX = "index.json"
FORMAT = 1
SHARD = 64
MOST_BROKEN = 0.05  # as a share of all


class Origin(NamedTuple):
    """What a cache is of: another model's, or other pictures', must not be taken for it."""

    model: str
    revision: str | None
    resolution: int
    text_tokens: int
    examples: str

    @classmethod
    def of(
        cls, model: str, revision: str | None, resolution: int, text_tokens: int, examples: Iterable[Example]
    ) -> Origin:
        """With a digest of the names and captions of all examples."""
        return cls(model, revision, resolution, text_tokens, _digest([(each.name, each.prompt) for each in examples]))


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def begin(folder: Path, origin: Origin, count: int) -> None:
    """Makes the folder, with the index that says what it is of.

    Raises:
        ValueError: the folder's cache is of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / INDEX
    if file.is_file():
        index = json.loads(file.read_text(encoding="utf-8"))
        if index.get("format") != FORMAT:
            raise ValueError(
                f"{file} is of format {index.get('format')!r}, this version reads {FORMAT}; give another folder"
            )
        check_same_origin(index["origin"], origin, f"the cache in {folder} was made")
    index = {"format": FORMAT, "origin": origin._asdict(), "examples": count, "shards": -(-count // SHARD)}
    atomic_text(file, json.dumps(index, indent=1) + "\n")


def missing(folder: Path, examples: Sequence[Example]) -> list[int]:
    """The numbers of the shards that are not there, or whose pictures have changed since."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [
        number
        for number in range(index["shards"])
        if not (file := shard_file(folder, number)).exists() or _about(file).get("stamps") != _stamps(examples, number)
    ]


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def _of_shard(examples: Sequence[Example], number: int) -> Sequence[Example]:
    return examples[number * SHARD : (number + 1) * SHARD]


def _stamps(examples: Sequence[Example], number: int) -> str:
    return _digest([each.stamp() for each in _of_shard(examples, number)])


def _about(shard: Path) -> dict[str, str]:
    with safe_open(shard, "pt") as opened:
        return opened.metadata() or {}


def build(
    pipe: Any,
    training: TrainingAdapter,
    examples: Sequence[Example],
    folder: Path,
    origin: Origin,
    shards: Iterable[int],
) -> None:
    """Encodes shards, each written whole or not at all, so that an interrupted run goes on where it was.

    Args:
        pipe: a pipeline with its autoencoder and text encoders.
        training: its transformer's training adapter.
        examples: all of them, in one order.
        folder: that `begin` has made.
        origin: what the cache is of.
        shards: which to encode.

    Raises:
        ValueError: too many pictures are broken.
    """
    broken: list[str] = []
    for number in shards:
        tensors: dict[str, Tensor] = {}
        sizes: list[list[int]] = []
        of_shard = len(broken)
        stamps = _stamps(examples, number)
        for example in _of_shard(examples, number):
            encoded = _encode(pipe, training, example, origin)
            if encoded is None:
                broken.append(example.name)
                logger.warning("skipped %s: it is a broken picture (%d so far)", example.name, len(broken))
                _check_broken(broken, len(examples), folder)
                continue
            tensors |= {f"{len(sizes)}.{name}": tensor for name, tensor in encoded.items()}
            sizes.append(list(encoded["mean"].shape[1:]))
        about = {"sizes": json.dumps(sizes), "broken": json.dumps(broken[of_shard:]), "stamps": stamps}
        with atomic_file(shard_file(folder, number)) as unfinished:
            save_file(tensors, unfinished, metadata=about)


def _check_broken(broken: Sequence[str], count: int, folder: Path) -> None:
    if len(broken) > max(1, MOST_BROKEN * count):
        raise ValueError(
            f"{len(broken)} of {count} pictures are broken, as {', '.join(broken[:3])}; replace them, and go on with "
            f"the cache in {folder}"
        )


@torch.no_grad()
def _encode(pipe: Any, training: TrainingAdapter, example: Example, origin: Origin) -> dict[str, Tensor] | None:
    """The latents' mean and standard deviation, scaled as the transformer takes them, and the text; None if broken."""
    try:
        picture = example.open()
    except Exception:  # PIL has many for what is broken, and none in common
        return None
    vae = pipe.vae
    pixels = VaeImageProcessor().preprocess(fit(picture, origin.resolution)).to(vae.device, vae.dtype)
    moments = vae.encode(pixels).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    text, pooled = training.encode_prompts(pipe, [example.prompt], origin.text_tokens)
    encoded = {"mean": (moments.mean - shift) * scale, "std": moments.std * scale, "text": text, "pooled": pooled}
    return {name: tensor[0].cpu().contiguous() for name, tensor in encoded.items()}


class Cache:
    """What `build` has written.

    Attributes:
        sizes: of the latents of each example, (height, width).

    Raises:
        ValueError: too many pictures were broken.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self._places: list[tuple[Path, int]] = []
        self.sizes: list[tuple[int, int]] = []
        broken: list[str] = []
        for shard in range(index["shards"]):
            file = shard_file(folder, shard)
            about = _about(file)
            sizes = [(height, width) for height, width in json.loads(about["sizes"])]
            self._places += [(file, number) for number in range(len(sizes))]
            self.sizes += sizes
            broken += json.loads(about["broken"])
        _check_broken(broken, index["examples"], folder)
        if not self.sizes:
            raise ValueError(f"the cache in {folder} holds no examples")

    def __len__(self) -> int:
        return len(self._places)

    def read(self, examples: Sequence[int], rng: torch.Generator) -> Batch:
        """Examples of one size, with latents drawn from their distributions."""
        means, stds, texts, pooled = zip(*(self._read(example) for example in examples), strict=True)
        mean, std = torch.stack(means), torch.stack(stds)
        noise = torch.randn(mean.shape, generator=rng).to(mean.dtype)
        return Batch(mean + std * noise, torch.stack(texts), torch.stack(pooled))

    def _read(self, example: int) -> tuple[Tensor, ...]:
        file, number = self._places[example]
        with safe_open(file, "pt") as shard:
            return tuple(shard.get_tensor(f"{number}.{name}") for name in ("mean", "std", "text", "pooled"))


def batches(sizes: Sequence[tuple[int, int]], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The examples of each batch of an epoch, each batch of one size, all in an order that seed and epoch decide.

    A size with fewer examples left than a batch gives a smaller one.
    """
    rng = torch.Generator().manual_seed(hash_of(seed, epoch))
    by_size: dict[tuple[int, int], list[int]] = {}
    for example in torch.randperm(len(sizes), generator=rng).tolist():
        by_size.setdefault(sizes[example], []).append(example)
    full = [
        group[start : start + batch_size] for group in by_size.values() for start in range(0, len(group), batch_size)
    ]
    return [full[number] for number in torch.randperm(len(full), generator=rng).tolist()]
