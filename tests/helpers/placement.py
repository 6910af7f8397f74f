"""Ways to offload or cast a transformer."""

import contextlib

import accelerate
import pytest
import torch

from clear_attn.models._diffusers import diffusers_version, hooks_in


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


class _Stream:
    def synchronize(self):
        pass


class _Accelerator:
    """In place of torch.cuda."""

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self):
        return _Stream()


def by_group_in_a_stream(transformer, monkeypatch):
    """Offload by groups as with `use_stream=True`, but to a copy on the CPU in place of a GPU."""
    by_group("block_level")(transformer)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    groups = {id(hook.group): hook.group for hook in hooks_in(transformer) if hasattr(hook, "group")}.values()
    for group in groups:
        group.stream, group._torch_accelerator_module = _Stream(), _Accelerator()
        group._transfer_tensor_to_device = lambda tensor, source, stream: setattr(tensor, "data", source.clone())
        group.cpu_param_dict = group._init_cpu_param_dict()
        group.offload_()
    return transformer
