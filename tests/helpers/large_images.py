"""Calls of `highres` that several tests use."""

import numpy as np
from PIL import Image

import clear_attn as clear
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
