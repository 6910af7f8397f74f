"""The size and text length that a pipeline draws by default."""

import inspect
import sys
import types

import pytest
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, FluxImg2ImgPipeline, FluxPipeline
from diffusers import AutoPipelineForImage2Image as AutoPipeline

import clear_attn as clear
from clear_attn import demo
from clear_attn.models.pipeline_defaults import default_text_tokens, longest_text, native_side
from tests.helpers import dummy_models


def pipeline(transformer=None, vae=None, **attributes):
    """As diffusers' pipelines are, with the defaults of FLUX.1's."""
    return types.SimpleNamespace(
        transformer=types.SimpleNamespace(config=transformer or {}), vae=vae, **{"vae_scale_factor": 8, **attributes}
    )


@pytest.mark.parametrize(
    ("transformer", "vae", "side"),
    [
        ({}, lambda: AutoencoderKL(sample_size=512), 512),
        ({"sample_size": 64}, lambda: AutoencoderKL(sample_size=256), 512),  # DiT's autoencoder is of another model
        ({}, AutoencoderKL, 1024),  # 32 is the default of the class
        ({}, lambda: AutoencoderKL(sample_size=32), 1024),  # as it is saved
        ({}, AutoencoderTiny, 1024),
        ({}, lambda: None, 1024),
    ],
)
def test_native_side(transformer, vae, side):
    pipe = pipeline(transformer, vae(), default_sample_size=128)
    assert native_side(pipe, pipe.transformer) == side


def test_native_side_by_the_default_of_the_call():
    """As in Krea 2."""

    def call(height=768):
        return None

    pipe = pipeline(__call__=call)
    assert native_side(pipe, pipe.transformer) == 768


def test_of_stable_diffusion_3():
    pipe = dummy_models.sd3_pipeline()
    assert native_side(pipe, pipe.transformer) == pipe.default_sample_size * pipe.vae_scale_factor == 64


class TestSmallFlux:
    @pytest.fixture(params=["packaged", "diffusers", "saved", "saved in diffusers"])
    def loaded(self, request, tmp_path):
        demo.pipeline().save_pretrained(tmp_path)
        return {
            "packaged": demo.pipeline,
            "diffusers": lambda: DiffusionPipeline.from_pretrained(demo.path()),
            "saved": lambda: type(demo.pipeline()).from_pretrained(tmp_path),
            "saved in diffusers": lambda: DiffusionPipeline.from_pretrained(tmp_path),
        }[request.param]()

    def test_is_known_wherever_it_is_loaded_from(self, loaded):
        assert native_side(loaded, loaded.transformer) == demo.SIZE
        assert longest_text(loaded) == default_text_tokens(loaded) == demo.TEXT_TOKENS
        assert clear.cost(loaded, demo.SIZE, demo.SIZE).text_tokens == demo.TEXT_TOKENS

    def test_saves_a_pipeline_of_diffusers(self, tmp_path):
        demo.pipeline().save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert type(loaded) is FluxPipeline
        own, usual = ({file.relative_to(folder) for file in folder.rglob("*.*")} for folder in (tmp_path, demo.path()))
        assert own - usual <= {file for file in own if file.parent.name.startswith("tokenizer")}

    def test_other_pipelines_are_made_from_it(self):
        pipe = demo.pipeline()
        assert type(AutoPipeline.from_pipe(pipe)) is type(FluxImg2ImgPipeline.from_pipe(pipe)) is FluxImg2ImgPipeline
        assert default_text_tokens(FluxImg2ImgPipeline.from_pipe(pipe)) == demo.TEXT_TOKENS

    @pytest.mark.parametrize("method", ["__call__", "encode_prompt"])
    def test_has_the_signature_of_diffusers(self, method):
        own, usual = (inspect.signature(getattr(each, method)) for each in (type(demo.pipeline()), FluxPipeline))
        changed = {name for name in usual.parameters if own.parameters[name] != usual.parameters[name]}
        assert (list(own.parameters), changed) == (list(usual.parameters), {"max_sequence_length"})


def test_text_lengths():
    def call(max_sequence_length=256):
        return None

    tokenizers = [types.SimpleNamespace(model_max_length=limit) for limit in (77, int(1e30))]
    plain = pipeline(components={}, __call__=call)
    assert (longest_text(plain), default_text_tokens(plain)) == (sys.maxsize, 256)
    parts = {"tokenizer": tokenizers[0], "tokenizer_2": tokenizers[1]}
    assert default_text_tokens(pipeline(components=parts, __call__=call, **parts)) == 256
    parts["tokenizer_2"] = tokenizers[0]
    assert default_text_tokens(pipeline(components=parts, __call__=call, **parts)) == 77
    parts["tokenizer_2"] = None  # the text is given as embeddings
    assert default_text_tokens(pipeline(components=parts, __call__=call, **parts)) == 256
    assert default_text_tokens(pipeline(components={}, __call__=lambda prompt: None)) is None
