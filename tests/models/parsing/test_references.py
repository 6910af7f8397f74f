"""Several reference images in one sequence, with a number each or with the same number, as in pipelines."""

import pytest
import torch

import clear_attn as clear
from clear_attn.models import adapter_for
from tests.helpers.families import CHROMA, FLUX, FLUX2
from tests.helpers.reference_model import in_raster_order, run

GRID = (7, 9)
# For each reference: rows, columns, and the row and column of its first token.
REFERENCES = {
    "at one place": [(4, 5, 0, 0), (4, 5, 0, 0)],
    "at one place, of other sizes": [(4, 5, 0, 0), (3, 8, 0, 0), (6, 2, 0, 0)],
    "side by side": [(4, 5, 0, 0), (4, 6, 0, 5)],
    "side by side, of other heights": [(4, 5, 0, 0), (6, 5, 0, 5)],
    "one below the other, of other widths": [(4, 5, 0, 0), (3, 6, 4, 0)],
}


def number(ids, references, dtype=torch.float32):
    """Return the ids of the image and, with first number 1, of its references."""
    parts = [ids[: GRID[0] * GRID[1]]]
    for height, width, top, left in references:
        part = torch.zeros(height * width, ids.shape[1])
        part[:, 0] = 1
        part[:, 1:3] = torch.cartesian_prod(torch.arange(height) + top, torch.arange(width) + left)
        parts.append(part)
    return torch.cat(parts).to(dtype)


@pytest.mark.parametrize("family", [FLUX, FLUX2, CHROMA], ids=["flux", "flux2", "chroma"])
@pytest.mark.parametrize("name", REFERENCES)
def test_references_under_one_number(family, name):
    references = REFERENCES[name]
    grids = [GRID, *(reference[:2] for reference in references)]
    transformer = family.transformer()
    call = family.call(transformer, *grids)
    ids = call["img_ids"]
    call["img_ids"] = number(ids[0] if ids.ndim == 3 else ids, references)
    expected = run(in_raster_order(transformer, grids, clear.methods.Clear(3, 2)), call)
    clear.linearize(transformer, 3, 2, weights=None)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_references(dtype):
    """Rows and columns above 256, which bfloat16 rounds to the same number."""
    references = [(300, 4, 0, 0), (300, 4, 0, 0), (3, 290, 0, 0)]
    transformer = FLUX.transformer()
    ids = number(torch.zeros(63, 3), references, dtype)
    ids[:63, 1:] = torch.cartesian_prod(torch.arange(7), torch.arange(9)).to(dtype)
    tokens = len(ids)
    call = {
        "hidden_states": torch.zeros(1, tokens, 8),
        "encoder_hidden_states": torch.zeros(1, 3, 12),
        "img_ids": ids,
    }
    parsed = adapter_for(transformer).parse_call(transformer, call)
    assert parsed.grids == (GRID, (300, 4), (300, 4), (3, 290))


@pytest.mark.parametrize("order", ["random", "columns first", "a row is missing a token", "single tokens"])
def test_ids_without_grids_are_refused(order):
    transformer = clear.linearize(FLUX.transformer(), 3, weights=None)
    call = FLUX.call(transformer, (8, 6))
    index = {
        "random": torch.randperm(48),
        "columns first": torch.arange(48).view(8, 6).T.flatten(),
        "a row is missing a token": torch.cat([torch.arange(20), torch.arange(21, 48)]),
        "single tokens": torch.arange(0, 48, 7),
    }[order]
    call = {**call, "img_ids": call["img_ids"][index], "hidden_states": call["hidden_states"][:, index]}
    with pytest.raises(ValueError, match="img_ids must number the tokens of each image row by row"):
        run(transformer, call)
