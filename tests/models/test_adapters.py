"""The registry of models: found by names of diffusers' classes, which are imported only when used."""

import contextlib
import inspect
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel

import clear_attn as clear
from clear_attn.models import ADAPTERS, adapter_for
from clear_attn.models._diffusers import diffusers_version
from clear_attn.models.class_names import is_exactly, is_instance
from tests.helpers import dummy_models
from tests.helpers.families import FAMILIES, each_family

MODELS = ("diffusers.models.transformers", "diffusers.models.controlnets", "diffusers.pipelines")


class Subclass(FluxTransformer2DModel):
    pass


def test_importing_the_package_imports_no_model_of_diffusers():
    code = f"import sys, clear_attn; print([name for name in sys.modules if name.startswith({MODELS})])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


@each_family()
def test_a_transformer_has_the_adapter_of_its_class(transformer):
    assert adapter_for(transformer).transformer_class == type(transformer).__name__


def test_every_adapter_is_tested_with_a_model():
    tested = {type(family.transformer()).__name__ for family in FAMILIES.values()}
    controlnets = {adapter.transformer_class for adapter in ADAPTERS if "ControlNet" in adapter.transformer_class}
    present = {adapter.transformer_class for adapter in ADAPTERS if adapter.first_version <= diffusers_version()}
    assert present <= tested | controlnets


def test_a_model_that_needs_a_later_diffusers(monkeypatch):
    adapter = adapter_for(dummy_models.qwen_transformer())
    monkeypatch.setattr(diffusers, "__version__", "0.39.0")
    adapter.check_version()
    monkeypatch.setattr(diffusers, "__version__", "0.38.2")
    words = (
        r"QwenImageTransformer2DModel is supported with diffusers 0\.39 and later, not with 0\.38, .*'diffusers>=0\.39"
    )
    with pytest.raises(TypeError, match=words):
        adapter.check_version()
    with pytest.raises(TypeError, match=words):
        clear.linearize(dummy_models.qwen_transformer(), 3, weights=None)
    adapter_for(dummy_models.flux_transformer()).check_version()


SIZES = [
    pytest.param(adapter, size, id=size.name)
    for adapter in ADAPTERS
    for size in adapter.architectures
    if adapter.first_version <= diffusers_version()
]


@pytest.mark.parametrize(("adapter", "size"), SIZES)
def test_a_size_is_refused_where_the_transformer_lacks_an_entry_of_its_config(adapter, size):
    known = inspect.signature(getattr(diffusers, adapter.transformer_class)).parameters
    later = size.first_version > diffusers_version()
    assert (not size.config.keys() <= known.keys()) == later
    with pytest.raises(TypeError, match=f"{size.name} is supported with") if later else contextlib.nullcontext():
        size.check_version()


# Pipelines that came later than their transformers, by the first version of diffusers.
LATER_PIPELINES = {"Flux2KleinPipeline": (0, 37)}


def test_every_named_class_exists_and_has_one_adapter():
    present = [adapter for adapter in ADAPTERS if adapter.first_version <= diffusers_version()]
    names = [adapter.transformer_class for adapter in present]
    assert len({getattr(diffusers, name) for name in names}) == len(names)
    for adapter in present:
        for pipelines in adapter.highres_pipelines:
            modular = () if diffusers_version() >= (0, 42) else pipelines.modular
            for name in {*pipelines.supported} - {*modular}:
                assert hasattr(diffusers, name) == (LATER_PIPELINES.get(name, (0, 0)) <= diffusers_version())
            names = [pipelines.text_to_image, pipelines.image_to_image]
            if LATER_PIPELINES.get(names[0], (0, 0)) <= diffusers_version():
                assert [cls.__name__ for cls in pipelines.classes()] == names


@pytest.mark.parametrize(
    "adapter", [each for each in ADAPTERS if each.training], ids=lambda each: each.transformer_class
)
def test_a_training_call_has_the_attention_keywords_where_the_adapter_reads_them(adapter):
    noisy, sigma, text, pooled = torch.zeros(1, 4, 4, 4), torch.ones(1), torch.zeros(1, 3, 8), torch.zeros(1, 8)
    text = {"text": text, "pooled": pooled, "mask": torch.ones(1, 3)}
    call = adapter.training.training_call(noisy, sigma, text, None, {"role": "student"})
    assert call[adapter.keywords] == {"role": "student"}


def test_subclasses_match_and_classes_of_the_same_name_do_not():
    names = ("FluxTransformer2DModel",)
    ours, namesake = Subclass.__new__(Subclass), type("FluxTransformer2DModel", (), {})()
    assert is_instance(ours, names)
    assert not is_exactly(ours, names)
    assert not is_instance(namesake, names)
    assert adapter_for(namesake) is None
