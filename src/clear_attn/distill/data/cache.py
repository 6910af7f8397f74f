"""Cache latents and text embeddings in safetensors shards, with an index of their origin."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.image_processor import VaeImageProcessor
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clear_attn.distill.data.buckets import fit
from clear_attn.distill.data.examples import Example, check_same_origin
from clear_attn.distill.data.seeds import hash_of
from clear_attn.distill.step import Batch
from clear_attn.models import TrainingAdapter
from clear_attn.utils.atomic import atomic_file, atomic_text
from clear_attn.utils.json_records import parse_json, read_json, validate_record
from clear_attn.utils.tensor_files import deferred_interrupt, write_tensors

logger = logging.getLogger(__name__)

INDEX = "index.json"
INDEX_FIELDS = {"format": int, "origin": dict, "examples": int, "shards": int}
SHARD_FIELDS = {"sizes": str, "broken": str, "stamps": str}
FORMAT = 1
SHARD = 64
MOST_BROKEN = 0.05  # as a share of all


class Origin(NamedTuple):
    """The model and images of a cache, with which a cache of other ones is refused."""

    model: str
    revision: str | None
    resolution: int
    text_tokens: int
    examples: str

    @classmethod
    def of(
        cls, model: str, revision: str | None, resolution: int, text_tokens: int, examples: Iterable[Example]
    ) -> Origin:
        """Return the origin, with a digest of the names and captions of all examples."""
        return cls(model, revision, resolution, text_tokens, _digest([(each.name, each.prompt) for each in examples]))


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def begin(folder: Path, origin: Origin, count: int) -> None:
    """Create the folder and its index.

    Raises:
        ValueError: the folder has a cache with another origin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).is_file():
        check_same_origin(_read_index(folder)["origin"], origin, f"the cache in {folder} was made")
    index = {"format": FORMAT, "origin": origin._asdict(), "examples": count, "shards": -(-count // SHARD)}
    atomic_text(folder / INDEX, json.dumps(index, indent=1) + "\n")


def _read_index(folder: Path) -> dict[str, Any]:
    index = validate_record(read_json(folder / INDEX), INDEX_FIELDS, str(folder / INDEX))
    if index["format"] != FORMAT:
        raise ValueError(
            f"{folder / INDEX} has format {index['format']}, this version reads {FORMAT}; give another folder"
        )
    return index


def missing(folder: Path, examples: Sequence[Example]) -> list[int]:
    """Return the numbers of the shards that do not exist, or with images that have changed.

    Raises:
        ValueError: a shard is not complete.
    """
    return [
        number
        for number in range(_read_index(folder)["shards"])
        if not (file := shard_file(folder, number)).exists()
        or _read_metadata(file)["stamps"] != _fingerprint(_of_shard(examples, number))
    ]


def shard_file(folder: Path, number: int) -> Path:
    """Return the file of a shard."""
    return folder / f"shard-{number:05}.safetensors"


def _of_shard(examples: Sequence[Example], number: int) -> Sequence[Example]:
    return examples[number * SHARD : (number + 1) * SHARD]


def _fingerprint(examples: Sequence[Example]) -> str:
    return _digest([each.fingerprint() for each in examples])


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    try:
        with deferred_interrupt(), safe_open(shard, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{shard} is not complete ({error}); delete it, and the next run encodes it again") from error


def _read_metadata(shard: Path) -> dict[str, str]:
    with _opened(shard) as opened:
        return validate_record(opened.metadata() or {}, SHARD_FIELDS, str(shard))


def build(
    pipe: Any,
    training: TrainingAdapter,
    examples: Sequence[Example],
    folder: Path,
    origin: Origin,
    shards: Iterable[int],
) -> None:
    """Encode shards. Each is written atomically, so that an interrupted run can continue.

    Args:
        pipe: a pipeline with its autoencoder and text encoders.
        training: the training adapter of its transformer.
        examples: all examples, always in the same order.
        folder: a folder that `begin` prepared.
        origin: the origin of the cache.
        shards: the numbers of the shards to encode.

    Raises:
        ValueError: too many images are broken.
    """
    broken: list[str] = []
    for number in shards:
        tensors: dict[str, Tensor] = {}
        sizes: list[list[int]] = []
        before, of_shard = len(broken), _of_shard(examples, number)
        fingerprint = _fingerprint(of_shard)
        for example in of_shard:
            encoded = _encode(pipe, training, example, origin)
            if encoded is None:
                broken.append(example.name)
                logger.warning("skipped %s: it is a broken image (%d so far)", example.name, len(broken))
                _check_broken(broken, len(examples), folder)
                continue
            tensors |= {f"{len(sizes)}.{name}": tensor for name, tensor in encoded.items()}
            sizes.append(list(encoded["mean"].shape[1:]))
        metadata = {"sizes": json.dumps(sizes), "broken": json.dumps(broken[before:]), "stamps": fingerprint}
        with atomic_file(shard_file(folder, number)) as unfinished:
            write_tensors(tensors, unfinished, metadata=metadata)


def _check_broken(broken: Sequence[str], count: int, folder: Path) -> None:
    if len(broken) > max(1, MOST_BROKEN * count):
        raise ValueError(
            f"{len(broken)} of {count} images are broken, such as {', '.join(broken[:3])}; replace them, and continue "
            f"with the cache in {folder}"
        )


@torch.no_grad()
def _encode(pipe: Any, training: TrainingAdapter, example: Example, origin: Origin) -> dict[str, Tensor] | None:
    """Return the latents' mean and standard deviation and the text, or None if the image is broken."""
    try:
        image = example.open()
    except Exception:  # PIL's errors have no common base class
        return None
    pixels = (
        VaeImageProcessor()
        .preprocess(fit(image, origin.resolution, training.pixel_step))
        .to(pipe.vae.device, pipe.vae.dtype)
    )
    mean, std = training.encode_image(pipe, pixels)
    encoded = {"mean": mean, "std": std, **training.encode_prompts(pipe, [example.prompt], origin.text_tokens)}
    return {name: tensor[0].cpu().contiguous() for name, tensor in encoded.items()}


class Cache:
    """Read the cache that `build` wrote.

    Attributes:
        sizes: the (height, width) of each example's latents.

    Raises:
        ValueError: too many images were broken; a shard is not complete.
    """

    def __init__(self, folder: Path) -> None:
        index = _read_index(folder)
        self._places: list[tuple[Path, int]] = []
        self.sizes: list[tuple[int, int]] = []
        broken: list[str] = []
        for shard in range(index["shards"]):
            file = shard_file(folder, shard)
            metadata = {name: parse_json(_read_metadata(file)[name], str(file)) for name in ("sizes", "broken")}
            self._places += [(file, number) for number in range(len(metadata["sizes"]))]
            self.sizes += [(height, width) for height, width in metadata["sizes"]]
            broken += metadata["broken"]
        _check_broken(broken, index["examples"], folder)
        if not self.sizes:
            raise ValueError(f"the cache in {folder} has no examples")

    def __len__(self) -> int:
        return len(self._places)

    def read(self, examples: Sequence[int], rng: torch.Generator) -> Batch:
        """Return examples of one size, with latents sampled from their distributions and texts padded with zeros."""
        read = [self._read(example) for example in examples]
        stacked = {name: pad_sequence([each[name] for each in read], batch_first=True) for name in read[0]}
        mean, std = stacked.pop("mean"), stacked.pop("std")
        noise = torch.randn(mean.shape, generator=rng).to(mean.dtype)
        return Batch(mean + std * noise, stacked)

    def _read(self, example: int) -> dict[str, Tensor]:
        file, number = self._places[example]
        prefix = f"{number}."
        with _opened(file) as shard:
            names = [name for name in shard.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): shard.get_tensor(name) for name in names}


def batches(sizes: Sequence[tuple[int, int]], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the examples of each batch of an epoch, in an order given by seed and epoch.

    All examples of a batch have one size. The last batch of a size may be smaller.
    """
    rng = torch.Generator().manual_seed(hash_of(seed, epoch))
    by_size: dict[tuple[int, int], list[int]] = {}
    for example in torch.randperm(len(sizes), generator=rng).tolist():
        by_size.setdefault(sizes[example], []).append(example)
    full = [
        group[start : start + batch_size] for group in by_size.values() for start in range(0, len(group), batch_size)
    ]
    return [full[number] for number in torch.randperm(len(full), generator=rng).tolist()]
