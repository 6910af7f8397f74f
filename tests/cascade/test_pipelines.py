"""The pipelines of each model in a cascade: their images are those of diffusers' pipelines, one after the other."""

import functools
import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from PIL import Image

import clear_attn as clear
from clear_attn.cascade.latents import unpack
from clear_attn.models._diffusers import diffusers_version
from tests.helpers import dummy_models, dummy_pipelines
from tests.helpers.large_images import PROMPT, assert_work_is_of_the_run, draw, noise, same
from tests.helpers.modular_pipelines import MODULAR, needs_modular_pipelines
from tests.helpers.snapshots import assert_same, snapshot

NEGATIVE = "blue"
# Of the latents of an autoencoder with four channels.
MEAN, STD = [0.3, -0.2, 0.1, 0.5], [0.5, 2.0, 1.5, 0.8]
STAGE = clear.Stage(steps=4, strength=0.5, ntk_factor=1, proportional=False, shift=None, guidance=2.0)


class Kind(NamedTuple):
    """A model that `highres` draws with.

    Attributes:
        make: makes its pipeline.
        image_to_image: the name of diffusers' image-to-image pipeline, if there is one.
        side: of the base image in pixels; the stage doubles it.
        guidance: the keyword of the guidance scale.
        embeddings: the shape of a text's embeddings where the pipeline has no text encoder, and whether it has a mask.
        options: further keywords.
        first_version: of diffusers.
    """

    make: Any
    image_to_image: str | None = None
    side: int = 64
    guidance: str = "guidance_scale"
    embeddings: tuple[tuple[int, ...], bool] | None = None
    options: dict[str, Any] = {"negative_prompt": NEGATIVE}  # noqa: RUF012
    first_version: tuple[int, int] = (0, 36)


KINDS = {
    "chroma": Kind(lambda: dummy_pipelines.chroma(diffusers.ChromaPipeline), "ChromaImg2ImgPipeline"),
    "qwen": Kind(
        lambda: dummy_pipelines.qwen(diffusers.QwenImagePipeline),
        "QwenImageImg2ImgPipeline",
        guidance="true_cfg_scale",
        embeddings=((1, 9, 12), True),
        first_version=(0, 39),
    ),
    "z_image": Kind(
        dummy_pipelines.z_image, "ZImageImg2ImgPipeline", embeddings=((9, 12), False), first_version=(0, 42)
    ),
    "flux2": Kind(dummy_pipelines.flux2, side=32, embeddings=((1, 9, 12), False), options={}, first_version=(0, 37)),
    "krea2": Kind(dummy_pipelines.krea2, embeddings=((1, 9, 3, 12), True), first_version=(0, 39)),
}


def each_kind(test, *, from_image=(True, False)):
    present = {name: kind for name, kind in KINDS.items() if kind.first_version <= diffusers_version()}
    chosen = {name: kind for name, kind in present.items() if bool(kind.image_to_image) in from_image}
    return pytest.mark.parametrize("kind", chosen.values(), ids=chosen)(test)


each_from_images = functools.partial(each_kind, from_image=(True,))
each_from_latents = functools.partial(each_kind, from_image=(False,))


@pytest.fixture
def make(monkeypatch):
    """Make a kind's pipeline, whose text encoder gives random embeddings of each text if it has none."""

    def made(kind):
        pipe = kind.make()
        if "latents_mean" in pipe.vae.config:
            pipe.vae.register_to_config(latents_mean=MEAN, latents_std=STD)
        if hasattr(pipe.vae, "bn"):
            pipe.vae.bn.running_mean.uniform_(-0.5, 0.5)
            pipe.vae.bn.running_var.uniform_(0.5, 2)
        classes = {type(pipe), getattr(diffusers, kind.image_to_image or type(pipe).__name__)}
        for cls in classes if kind.embeddings else ():
            monkeypatch.setattr(cls, "encode_prompt", embed(cls.encode_prompt, *kind.embeddings))
        return pipe

    return made


def embed(plain, shape, masked):
    def captions(self, prompt, negative_prompt=None, do_classifier_free_guidance=True, **kwargs):
        texts = [prompt], [negative_prompt] if do_classifier_free_guidance else []
        rngs = [[torch.Generator().manual_seed(len(str(text))) for text in each] for each in texts]
        return tuple([torch.randn(shape, generator=rng) for rng in each] for each in rngs)

    def encode_prompt(self, *args, prompt=None, prompt_embeds=None, **kwargs):
        rng = torch.Generator().manual_seed(len(str(prompt)))
        mask = {"prompt_embeds_mask": torch.ones(1, shape[1], dtype=torch.bool)} if masked else {}
        return plain(self, prompt="", prompt_embeds=torch.randn(shape, generator=rng), **{**kwargs, **mask})

    return captions if len(shape) == 2 else encode_prompt


