"""Calls of `highres` that several tests use."""

import contextlib

import numpy as np
from PIL import Image

import clear_attn as clear
from clear_attn.cascade.pipelines import find_cascade_target
from clear_attn.cascade.work import run_sigmas
from tests.helpers.snapshots import assert_same, snapshot

PROMPT = "a red circle on a blue ground, at the top left"
# Small images and few steps: these tests do not judge the images.
BASE = clear.Base(height=64, width=64, steps=2)
STAGE = clear.Stage(steps=4, strength=0.5)
FAST = {"window": 4, "weights": None, "seed": 5, "base": BASE, "stages": STAGE}


def draw(pipe, height=128, width=128, **changes):
    arguments = {**FAST, **changes}
    if "image" in arguments:
        del arguments["base"]
    return clear.highres(pipe, PROMPT, height=height, width=width, **arguments)


@contextlib.contextmanager
def recorded_calls(transformer):
    """Record the number of images in each call of a transformer, by keyword or position, while it draws."""
    images = []

    def record(module, args, kwargs):
        images.append(len(args[0] if args else kwargs["hidden_states"]))

    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield images
    finally:
        handle.remove()


def assert_work_is_of_the_run(pipe, **settings):
    """Check that a plan's work counts the sigmas, and the images in each call, of a run that it draws."""
    sigmas = []

    def step_end(runner, step, timestep, tensors):
        sigmas.append(float(timestep) / 1000)
        return tensors

    with recorded_calls(pipe.transformer) as images:
        plan = draw(pipe, callback_on_step_end=step_end, **settings).plan
    target = find_cascade_target(pipe)
    expected = [sigma for number in range(len(plan.drawn)) for sigma in run_sigmas(target, plan, number)]
    np.testing.assert_allclose(sigmas, expected, rtol=1e-5)
    passes = [target.passes(each.guidance, plan.options) for each in plan.drawn]
    steps = [run.steps for run in plan.work(pipe).runs]
    assert images == [
        each.batch for each, number in zip(passes, steps, strict=True) for _ in range(number * each.number)
    ]
    for number, each in enumerate(plan.drawn):
        one = clear.cost(
            target.pipe, *each.size, window=plan.window, text_tokens=plan.options.get("max_sequence_length")
        )
        step = one.step_flops if number else one.dense_step_flops
        assert plan.work(pipe).runs[number].flops == step * passes[number].batch * passes[number].number * steps[number]


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8))


def same(first, second):
    return np.array_equal(np.asarray(first), np.asarray(second))


def everything(pipe):
    return (
        snapshot(pipe.transformer),
        pipe.transformer.pos_embed.theta,
        pipe.vae.use_tiling,
        dict(pipe.scheduler.config),
    )


def assert_as_it_was(pipe, before):
    assert_same(pipe.transformer, before[0])
    assert everything(pipe)[1:] == before[1:]
