"""Latents and text embeddings, computed once: safetensors shards, and an index that says what they are of."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.image_processor import VaeImageProcessor
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clear_attn.distill.buckets import fit
from clear_attn.distill.data import Example
from clear_attn.distill.recipes import Recipe
from clear_attn.distill.step import Batch

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
        digest = hashlib.sha256(json.dumps([(each.name, each.prompt) for each in examples]).encode())
        return cls(model, revision, resolution, text_tokens, digest.hexdigest())


def build(
    pipe: Any,
    recipe: Recipe,
    examples: Sequence[Example],
    folder: Path,
    origin: Origin,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Encodes what is not yet encoded. Stopped at any moment, it goes on where the last whole shard ends.

    Args:
        pipe: a pipeline with its autoencoder and text encoders.
        recipe: of its family.
        examples: all of them, in one order.
        folder: where the shards go.
        origin: what the cache is of.
        progress: wraps the numbers of the shards to come, as tqdm does.

    Raises:
        ValueError: the folder's cache is of something else, or too many pictures are broken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = _read_index(folder, origin) or {"format": FORMAT, "origin": origin._asdict(), "shards": [], "broken": []}
    shards = range(len(index["shards"]), -(-len(examples) // SHARD))
    for number in progress(shards):
        tensors: dict[str, Tensor] = {}
        entries: list[dict[str, Any]] = []
        for example in examples[number * SHARD : (number + 1) * SHARD]:
            encoded = _encode(pipe, recipe, example, origin)
            if encoded is None:
                index["broken"].append(example.name)
                _check_broken(index["broken"], len(examples))
                continue
            tensors |= {f"{len(entries)}.{name}": tensor for name, tensor in encoded.items()}
            entries.append({"name": example.name, "size": list(encoded["mean"].shape[1:])})
        file = f"shard-{number:05}.safetensors"
        if tensors:
            _put(folder / file, functools.partial(save_file, tensors))
        index["shards"].append({"file": file, "examples": entries})
        _put(folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8"))


def _put(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file whole or not at all."""
    unfinished = file.with_name(f".unfinished-{file.name}")
    try:
        write(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_index(folder: Path, origin: Origin) -> dict[str, Any] | None:
    file = folder / INDEX
    if not file.is_file():
        return None
    index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if index.get("format") != FORMAT:
        raise ValueError(
            f"{file} is of format {index.get('format')!r}, this version reads {FORMAT}; give another folder"
        )
    theirs = index["origin"]
    for name, value in origin._asdict().items():
        if theirs[name] != value:
            raise ValueError(
                f"the cache in {folder} was made for {name} {theirs[name]!r}, not {value!r}; give another folder, or "
                "delete this one"
            )
    return index


def _check_broken(broken: Sequence[str], count: int) -> None:
    logger.warning("skipped %s: it is a broken picture (%d of %d so far)", broken[-1], len(broken), count)
    if len(broken) > max(1, MOST_BROKEN * count):
        raise ValueError(f"{len(broken)} of {count} pictures are broken, as {', '.join(broken[:3])}; replace them")


@torch.no_grad()
def _encode(pipe: Any, recipe: Recipe, example: Example, origin: Origin) -> dict[str, Tensor] | None:
    """The latents' mean and standard deviation, scaled as the transformer takes them, and the text; None if broken."""
    try:
        picture = fit(example.open(), origin.resolution)
    except (OSError, SyntaxError):  # PIL raises the latter for some broken files
        return None
    vae = pipe.vae
    pixels = VaeImageProcessor().preprocess(picture).to(vae.device, vae.dtype)
    moments = vae.encode(pixels).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    text, pooled = recipe.encode_prompts(pipe, [example.prompt], origin.text_tokens)
    encoded = {"mean": (moments.mean - shift) * scale, "std": moments.std * scale, "text": text, "pooled": pooled}
    return {name: tensor[0].cpu().contiguous() for name, tensor in encoded.items()}


class Cache:
    """What `build` has written.

    Attributes:
        sizes: of the latents of each example, (height, width).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        entries = [
            (shard["file"], number, tuple(entry["size"]))
            for shard in index["shards"]
            for number, entry in enumerate(shard["examples"])
        ]
        self._places = [(file, number) for file, number, _ in entries]
        self.sizes = [size for *_, size in entries]
        if not entries:
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
        with safe_open(self.folder / file, "pt") as shard:
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


def hash_of(*numbers: int) -> int:
    """One seed of several numbers: what is random at a step depends on the step alone, also after an interruption."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7])
