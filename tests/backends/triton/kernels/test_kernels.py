import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.triton.kernels.cases import EXACT, TOLERANCE, Case, both, distances

CASES = {
    "cut grid": Case([(13, 18)]),
    "one token": Case([(1, 1)], text=0, window=1),
    "whole blocks": Case([(24, 40)], text=0, window=20),
    "window of one": Case([(9, 20)], window=1),
    "larger than the image": Case([(10, 17)], window=40),
    "no text": Case([(13, 18)], text=0),
    "text in blocks and a rest": Case([(9, 10)], text=150),
    "long text": Case([(9, 10)], text=600),
    "text last": Case([(13, 18)], text=70, text_first=False),
    "pooled": Case([(13, 18)], down_factor=4),
    "pooled, text last": Case([(17, 18)], text=65, text_first=False, down_factor=2),
    "two segments": Case([(12, 18), (7, 10)], window=5),
    "batch": Case([(9, 18)], batch=2, heads=2, key_heads=2),
    "bias": Case([(9, 18)], batch=2, text=40, bias=True),
    "bias on pooled keys": Case([(9, 18)], text=5, down_factor=3, bias=True, text_first=False),
    "grouped heads": Case([(9, 18)], heads=4, key_heads=2),
    "head_dim 48": Case([(9, 18)], head_dim=48),
    "negative scale": Case([(9, 18)], scale=-0.3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernels_compute_the_rule_and_its_gradients(case):
    assert max(distances(case).values()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("head_dim", [160, 256])
def test_wide_heads(head_dim):
    assert max(distances(Case([(9, 10)], head_dim=head_dim)).values()) < TOLERANCE[EXACT]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        Case([(13, 18)], batch=2, head_dim=32, heads=2, bias=True),
        Case([(13, 18)], text=0, down_factor=2, key_heads=1, heads=2),
    ],
    ids=["text and bias", "pooled and grouped"],
)
def test_the_backend_in_half_precision(case, dtype):
    assert max(distances(case._replace(dtype=dtype)).values()) < TOLERANCE[dtype]


@settings(max_examples=4)
@given(data=st.data())
def test_any_call(data):
    numbers = st.integers
    grids = data.draw(st.lists(st.tuples(numbers(1, 14), numbers(1, 18)), min_size=1, max_size=2))
    case = Case(
        grids,
        text=data.draw(st.sampled_from([0, 1, 63, 64, 65, 130])),
        window=data.draw(numbers(1, 24)),
        text_first=data.draw(st.booleans()),
        down_factor=data.draw(numbers(1, 3)),
        batch=data.draw(numbers(1, 2)),
        bias=data.draw(st.booleans()),
    )
    torch.manual_seed(0)
    assert max(distances(case).values()) < TOLERANCE[EXACT]


def test_results_are_bit_equal_from_run_to_run():
    case, runs = CASES["text in blocks and a rest"]._replace(dtype=torch.bfloat16), []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(both(case)[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
