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

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
# Versions of packages, which a stored plan has.
VERSIONS = re.compile(r'"(clear_attn|diffusers|torch)": "[^"]*"')

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """Return what a cell printed or shows as text, without the text of images and with no versions."""
    for output in cell.outputs:
        assert output.output_type != "error", output
        if output.output_type == "stream":
            yield VERSIONS.sub("", output.text) if output.name == "stdout" else ""
        elif "image/png" not in output.data:
            yield output.data.get("text/html", output.data["text/plain"])


def images(cell):
    """Return the images of a cell, as arrays; figures of matplotlib depend on fonts, and are their size."""
    for output in cell.outputs:
        if "image/png" in output.get("data", {}):
            image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
            yield np.array(image, dtype=np.float32) * ("PIL" in output.data["text/plain"])


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
    shown = 0
    for before, after in zip(code_cells(stored), code_cells(fresh), strict=True):
        assert [text for text in texts(after) if text] == [text for text in texts(before) if text], before.source
        for one, other in zip(images(before), images(after), strict=True):
            shown += 1
            assert one.shape == other.shape
            assert abs(one - other).mean() < 1  # of 255
    assert shown
