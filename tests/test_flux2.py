"""FLUX.2: what all families do, and what it has of its own: ids of four axes, layers that project all in one."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import clear_attn as clear
from clear_attn.distill.recipes import recipe_of
from tests import tiny
from tests.family import *  # noqa: F403  what holds of each family
from tests.plain import run


@pytest.fixture
def family():
    return tiny.FLUX2
