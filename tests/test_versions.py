"""CI runs with the oldest declared versions, and loading works in all."""

import tomllib
from pathlib import Path

import torch
from diffusers import FluxPipeline
from packaging.requirements import Requirement
from safetensors.torch import load_file

from clear_attn import demo
from clear_attn.models._diffusers import load_pretrained

ROOT = Path(__file__).parents[1]


def requirements(lines):
    return [Requirement(line) for line in lines if not line.startswith(("#", "clear-attn"))]


def test_ci_runs_with_the_oldest_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = requirements(project["dependencies"] + project["optional-dependencies"]["dev"])
    floors = {each.name: next(iter(each.specifier)).version for each in declared if len(each.specifier) == 1}
    pinned = requirements((ROOT / ".ci" / "oldest.txt").read_text().splitlines())
    pins = {each.name: next(iter(each.specifier)).version for each in pinned}
    assert len(pins) == 7
    for name in pins.keys() - {"torch"}:
        assert f"{pins[name]}.".startswith(f"{floors[name]}."), name


def test_a_pipeline_is_loaded_in_the_dtype_that_is_asked_for():
    for pipe in (demo.pipeline(torch.bfloat16), load_pretrained(FluxPipeline, demo.path(), dtype=torch.bfloat16)):
        models = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
        assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.bfloat16}


def test_the_small_flux_draws_where_no_dtype_is_asked_for():
    pipe = FluxPipeline.from_pretrained(demo.path())
    assert pipe("a red circle", height=64, width=64, num_inference_steps=1, max_sequence_length=24).images[0]
    models = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.float32}


def test_the_small_flux_has_the_weights_of_its_files():
    """transformers 4 leaves weights random if it does not know their names."""
    pipe = demo.pipeline()
    for name in ("text_encoder", "text_encoder_2"):
        saved = load_file(demo.path() / name / "model.safetensors").values()
        loaded = [parameter.detach() for parameter in getattr(pipe, name).parameters()]
        assert len(saved) == len(loaded)
        assert all(any(torch.equal(one, other.float()) for other in saved) for one in loaded)
