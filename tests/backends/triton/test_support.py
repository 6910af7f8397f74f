import importlib.util
from typing import NamedTuple

import pytest
import torch

import clear_attn as clear
from clear_attn.backends.triton import support
from tests.helpers import dummy_models

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Chip(NamedTuple):
    major: int = 9
    minor: int = 0
    gcnArchName: str = ""  # noqa: N815


@pytest.fixture
def machine(monkeypatch):
    """Sets up a machine that this is not."""

    def set_up(chip=None, hip=None, triton=(3, 6)):
        support._unsupported_device.cache_clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton and object())
        monkeypatch.setattr(support, "triton_version", lambda: triton)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: chip is not None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)

    yield set_up
    support._unsupported_device.cache_clear()


@pytest.mark.parametrize(
    ("device", "arguments", "reason"),
    [
        (GPU, {"chip": Chip(), "triton": None}, "Triton is not installed"),
        (GPU, {"chip": Chip(), "triton": (3, 5)}, "needs Triton 3.6 or later, found 3.5"),
        (GPU, {"chip": Chip(7, 5)}, "was compiled for sm_80, .* and this GPU is sm_75"),
        (GPU, {"chip": Chip(gcnArchName="gfx1100:xnack-"), "hip": "7.0"}, "this GPU is gfx1100"),
        (CPU, {}, "on a CPU; set TRITON_INTERPRET=1 before Python starts"),
        (torch.device("mps"), {}, "not tested on devices of type 'mps'"),
    ],
)
def test_reasons(machine, device, arguments, reason):
    machine(**arguments)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(support.unsupported_reason(device, torch.bfloat16, 128, False))


@pytest.mark.parametrize(
    ("chip", "hip"), [(Chip(8, 6), None), (Chip(12, 0), None), (Chip(gcnArchName="gfx942:sramecc+"), "7.0")]
)
def test_where_the_kernels_run(machine, chip, hip):
    machine(chip, hip)
    assert support.unsupported_reason(GPU, torch.float16, 64, True) is None


def test_the_interpreter_is_for_cpus(machine, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    machine(Chip())
    assert "unset it" in support.unsupported_reason(GPU, torch.float16, 64, True)
    assert support.unsupported_reason(CPU, torch.float16, 64, True) is None


def test_linearize_names_the_reason_and_changes_nothing(machine):
    machine(triton=None)
    transformer = dummy_models.flux_transformer()
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run on this machine: .*; use backend='auto'"):
        clear.linearize(transformer, weights=None, backend="triton")
    assert not clear.is_linearized(transformer)
