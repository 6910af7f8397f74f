"""Whether memory can suffice."""

import re
import warnings

import accelerate
import pytest
import torch

import clear_attn as clear
from clear_attn.cascade import memory_check as fits
from clear_attn.profiling.memory import GIB, Bytes, weight_bytes
from tests.helpers.large_images import STAGE, assert_as_it_was, draw, everything


class TestMemory:
    def test_refuses_what_cannot_fit_and_warns_of_what_may_not(self, pipe, monkeypatch):
        memory = clear.cost(pipe, 128, 128, text_tokens=0).memory
        weights = memory.all_weights
        least = weights + max(memory.activations.least, memory.decode.least)
        likely = max(memory.activations.likely, memory.decode.likely)
        before = everything(pipe)
        monkeypatch.setattr(fits, "room", lambda device: (least - 1, least - 1))
        with pytest.raises(
            ValueError,
            match=r"128 x 128 px needs at least 0\.\d+ GiB with the .* draw a smaller picture or stage",
        ):
            draw(pipe)
        assert_as_it_was(pipe, before)
        monkeypatch.setattr(fits, "room", lambda device: (weights + likely, likely - 1))
        with pytest.warns(UserWarning, match="128 x 128 px will likely need"):
            draw(pipe)
        # The weights take their part of what a CPU has.
        monkeypatch.setattr(fits, "room", lambda device: (weights + likely - 1, weights + likely - 1))
        with pytest.warns(UserWarning, match="128 x 128 px will likely need"):
            draw(pipe)
        monkeypatch.setattr(fits, "room", lambda device: (weights + likely, weights + likely))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(pipe)

    def test_names_what_would_fit(self, pipe):
        device, work = torch.device("cuda"), {"transformer": Bytes(1000, 4000), "vae": Bytes(500, 2000)}
        transformer = weight_bytes(pipe.transformer)
        assert "smaller picture" in fits._remedy(pipe, device, work, 999)
        assert "enable_group_offload" in fits._remedy(pipe, device, work, transformer + 999)
        words = r"pipe\.enable_model_cpu_offload\(\) \(--offload\) would make room"
        assert re.match(words, fits._remedy(pipe, device, work, transformer + 1000))
        accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
        assert "enable_group_offload" in fits._remedy(pipe, device, work, transformer + 1000)

    def test_offloaded_models_count_at_their_turn(self, pipe):
        gpu, work = torch.device("cuda"), {"transformer": Bytes(1000, 4000), "vae": Bytes(500, 10**9)}
        assert fits.peak(pipe, gpu, work) == (1000, 10**9)
        assert fits.peak(pipe, torch.device("cpu"), work).least == fits.weights_on(pipe) + 1000
        for part in (pipe.transformer, pipe.vae):
            accelerate.cpu_offload_with_hook(part, execution_device="cpu")
        transformer, vae = weight_bytes(pipe.transformer), weight_bytes(pipe.vae)
        assert fits.peak(pipe, gpu, work) == (transformer + 1000, vae + 10**9)
        both = transformer + vae
        assert fits.peak(pipe, torch.device("cpu"), work).least == fits.weights_on(pipe) - both + transformer + 1000

    def test_weights_before_they_move(self, pipe, monkeypatch):
        weights = fits.weights_on(pipe)
        monkeypatch.setattr(fits, "room", lambda device: (10 * weights, weights - 1))
        with pytest.raises(ValueError, match=r"the weights take 0\.\d+ GiB, and cuda:0 has .* --offload"):
            fits.check_weights_fit(pipe, torch.device("cuda:0"))
        monkeypatch.setattr(fits, "room", lambda device: (10 * weights, weights))
        fits.check_weights_fit(pipe, torch.device("cuda:0"))

    def test_refuses_what_this_machine_cannot_hold(self, pipe):
        with pytest.raises(ValueError, match=r"524288 x 524288 px needs at least \d+\.\d GiB .* and cpu has \d+\.\d"):
            draw(pipe, 2**19, 2**19, stages=[STAGE])

    def test_room_of_this_machine(self):
        total, free = fits.room(torch.device("cpu"))
        assert GIB / 4 < free <= total
