"""The check that all ranks got the same call, in threads."""

import threading

import pytest
import torch

from clear_attn.parallel.consistency import FEW, TOLERANCE, check_same


class Ranks:
    """Ranks in threads, which exchange values in `compare` as a process group would."""

    def __init__(self, count):
        self.barrier, self.values = threading.Barrier(count, timeout=60), [None] * count

    def rank(self, rank):
        ranks = self

        class Communicator:
            names = tuple(range(10, 10 + len(ranks.values)))

            def compare(self, own):
                ranks.values[rank] = own
                ranks.barrier.wait()
                gathered = torch.stack(ranks.values)
                ranks.barrier.wait()
                return gathered

        return Communicator()


def check(calls, settings=None):
    """Return the error of each rank, or None."""
    ranks, errors = Ranks(len(calls)), [None] * len(calls)

    def work(rank):
        try:
            check_same(ranks.rank(rank), calls[rank], (settings or ["same"] * len(calls))[rank])
        except ValueError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def call_of(**changes):
    torch.manual_seed(0)
    return {"hidden_states": torch.randn(2, 40, 8), "timestep": torch.tensor([0.7]), "scale": 1.0, **changes}


def test_equal_calls_pass():
    assert check([call_of(), call_of(), call_of()]) == [None] * 3


def test_rounding_of_another_device_passes():
    call = call_of()
    close = call["hidden_states"] + 1e-4 * TOLERANCE * torch.randn(2, 40, 8)
    assert check([call, {**call, "hidden_states": close}]) == [None, None]


def test_equal_nan_values_pass():
    call = call_of(timestep=torch.tensor([torch.nan]))
    assert check([call, call]) == [None, None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": 2.0}, "rank 10's ['scale'] is 1.0, rank 11's ['scale'] is 2.0"),
        ({"timestep": torch.tensor([0.70001])}, "['timestep'] of rank 11 is not rank 10's"),
        ({"hidden_states": torch.randn(2, 40, 8)}, "['hidden_states'] of rank 11 is not rank 10's"),
        ({"hidden_states": torch.randn(2, 41, 8)}, "rank 11's ['hidden_states'] is [2, 41, 8]"),
    ],
)
def test_all_ranks_raise_the_same_error(change, words):
    assert call_of()["hidden_states"].numel() > FEW
    errors = check([call_of(), call_of(**change), call_of()])
    assert all(words in error for error in errors), errors


def test_other_settings_are_a_difference():
    errors = check([call_of(), call_of()], ["window 8", "window 16"])
    assert all("rank 10's window 8, rank 11's window 16" in error for error in errors)
