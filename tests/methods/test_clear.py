import numpy as np
import pytest

from clear_attn.methods import Clear


def test_defaults():
    assert Clear() == Clear(window=16, down_factor=1)
    assert Clear(np.int64(8)).window == 8


@pytest.mark.parametrize("name", ["window", "down_factor"])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0, ValueError, "must be at least 1, got 0"),
        (-3, ValueError, "must be at least 1, got -3"),
        (2.0, TypeError, "must be a whole number, got 2.0 of type float"),
        (True, TypeError, "must be a whole number, got True of type bool"),
        ("8", TypeError, "must be a whole number, got '8' of type str"),
    ],
)
def test_refuses(name, value, error, words):
    with pytest.raises(error, match=f"{name} {words}"):
        Clear(**{name: value})
