"""The small FLUX is recognized, and takes its own distilled weights by itself."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

import clear_attn as clear
from clear_attn import demo
from clear_attn.models._diffusers import load_pretrained
from clear_attn.patching.target import find_target
from clear_attn.weights import packaged
from clear_attn.weights.metadata import read_record
from clear_attn.weights.published import PUBLISHED
from clear_attn.weights.recognition import Model
from tests.helpers import families
from tests.helpers.snapshots import assert_same, snapshot

SMALL_FLUX = PUBLISHED[1]
# The first is taken where none is asked for.
DEFAULT, FILE = next((method, packaged.WEIGHTS / file) for method, file in SMALL_FLUX.files.items())

SOURCE = SMALL_FLUX.location.origin(SMALL_FLUX.files[DEFAULT])


@pytest.fixture
def pipe():
    return demo.pipeline()


def has_distilled_weights(transformer, file=FILE):
    state, values = transformer.state_dict(), load_file(file)
    return all(torch.equal(state[name], value.to(state[name].dtype)) for name, value in values.items())


def is_small_flux(transformer):
    return SMALL_FLUX.recognizer.recognizes(Model(transformer, transformer, {}))


def method_of(pipe):
    return clear.cost(pipe, demo.SIZE, demo.SIZE).method


def test_the_list_has_each_method_of_the_package():
    methods = {file.parent: read_record(file).method for file in packaged.WEIGHTS.rglob("clear_config.json")}
    assert methods == {(packaged.WEIGHTS / file).parent: method for method, file in SMALL_FLUX.files.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wherever_it_was_loaded_from(dtype, tmp_path):
    demo.pipeline(dtype).save_pretrained(tmp_path)
    loaded = [load_pretrained(DiffusionPipeline, folder, dtype=dtype) for folder in (demo.path(), tmp_path)]
    for pipe in (demo.pipeline(dtype), *loaded, loaded[0].transformer):
        before = snapshot(getattr(pipe, "transformer", pipe))
        clear.linearize(pipe)
        assert has_distilled_weights(getattr(pipe, "transformer", pipe))
        assert method_of(pipe) == DEFAULT
        assert_same(clear.restore(getattr(pipe, "transformer", pipe)), before)


@pytest.mark.parametrize(
    "settings",
    [{}, {"window": DEFAULT.window}, {"down_factor": DEFAULT.down_factor}, {"method": DEFAULT}],
    ids=["none", "window", "down_factor", "method"],
)
def test_settings_that_fit(pipe, settings):
    assert method_of(clear.linearize(pipe, **settings)) == DEFAULT


@pytest.mark.parametrize("method", SMALL_FLUX.files, ids=str)
def test_each_method_has_weights_of_its_own(pipe, method):
    clear.linearize(pipe, method=method)
    assert method_of(pipe) == method
    assert has_distilled_weights(pipe.transformer, packaged.WEIGHTS / SMALL_FLUX.files[method])


@pytest.mark.parametrize("settings", [{"window": 5}, {"down_factor": 3}, {"method": clear.methods.Swin(8)}], ids=str)
def test_settings_that_do_not_fit(pipe, settings):
    before = snapshot(pipe.transformer)
    some = "; ".join(re.escape(method.as_arguments()) for method in SMALL_FLUX.files)
    message = rf"no weights are published for .*; for the small FLUX there are some for {some}; .*None"
    with pytest.raises(ValueError, match=message):
        clear.linearize(pipe, **settings)
    assert_same(pipe.transformer, before)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("auto", "these weights are in the package"),
        (FILE.parent, f"{FILE.parent} is on this machine"),
        (FILE, f"{FILE.name} is on this machine"),
        (None, "weights=None keeps the model's own"),
    ],
)
def test_what_is_not_on_the_hub_has_no_revision(pipe, weights, reason):
    before = snapshot(pipe.transformer)
    with pytest.raises(ValueError, match=rf"revision='v2' is a version on the Hub, and .*{reason}; leave revision out"):
        clear.linearize(pipe, weights=weights, revision="v2")
    assert_same(pipe.transformer, before)


def test_a_pipeline_saved_while_it_was_linearized_has_no_revision(pipe, tmp_path):
    clear.linearize(pipe).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"revision='v2' is .* weights='auto' keeps those that this pipeline was saved"
    ):
        clear.linearize(type(pipe).from_pretrained(tmp_path), revision="v2")


def test_while_it_is_linearized(pipe):
    clear.linearize(pipe, 4, weights=None)
    clear.linearize(pipe)
    assert has_distilled_weights(pipe.transformer)
    clear.linearize(pipe)
    assert method_of(pipe) == DEFAULT


def test_with_a_lora(pipe):
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_mlp"]))
    assert method_of(clear.linearize(pipe)) == DEFAULT


@pytest.mark.parametrize("name", ["x_embedder.bias", "transformer_blocks.1.attn.to_q.weight", "proj_out.weight"])
def test_a_fine_tune_is_another_model(pipe, name):
    with torch.no_grad():
        pipe.transformer.get_parameter(name).view(-1)[3] += 0.01
    before = snapshot(pipe.transformer)
    with pytest.raises(ValueError, match="finds none for this model, a FluxTransformer2DModel"):
        clear.linearize(pipe)
    assert_same(pipe.transformer, before)


def test_a_fine_tune_that_is_linearized_is_another_model(pipe):
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].attn.to_q.weight[0, 0] += 0.01
    clear.linearize(pipe, weights=FILE.parent)
    with pytest.raises(ValueError, match="finds none for this model"):
        clear.linearize(pipe)


def test_the_same_values_with_another_config_are_another_model(pipe):
    pipe.transformer.register_to_config(axes_dims_rope=[12, 12, 8])
    assert not is_small_flux(pipe.transformer)


def test_other_models():
    config = dict(demo.pipeline().transformer.config)
    for other in (FluxTransformer2DModel(**config), FluxTransformer2DModel.from_config({**config, "num_layers": 3})):
        assert not is_small_flux(other)
    for family in families.FAMILIES.values():
        assert not is_small_flux(family.transformer())
    with torch.device("meta"):
        assert not is_small_flux(FluxTransformer2DModel(**config))


def test_pooled_weights_of_a_pipeline_that_was_saved_whole_are_found_by_the_name_in_the_error(pipe, tmp_path):
    clear.linearize(pipe, down_factor=4).save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give weights= a directory") as refused:
        clear.linearize(loaded)
    (name,) = re.findall(r"weights='(\S+)', which it had", str(refused.value))
    assert name == "small_flux_clear_window_8_down_4"
    clear.linearize(loaded, weights=name)
    assert method_of(loaded) == clear.methods.Clear(8, 4)


def test_what_it_is_saved_as(pipe, tmp_path):
    """As from the folder, but with a name that means the same on any machine."""
    clear.linearize(pipe)
    assert find_target(pipe).hook.weights == "auto"
    assert f"auto, from {SOURCE}" in str(clear.info(pipe))
    pipe.save_pretrained(tmp_path / "whole")
    loaded = FluxPipeline.from_pretrained(tmp_path / "whole")
    assert loaded.transformer.config["clear_attn"]["weights"] == SOURCE
    assert method_of(clear.linearize(loaded)) == DEFAULT
    clear.save_pretrained(pipe, tmp_path / "own")
    assert read_record(tmp_path / "own" / "clear_config.json").source == SOURCE
    assert method_of(clear.linearize(demo.pipeline(), weights=tmp_path / "own")) == DEFAULT
