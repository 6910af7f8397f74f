import json
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from IPython.lib.pretty import pretty

import clear_attn as clear
from clear_attn.core.window_mask import window_mask
from clear_attn.methods.clear import window_pairs
from tests.helpers import dummy_models
from tests.helpers.families import each_family


@pytest.fixture(scope="module")
def flux_dev():
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


# CLEAR, tables 2 and 3: GFLOPs per layer. For 86.6 the paper has 80.6, a misprint.
PUBLISHED = {
    1024: {8: 63.5, 16: 86.6, 32: 154.1, None: 260.9},
    2048: {8: 246.2, 16: 352.6, 32: 724.3, None: 3507.9},
    4096: {8: 979.3, 16: 1433.2, 32: 3141.7, None: 53604.4},
}


@pytest.mark.parametrize("side", PUBLISHED)
def test_published_numbers(flux_dev, side):
    for window, gflops in PUBLISHED[side].items():
        cost = clear.cost(flux_dev, side, side, window=window)
        assert round(cost.layer_gflops if window else cost.dense_layer_gflops, 1) == gflops


@given(height=st.integers(1, 20), width=st.integers(1, 20), window=st.integers(1, 40), factor=st.integers(1, 5))
def test_counts_the_pairs_of_the_masks(height, width, window, factor):
    method = clear.methods.Clear(window, factor)
    plan = method.plan(clear.TokenLayout([(height, width)], 3))
    cost = clear.Cost.of_layer((height, width), 3, 2, 32, method)
    image_pairs = int(window_mask(plan.query, plan.key, plan.radius_sq).sum())
    assert cost.step_flops == 4 * 64 * (image_pairs + 3 * (3 + height * width))
    assert cost.dense_step_flops == 4 * 64 * (3 + height * width) ** 2
    assert cost.pooled_tokens == plan.pooled_tokens
    assert cost.block_list_bytes == sum(part.numel() * part.element_size() for part in plan.block_indices)


def test_a_wide_window_is_dense():
    assert window_pairs((7, 9), 12) == (7 * 9) ** 2


def test_settings_and_sizes_come_from_the_pipeline(pipe):
    assert (clear.cost(pipe, 128, 128).width, clear.cost(pipe, 128, 128).method) == (16, clear.methods.Clear(16))
    clear.linearize(pipe, 5, 2, weights=None)
    cost = clear.cost(pipe, 256, 128, text_tokens=24, batch=4)
    assert (cost.height, cost.width, cost.method) == (32, 16, clear.methods.Clear(5, 2))
    assert (cost.layers, cost.heads * cost.head_dim) == (5, 32)
    assert clear.cost(pipe, 256, 128, window=3).method == clear.methods.Clear(3, 2)


def test_a_size_is_rounded_down_as_diffusers_does(pipe):
    with pytest.warns(UserWarning, match="128 x 130 px is not a multiple of 8 px; it is rounded down to 128 x 128 px"):
        rounded = clear.cost(pipe, 128, 130)
    assert rounded == clear.cost(pipe, 128, 128)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 8}, r": 1\.1 times fewer FLOPs of attention$"),
        ({"window": 21}, r": nearly nothing is saved \(100\.0% of the FLOPs of dense attention\)$"),
        ({"window": 22}, r": nothing is saved, since each image token attends to all others \(100\.0% of .*\)$"),
        ({"window": 20, "down_factor": 2}, r": nothing is saved \(10\d\.\d% of the FLOPs of dense attention\)$"),
    ],
)
def test_says_whether_something_is_saved(flux_dev, settings, words):
    heading = str(clear.cost(flux_dev, 256, 272, **settings)).splitlines()[0]
    assert re.search(words, heading), heading


def test_a_schedule_that_names_all_layers(flux_dev):
    schedule = clear.Schedule(dense_layers=["transformer_blocks", "single_transformer_blocks"])
    cost = clear.cost(flux_dev, 1024, 1024, schedule=schedule)
    assert cost.layer_gflops is None
    assert "nothing is saved, since each image token attends to all others" in str(cost)
    assert "a layer" not in str(cost)


def test_prints_in_a_terminal_and_in_a_notebook(flux_dev):
    cost = clear.cost(flux_dev, 4096, 4096, window=8, down_factor=4)
    text, page = str(cost), cost._repr_html_()
    assert repr(cost) == pretty(cost) == text
    lines = {line.split("  ")[0]: line.split()[-3:] for line in text.splitlines() if line}
    assert lines["image queries, text keys"] == ["412.3", "412.3", "GFLOPs"]
    assert lines["a layer"] == ["53.60", "4.28", "TFLOPs"]
    assert lines["all 57 layers"] == ["3.055", "0.244", "PFLOPs"]
    for words in (
        "256 x 256 image tokens",
        "53.60",
        "all 57 layers",
        "Unchanged: text queries",
        "attention to the pooled keys",
        ", backend flex only)",
        "clear_attn.cost(pipe, ...) of a loaded one counts them",
    ):
        assert words in text
        assert words in page
    assert max(map(len, text.splitlines())) <= 132
    assert json.loads(json.dumps(cost.to_dict()))["pooled_tokens"] == 4096


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"height": 15}, ValueError, "15 x 64 px is less than one token of 16 px"),
        ({"width": 64.0}, TypeError, "width must be a whole number, got 64.0"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"text_tokens": -1}, ValueError, "text_tokens must be at least 0, got -1"),
    ],
)
def test_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        clear.cost(dummy_models.flux_transformer(), **{"height": 64, "width": 64, **arguments})


@each_family()
def test_counts_of_each_family(family, transformer):
    grid = family.grid(8, 6)
    counted = clear.cost(transformer, 16 * grid[0], 16 * grid[1], window=3)
    assert (counted.height, counted.width) == grid
    assert counted.layers == family.layers - family.reference_layers
    assert (counted.text_tokens, counted.heads * counted.head_dim) == (family.text_tokens, 32)
