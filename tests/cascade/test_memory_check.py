"""The check that the memory suffices, before drawing."""

import re
import warnings

import accelerate
import pytest
import torch

import clear_attn as clear
from clear_attn.cascade import memory_check as fits
from clear_attn.profiling import memory
from clear_attn.profiling.memory import Bytes, weight_bytes
from tests.helpers.large_images import STAGE, assert_as_it_was, draw, everything


class TestMemory:
    def test_refuses_what_cannot_fit_and_warns_if_it_may_not(self, pipe, monkeypatch):
        counted = clear.cost(pipe, 128, 128, text_tokens=0).memory
        weights = counted.all_weights
        least = weights + max(counted.activations.least, counted.decode.least)
        likely = max(counted.activations.likely, counted.decode.likely)
        before = everything(pipe)
        monkeypatch.setattr(fits, "available_memory", lambda device: (least - 1, least - 1))
        with pytest.raises(
            ValueError,
            match=r"128 x 128 px needs at least [\d.]+ MiB with the .* draw a smaller image or stage",
        ):
            draw(pipe)
        assert_as_it_was(pipe, before)
        monkeypatch.setattr(fits, "available_memory", lambda device: (weights + likely, likely - 1))
        with pytest.warns(UserWarning, match="128 x 128 px will likely need"):
            draw(pipe)
        # On a CPU, weights and activations share the same memory.
        monkeypatch.setattr(fits, "available_memory", lambda device: (weights + likely - 1, weights + likely - 1))
        with pytest.warns(UserWarning, match="128 x 128 px will likely need"):
            draw(pipe)
        monkeypatch.setattr(fits, "available_memory", lambda device: (weights + likely, weights + likely))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(pipe)

    def test_the_remedy_fits(self, pipe):
        device, work = torch.device("cuda"), {"transformer": Bytes(1000, 4000), "vae": Bytes(500, 2000)}
        transformer = weight_bytes(pipe.transformer)
        assert "smaller image" in fits._remedy(pipe, device, work, 999)
        assert "enable_group_offload" in fits._remedy(pipe, device, work, transformer + 999)
        words = r"call pipe\.enable_model_cpu_offload\(\) \(--offload\)"
        assert re.match(words, fits._remedy(pipe, device, work, transformer + 1000))
        accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
        assert "enable_group_offload" in fits._remedy(pipe, device, work, transformer + 1000)

    def test_offloaded_models_count_one_at_a_time(self, pipe):
        gpu, work = torch.device("cuda"), {"transformer": Bytes(1000, 4000), "vae": Bytes(500, 10**9)}
        assert memory.peak_memory(pipe, gpu, work) == (1000, 10**9)
        assert memory.peak_memory(pipe, torch.device("cpu"), work).least == memory.pipeline_bytes(pipe) + 1000
        for part in (pipe.transformer, pipe.vae):
            accelerate.cpu_offload_with_hook(part, execution_device="cpu")
        transformer, vae = weight_bytes(pipe.transformer), weight_bytes(pipe.vae)
        assert memory.peak_memory(pipe, gpu, work) == (transformer + 1000, vae + 10**9)
        both = transformer + vae
        assert (
            memory.peak_memory(pipe, torch.device("cpu"), work).least
            == memory.pipeline_bytes(pipe) - both + transformer + 1000
        )

    def test_weights_before_they_move(self, pipe, monkeypatch):
        weights = memory.pipeline_bytes(pipe)
        monkeypatch.setattr(fits, "available_memory", lambda device: (10 * weights, weights - 1))
        with pytest.raises(ValueError, match=r"the weights take [\d.]+ KiB, and cuda:0 has .* --offload"):
            fits.check_weights_fit(pipe, torch.device("cuda:0"))
        monkeypatch.setattr(fits, "available_memory", lambda device: (10 * weights, weights))
        fits.check_weights_fit(pipe, torch.device("cuda:0"))

    def test_refuses_more_than_the_memory_of_this_machine(self, pipe):
        with pytest.raises(ValueError, match=r"524288 x 524288 px needs at least [\d.]+ .iB .* and cpu has [\d.]+ .iB"):
            draw(pipe, 2**19, 2**19, stages=[STAGE])

    def test_available_memory(self):
        total, free = memory.available_memory(torch.device("cpu"))
        assert 2**30 / 4 < free <= total
