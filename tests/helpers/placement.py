"""Ways to offload or cast a transformer."""

import accelerate
import pytest
import torch

from clear_attn.models._diffusers import diffusers_version


def by_group(level):
    def offload(transformer):
        if diffusers_version() < (0, 41) and not torch.accelerator.is_available():
            pytest.skip("group offload needs an accelerator before diffusers 0.41")
        transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_type=level,
            num_blocks_per_group=1 if level == "block_level" else None,
        )

    return offload


def as_a_whole(transformer):
    accelerate.cpu_offload_with_hook(transformer, execution_device="cpu")


def to_eight_bits(transformer):
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def align(transformer):
    """Copy what was loaded from a file to where torch allocates it: alignment decides over last bits."""
    for parameter in transformer.parameters():
        parameter.data = parameter.data.clone()


def nothing(transformer):
    pass
