"""Compare with outputs of the published code; see golden/README.md."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

import clear_attn as clear
from tests.helpers import hardware

GOLDEN = Path(__file__).parent / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}


@pytest.mark.parametrize("backend", hardware.BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_published_code(name, backend):
    transformer = FluxTransformer2DModel(**json.loads((GOLDEN / "transformer_config.json").read_text()))
    transformer.load_state_dict(load_file(GOLDEN / "transformer.safetensors"))
    call = load_file(GOLDEN / f"{name}.io.safetensors")
    expected = call.pop("output")
    clear.linearize(
        transformer,
        CASES[name]["window"],
        CASES[name]["down_factor"],
        weights=GOLDEN / f"{name}.checkpoint.safetensors",
        backend=backend,
    )
    with contextlib.ExitStack() as around, torch.no_grad():
        if "ntk_factor" in CASES[name]:
            around.enter_context(clear.ntk_scaling(transformer, CASES[name]["ntk_factor"]))
        if CASES[name].get("proportional"):
            around.enter_context(clear.proportional_attention(transformer))
        output = transformer(**call).sample
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
