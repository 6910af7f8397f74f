"""The notebooks in `examples/`: what is stored in them is what they give today."""

import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from clear_attn.demo.scene_reader import read

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
# Versions of packages, which a stored plan has.
VERSIONS = re.compile(r'"(clear_attn|diffusers|torch)": "[^"]*"')
# Sizes of quantized weights, in MiB with two decimals.
QUANTIZED = re.compile(r"\b(weights|transformer) \d+\.\d\d MiB")

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell, varies):
    """Return what a cell printed or shows as text, without the text of images and what varies."""
    for output in cell.outputs:
        assert output.output_type != "error", output
        if output.output_type == "stream":
            yield varies.sub("", output.text) if output.name == "stdout" else ""
        elif "image/png" not in output.data:
            yield output.data.get("text/html", output.data["text/plain"])


def images(cell):
    """Return the images of a cell, as arrays; figures of matplotlib depend on fonts, and are their size."""
    for output in cell.outputs:
        if "image/png" in output.get("data", {}):
            image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
            yield np.array(image, dtype=np.float32) * ("PIL" in output.data["text/plain"])


def has_other_quantization(file):
    """Return whether a notebook quantizes with a torchao that does so in another way than in its stored outputs.

    Before version 2, 8-bit weights have scales in the dtype of the weights, not in float32, and zero points of 64 bits.
    """
    if "quantize_(" not in file.read_text():
        return False
    return pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig().version < 2


def assert_close(one, other):
    assert abs(one - other).mean() < 1  # of 255


def assert_same_scene(one, other):
    assert read(one).scene == read(other).scene


@each_notebook
def test_stored_notebooks(file):
    """They were run from top to bottom, say what they need and how long they take, and fit the page."""
    notebook = nbformat.read(file, as_version=4)
    opening = notebook.cells[0].source
    assert "**Needs:**" in opening
    assert "minute" in opening
    assert [cell.execution_count for cell in code_cells(notebook)] == [*range(1, 1 + len(code_cells(notebook)))]
    assert [line for cell in code_cells(notebook) for line in cell.source.splitlines() if len(line) > 92] == []
    assert not any(output.get("name") == "stderr" for cell in code_cells(notebook) for output in cell.outputs)


@pytest.mark.slow
@each_notebook
def test_outputs_are_what_is_stored(file, tmp_path):
    stored, fresh = nbformat.read(file, as_version=4), nbformat.read(file, as_version=4)
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    varies, compare = (QUANTIZED, assert_same_scene) if has_other_quantization(file) else (VERSIONS, assert_close)
    shown = 0
    for before, after in zip(code_cells(stored), code_cells(fresh), strict=True):
        expected, found = ([text for text in texts(cell, varies) if text] for cell in (before, after))
        assert found == expected, before.source
        for one, other in zip(images(before), images(after), strict=True):
            shown += 1
            assert one.shape == other.shape
            compare(one, other)
    assert shown