def settings(kind, **changes):
    base = clear.Base(height=kind.side, width=kind.side, steps=2, guidance=3.0)
    size = {"height": 2 * kind.side, "width": 2 * kind.side}
    return {**size, "base": base, "stages": STAGE, **kind.options, **changes}


def call(kind, scale, side, seed):
    return {
        "height": side,
        "width": side,
        kind.guidance: scale,
        "generator": torch.Generator().manual_seed(seed),
        "max_sequence_length": 24,
        **kind.options,
    }


@each_from_images
def test_images_are_those_of_diffusers_pipelines_in_sequence(kind, make):
    pipe = make(kind)
    from_image = getattr(diffusers, kind.image_to_image)
    before = snapshot(pipe.transformer)
    result = draw(pipe, **settings(kind))
    assert_same(pipe.transformer, before)
    base = pipe(prompt=PROMPT, num_inference_steps=2, **call(kind, 3.0, kind.side, 5)).images[0]
    assert same(result.images[0], base)
    clear.linearize(pipe, 4, weights=None)
    enlarged = base.resize((2 * kind.side,) * 2, Image.Resampling.LANCZOS)
    drawn = from_image(**pipe.components)(
        PROMPT, image=enlarged, strength=0.5, num_inference_steps=4, **call(kind, 2.0, 2 * kind.side, 6)
    ).images[0]
    assert same(result.image, drawn)
    assert not same(
        result.image,
        draw(pipe, window=None, weights="auto", **settings(kind, stages=replace(STAGE, guidance=3.0))).image,
    )


class Calls:
    """Record the image tokens and the timestep of each call of a transformer."""

    def __init__(self, transformer):
        self.tokens, self.sigmas = [], []
        transformer.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    def __call__(self, module, args, kwargs):
        self.tokens.append(kwargs["hidden_states"])
        self.sigmas.append(kwargs["timestep"].item())


def encoded(pipe, image):
    """Return an image's latents as tokens of 2 x 2, written again."""
    pixels = pipe.image_processor.preprocess(image)
    if isinstance(pipe, diffusers.Flux2KleinPipeline):
        latents = pipe._encode_vae_image(pixels, None)
        return pipe._pack_latents(latents)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    latents = (pipe.vae.encode(pixels[:, :, None]).latent_dist.mean[0, :, 0] - mean) / std
    return latents.unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)[None]


@each_from_latents
@pytest.mark.parametrize("shift", [None, 3.0])
@torch.no_grad()
def test_a_stage_starts_from_noised_latents(kind, shift, make):
    """At the noise that the pipeline has in the middle of its own schedule."""
    kind = kind._replace(options={})
    pipe, image = make(kind), noise(kind.side, kind.side)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=True)
    whole, stage = Calls(pipe.transformer), replace(STAGE, shift=shift, guidance=0.0)
    pipe(prompt=PROMPT, num_inference_steps=4, **call(kind, 0.0, 2 * kind.side, 6))
    drawn = Calls(pipe.transformer)
    draw(pipe, image=image, **{**settings(kind, stages=stage), "base": None})
    assert len(drawn.sigmas) == 2
    assert (drawn.sigmas == whole.sigmas[2:4]) == (shift is None)
    clean = encoded(pipe, image.resize((2 * kind.side,) * 2, Image.Resampling.LANCZOS))
    added = (drawn.tokens[0] - (1 - drawn.sigmas[0]) * clean) / drawn.sigmas[0]
    torch.testing.assert_close(added, packed_noise(pipe, clean), atol=1e-5, rtol=0)


