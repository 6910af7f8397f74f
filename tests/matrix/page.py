"""Write docs/compatibility.md from the rows, the columns and the errors of the tests."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Mapping
from pathlib import Path

from tests.matrix.columns import AFTER, BEFORE, COLUMNS, Column
from tests.matrix.rows import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

HEAD = """# Compatibility

## Versions

Python 3.11 to 3.14, torch 2.9, diffusers 0.36, transformers 4.57, huggingface_hub 0.36, accelerate 1.10, safetensors
0.6.2 and peft 0.17, or later ones. Tested on Python 3.11 unless this table says otherwise; the other versions in
between are not run.

| torch | diffusers | transformers | huggingface_hub | what was run |
|---|---|---|---|---|
| 2.13 (CPU) | 0.42.1 | 5.24 | 2.4 | all tests, in CI |
| 2.14.1, Triton 3.8 | 0.42.1 | 5.24 | 2.4 | all tests [a], once by hand |
| 2.9.0, Triton 3.5 | 0.36.0 | 4.57.1 | 0.36.0 | all tests [b], once by hand |
| 2.13 (CPU) | 0.36.0 | 4.57.1 | 0.36.0 | the core tests, in CI |
| 2.13 (CPU) | 0.38.0 | 4.57.1 | 0.36.0 | the tests of Qwen-Image, once by hand; those of its ControlNet fail |
| 2.14.1 | 0.42.1 | 5.24 | 2.4 | Python 3.13, the tests of core, weights and lifecycle, once by hand |
| 2.11 (CUDA, H200) | 0.41.0 | 5.17 | 1.33 | Python 3.12, the tests on a GPU and of the kernels, once by hand |
| 2.11 (CUDA, H200) | 0.42.1 | 5.17 | 1.33 | Python 3.12, the same without the tests of training |

[a] On a CPU, the kernels in Triton's interpreter. [b] On a CPU, with accelerate 1.10, peft 0.17 and torchao 0.15, of
the models and pipelines that this diffusers has, without cache-dit; the kernels are left out, because they need Triton
3.6. These tests have a part of the cells below. `python -m tests.matrix` runs all, with the versions of the first row.

- Before diffusers 0.40, the keyword for the dtype is `torch_dtype=`. A pipeline ignores `dtype=` there, with a line in
  the log, and is loaded in float32. A model raises a `TypeError`.
- Qwen-Image needs diffusers 0.39, and is refused with earlier ones.
- `Flux2KleinPipeline` and `ChromaInpaintPipeline` came with 0.37, Krea 2 with 0.39, FLUX.3 and Qwen-Image 2.1 with
  0.42. Z-Image needs 0.42, and is refused with earlier ones.
- In diffusers 0.36 every FLUX.2 embeds a guidance scale, and its reentrant gradient checkpointing fails, in the dense
  model too.
- SeaCache came with 0.41. Modular pipelines are tested with 0.42.
- Group offload on a machine without an accelerator needs 0.41.
- `backend="triton"` needs Triton 3.6, which torch brings from 2.10 on, and is refused with earlier ones.

## How to read the tables

`python -m tests.matrix` writes this page. It runs the tests behind each table, and writes nothing if one fails
(`--family SD3` runs and writes one table). A cell is a tiny random pipeline of its kind, run on a CPU with a window of
3 tokens and pooled keys. It is compared with the same set-up in which diffusers' own processors compute the rule
densely. Distilled weights are loaded, except in the rows with "own weights".

- **yes**: the same numbers, before `linearize` or after it.
- **before**, **after**: only before `linearize`, or only after. The other order raises the error below. The tests then
  do what the error says, and compare.
- **none**: diffusers does not offer it for this pipeline.

Compiled models are traced whole here, without generating machine code; other tests do that. Layers of bitsandbytes are
installed by hand, because diffusers loads them on GPUs only. A GGUF file takes no distilled weights (the error for
quantized models, below). Offloading goes from the CPU to the CPU.

Refused everywhere: perturbed attention guidance (its pipelines, and hooks that skip attention inside a layer), smoothed
energy guidance, attention masks other than those for padded text, diffusers' context parallelism, and IP-Adapters of
models other than FLUX.1.
"""


def cell_text(name: str, column: Column, notes: Mapping[str, int]) -> str:
    """Return the text of a cell, with the number of the error's note if one order is refused."""
    if column.missing(name):
        return "none"
    family = ROWS[name].family
    refused = [order for order in (BEFORE, AFTER) if (family, order) in column.refusals]
    if not refused:
        return "yes"
    working = next(order for order in column.orders if order not in refused)
    return f"{working} [{notes[column.refusals[family, refused[0]].words]}]"


def notes() -> dict[str, int]:
    """Return the patterns of the refusals, numbered in the order of the table."""
    words = dict.fromkeys(refusal.words for column in COLUMNS.values() for refusal in column.refusals.values())
    return {each: number for number, each in enumerate(words, 1)}


def tables() -> dict[str, str]:
    """Return the table of each family."""
    numbers, parts = notes(), {}
    for family, rows in itertools.groupby(ROWS.items(), lambda item: item[1].family):
        kinds = dict(rows)
        lines = [
            ["", *(name.removeprefix(f"{family} ").removeprefix(f"{family.removesuffix('.1')} ") for name in kinds)]
        ]
        lines.append(["---"] * len(lines[0]))
        lines += [[name, *(cell_text(row, column, numbers) for row in kinds)] for name, column in COLUMNS.items()]
        parts[family] = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    return parts


def sections(texts: Mapping[str, str]) -> str:
    return "\n".join(f"## {title}\n\n{text}" for title, text in texts.items())


def page(ran: Container[str], errors: Mapping[str, str], before: str) -> str:
    """Return the whole page.

    Tables of families that ran are new, and errors are if the first family ran, which has the names that users know.
    The others are taken from the previous page, if it has them.
    """
    recorded = dict(part.split("\n\n", 1) for part in before.split("\n## ")[1:])
    texts = {family: table if family in ran else recorded.get(family) for family, table in tables().items()}
    lines = recorded.get("Errors", "").splitlines()
    known = [line.partition(" ")[2] for line in lines]
    sources = [errors.values(), known] if next(iter(texts)) in ran else [known, errors.values()]
    messages = {words: next((x for each in sources for x in each if re.search(words, x)), None) for words in notes()}
    texts["Errors"] = "".join(f"{number}. {messages[words]}\n" for words, number in notes().items() if messages[words])
    return f"{HEAD}\n{sections({title: text for title, text in texts.items() if text})}"
