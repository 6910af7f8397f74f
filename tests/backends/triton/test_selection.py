import json
import logging
import pathlib

import pytest
import torch

from clear_attn.backends import selection, self_check, tiled
from clear_attn.backends.selection import TABLE, Backend, Candidates, Selection, choose_backend, select_backend
from clear_attn.backends.triton.configurations import CHOSEN

CPU = torch.device("cpu")
RESULTS = pathlib.Path(__file__).parents[3] / "benchmarks" / "results"


def nothing(name):
    return None


class TestTable:
    def test_the_reason_on_hopper_is_in_the_committed_rows(self):
        rows = json.loads((RESULTS / "op-h200.json").read_text())
        seconds = {(row["height"], row["window"], row["variant"]): row["median_s"] for row in rows}
        cases = {case[:2] for case in seconds}
        ratios = [seconds[*case, "flex"] / seconds[*case, "triton"] for case in cases]
        assert len(cases) == 12
        assert 1.85 < min(ratios) <= max(ratios) < 2.45
        assert "1.9 to 2.4 times faster than flex" in choose_backend("sm_90", torch.bfloat16, False, nothing)[0].reason

    @pytest.mark.parametrize("kind", CHOSEN)
    @pytest.mark.parametrize("needs_grad", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_takes_the_fused_kernels_where_they_were_compiled(self, kind, needs_grad, dtype):
        choice, refused = choose_backend(kind, dtype, needs_grad, nothing)
        assert choice.backend == "triton"
        assert (f"compiled for {kind}" in choice.reason and "not measured" in choice.reason) != (kind == "sm_90")
        assert not refused

    @pytest.mark.parametrize("kind", [*CHOSEN, "cuda"])
    def test_float32(self, kind):
        assert choose_backend(kind, torch.float32, False, nothing)[0].backend == "flex"
        assert choose_backend(kind, torch.float32, True, nothing)[0].backend == "tiled"

    def test_what_is_refused(self):
        choice, refused = choose_backend("sm_90", torch.bfloat16, False, {"triton": "no Triton"}.get)
        assert choice.backend == "flex"
        assert refused == {"triton": "no Triton"}
        assert choose_backend("sm_90", torch.bfloat16, True, str)[0].backend == "tiled"

    def test_the_last_candidate_runs_everywhere(self):
        assert {candidates[-1].backend for row in TABLE.values() for candidates in row} == {"tiled"}


@pytest.fixture
def fused(monkeypatch):
    """Makes a backend the first choice on this CPU, checked like one on a GPU."""

    def set_up(attend):
        backend = Backend(attend, lambda region: region.tiles, lambda *_: None, lambda *_: None)
        candidates = (Selection("triton", "first"), Selection("tiled", "last"))
        monkeypatch.setitem(selection.BACKENDS, "triton", backend)
        monkeypatch.setitem(TABLE, "cpu", Candidates(*[candidates] * 4))
        monkeypatch.setattr(self_check, "failure", self_check.checked)
        self_check.checked.cache_clear()
        selection._warn_once.cache_clear()

    yield set_up
    self_check.checked.cache_clear()
    selection._warn_once.cache_clear()


class TestSelfCheck:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("needs_grad", [False, True])
    def test_a_right_backend_passes_once(self, fused, dtype, needs_grad):
        calls = []

        def attend(*arguments):
            calls.append(arguments)
            return tiled.attend(*arguments)

        fused(attend)
        for _ in range(3):
            assert select_backend(CPU, dtype, 32, needs_grad).backend == "triton"
        assert len(calls) == 1

    def test_wrong_numbers(self, fused, caplog):
        def attend(*arguments):
            output, lse = tiled.attend(*arguments)
            output[:, :, -40:] *= 1.2  # a few rows, at the cut border
            return output, lse

        fused(attend)
        for _ in range(3):
            assert select_backend(CPU, torch.bfloat16, 32, False).backend == "tiled"
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "off the rule; report this with the output of python -m torch.utils.collect_env" in record.message

    def test_wrong_gradients(self, fused):
        def attend(query, key, *rest):
            return tiled.attend(query, key + 0.2 * (key - key.detach()), *rest)

        fused(attend)
        assert select_backend(CPU, torch.bfloat16, 32, False).backend == "triton"
        assert "off the rule" in select_backend(CPU, torch.bfloat16, 32, True).reason

    def test_not_a_number(self, fused):
        fused(lambda *arguments: (tiled.attend(*arguments)[0] * torch.nan, None))
        assert select_backend(CPU, torch.float16, 32, False).backend == "tiled"

    def test_a_kernel_that_does_not_compile(self, fused):
        def attend(*arguments):
            raise RuntimeError("the Triton kernel 'forward' failed on sm_90")

        fused(attend)
        choice = select_backend(CPU, torch.float16, 32, False)
        assert choice.backend == "tiled"
        assert "kernel 'forward' failed on sm_90" in choice.reason

    def test_the_random_numbers_of_the_user_stay(self, fused):
        fused(tiled.attend)
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        select_backend(CPU, torch.float16, 32, True)
        assert torch.equal(torch.rand(3), expected)

    def test_the_variable_turns_it_off(self, monkeypatch):
        monkeypatch.setenv("CLEAR_ATTN_SELF_CHECK", "0")
        meta = torch.device("meta")  # no CPU, and nothing that could be compared
        assert self_check.failure("triton", tiled.attend, meta, torch.float16, 32, False) is None
        monkeypatch.delenv("CLEAR_ATTN_SELF_CHECK")
        self_check.checked.cache_clear()
        assert "failed its self-check" in self_check.failure("triton", tiled.attend, meta, torch.float16, 32, False)

    def test_cpus_are_not_checked(self):
        assert self_check.failure("triton", None, CPU, torch.float16, 32, False) is None
