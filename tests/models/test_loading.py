"""Loading pipelines: modular ones come with their components, as ordinary ones where diffusers has such."""

import diffusers
import pytest
import torch

from clear_attn.models.loading import as_ordinary, load_pipeline
from tests.helpers import dummy_models
from tests.helpers.modular_pipelines import MODULAR, needs_modular_pipelines
from tests.helpers.snapshots import snapshot

ORDINARY = {
    "FLUX.1": "FluxPipeline",
    "FLUX.2 klein": "Flux2KleinPipeline",
    "FLUX.2 klein base, a reference image": "Flux2KleinPipeline",
    "Qwen-Image": "QwenImagePipeline",
    "Krea 2": "Krea2Pipeline",
    "Z-Image": "ZImagePipeline",
    "Stable Diffusion 3": "StableDiffusion3Pipeline",
}


def with_all_components(kind):
    """Return a pipeline with its blocks for text, too, and any tokenizer where the tests give embeddings."""
    pipe, empty = kind.pipeline(), kind.empty()
    if not kind.encodes_text:
        empty = getattr(diffusers, kind.name)()
        text_encoder = kind.ordinary().components["text_encoder"]
        empty.update_components(text_encoder=text_encoder, tokenizer=dummy_models.small_sd3().tokenizer_3)
        pipe.text_encoder, pipe.tokenizer = empty.text_encoder, empty.tokenizer
    components = {name: part for name, part in pipe.components.items() if part is not None}
    empty.update_components(**{name: part for name, part in components.items() if name in empty.component_names})
    return empty


@needs_modular_pipelines
@pytest.mark.parametrize("name", ORDINARY)
def test_a_modular_pipeline_becomes_an_ordinary_one(name):
    modular = with_all_components(MODULAR[name])
    pipe = as_ordinary(modular)
    assert type(pipe) is getattr(diffusers, ORDINARY[name])
    assert pipe.transformer is modular.transformer
    assert pipe.vae is modular.vae


@needs_modular_pipelines
@pytest.mark.parametrize("name", ["FLUX.3", "FLUX.3 distilled", "FLUX.1 Kontext"])
def test_a_modular_pipeline_without_an_ordinary_one(name):
    pipe = MODULAR[name].pipeline()
    assert as_ordinary(pipe) is pipe


@needs_modular_pipelines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_modular_folder(tmp_path, dtype):
    for name, cls in (("FLUX.1", "FluxPipeline"), ("FLUX.3", "Flux3ModularPipeline")):
        kind, folder = MODULAR[name], tmp_path / name
        kind.pipeline().save_pretrained(str(folder), overwrite_modular_index=True)
        pipe = load_pipeline(folder, dtype)
        assert type(pipe).__name__ == cls
        assert (pipe.transformer.dtype, pipe.vae.dtype) == (dtype, dtype)


@needs_modular_pipelines
def test_an_ordinary_folder(tmp_path):
    MODULAR["FLUX.1"].ordinary().save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path, torch.float32)
    assert type(pipe) is diffusers.FluxPipeline
    before = snapshot(MODULAR["FLUX.1"].ordinary().transformer)["state"]
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match=r"revision='v2' is a version on the Hub, and .* is on this machine; leave"):
        load_pipeline(tmp_path, torch.float32, "v2")


def test_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(OSError, match=r"no file named model_index\.json"):
        load_pipeline(tmp_path, torch.float32)