def packed_noise(pipe, tokens):
    """Return the noise of seed 6 as tokens, as the pipeline draws it."""
    rng, side = torch.Generator().manual_seed(6), int(tokens.shape[1] ** 0.5)
    random = torch.randn((1, tokens.shape[2] // 4, 2 * side, 2 * side), generator=rng)
    return random.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


@each_from_latents
def test_a_stage_that_starts_from_noise_alone_is_text_to_image(kind, make):
    pipe = make(kind)
    stage = replace(STAGE, strength=1.0)
    starts = [noise(kind.side, kind.side, seed) for seed in range(2)]
    first, second = (draw(pipe, image=start, **{**settings(kind, stages=stage), "base": None}) for start in starts)
    assert same(first.image, second.image)
    clear.linearize(pipe, 4, weights=None)
    drawn = pipe(prompt=PROMPT, num_inference_steps=4, **call(kind, 2.0, 2 * kind.side, 6)).images[0]
    assert drawn.size == first.image.size
    if not isinstance(pipe, diffusers.Flux2KleinPipeline):  # which draws its noise in another order
        assert same(first.image, drawn)


@each_kind
@pytest.mark.parametrize("change", [{"low_resolution_guidance": 1}, {"proportional": True}])
def test_settings_of_a_stage_take_effect(kind, change, make):
    pipe, start = make(kind), {"image": noise(kind.side, kind.side), "base": None}
    plain = draw(pipe, **{**settings(kind), **start})
    assert not same(draw(pipe, **{**settings(kind, stages=replace(STAGE, **change)), **start}).image, plain.image)


@each_kind
def test_runs_are_recorded_and_continued(kind, make):
    pipe, lasts = make(kind), []
    guided = replace(STAGE, shift=3.0, stepwise_guidance=clear.StepwiseGuidance())

    def stop(result):
        raise KeyboardInterrupt

    def keep(runner, step, timestep, tensors):
        lasts.append(tensors["latents"])
        return tensors

    with pytest.raises(clear.HighresInterrupted) as caught:
        draw(pipe, **settings(kind, stages=guided), callback_on_stage_end=stop, callback_on_step_end=keep)
    kept = caught.value.result
    recording = kept.runs[0]
    assert len(recording.predictions) == 2
    torch.testing.assert_close(recording.prediction(0.0), unpack(lasts[-1], recording.size).float(), atol=1e-4, rtol=0)
    drawn = draw(pipe, **settings(kind, stages=guided))
    assert same(draw(pipe, **settings(kind, stages=guided), resume=kept).image, drawn.image)
    continued = draw(pipe, **settings(kind, stages=replace(STAGE, shift=3.0, continues=True)))
    assert continued.finished
    images = [draw(pipe, **settings(kind, stages=replace(STAGE, shift=3.0))), drawn, continued]
    assert not any(same(first.image, second.image) for first, second in itertools.combinations(images, 2))


@needs_modular_pipelines
@pytest.mark.parametrize("name", ["FLUX.1", "Stable Diffusion 3"])
def test_a_modular_pipeline_gives_the_image_of_an_ordinary_one(name):
    kind = MODULAR[name]
    pipe, ordinary = kind.pipeline(), kind.ordinary()
    before = snapshot(pipe.transformer)
    assert same(draw(pipe).image, draw(ordinary).image)
    assert_same(pipe.transformer, before)
    clear.linearize(pipe, 4, weights=None)
    assert draw(pipe, window=None, weights="auto").plan.window == 4
    assert clear.is_linearized(pipe)


@needs_modular_pipelines
def test_components_of_a_modular_pipeline_that_are_not_loaded():
    pipe = MODULAR["FLUX.1"].pipeline()
    pipe.unload_components(["vae", "tokenizer_2"])
    with pytest.raises(
        RuntimeError, match=r"its vae, tokenizer_2 yet; call pipe.load_components\(\['vae', 'tokenizer_2'\]\)"
    ):
        draw(pipe)


@needs_modular_pipelines
def test_modular_pipelines_of_other_tasks_are_refused():
    with pytest.raises(TypeError, match="highres does not support a FluxKontextModularPipeline"):
        draw(MODULAR["FLUX.1 Kontext"].pipeline())


@each_kind
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_work_counts_each_forward_pass_at_its_sigma(kind, guidance, dynamic, make):
    pipe = make(kind)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic, max_shift=1.7)
    given = settings(kind, stages=replace(STAGE, guidance=guidance), max_sequence_length=24)
    assert_work_is_of_the_run(pipe, **given)


@pytest.mark.skipif(diffusers_version() < KINDS["qwen"].first_version, reason="it has no Qwen-Image as it is now")
def test_work_counts_one_pass_without_a_negative_prompt(make):
    assert_work_is_of_the_run(make(KINDS["qwen"]), **settings(KINDS["qwen"]) | {"negative_prompt": None})


@each_from_latents
def test_a_distilled_model_is_drawn_with_as_one(kind, make):
    pipe = make(kind)
    pipe.register_to_config(is_distilled=True)
    assert_work_is_of_the_run(pipe, **settings(kind))


@pytest.mark.parametrize("options", [{}, {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.0}], ids=["plain", "guided"])
def test_work_counts_the_passes_of_flux(options):
    assert_work_is_of_the_run(dummy_models.random_flux(), stages=STAGE, **options)


def test_work_counts_one_pass_of_flux2_dev(make):
    kind = KINDS["flux2"]._replace(make=dummy_pipelines.flux2_dev)
    assert_work_is_of_the_run(make(kind), **settings(kind))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_work_counts_the_passes_of_sd3(guidance):
    assert_work_is_of_the_run(dummy_models.small_sd3(), stages=replace(STAGE, guidance=guidance))


def test_work_needs_a_scheduler_that_takes_sigmas(make):
    kind = KINDS["chroma"]
    pipe = make(kind)
    plan = draw(pipe, **settings(kind)).plan
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="a FlowMatchHeunDiscreteScheduler takes none; give the pipeline a FlowMatch"):
        plan.work(pipe)
