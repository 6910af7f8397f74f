import numpy as np
import pytest

from clear_attn.utils.validation import check_whole_number


@pytest.mark.parametrize("value", [3, np.int64(3)])
def test_whole_numbers_become_ints(value):
    assert type(check_whole_number("side", value, "fix it")) is int


def test_the_minimum_is_allowed():
    assert check_whole_number("side", 0, "fix it", least=0) == 0


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0, ValueError, "side must be at least 1, got 0; fix it"),
        (True, TypeError, "side must be a whole number, got True of type bool; fix it"),
        (2.0, TypeError, "got 2.0 of type float"),
        (None, TypeError, "got None of type NoneType"),
    ],
)
def test_errors_have_value_and_remedy(value, error, words):
    with pytest.raises(error, match=words):
        check_whole_number("side", value, "fix it")
