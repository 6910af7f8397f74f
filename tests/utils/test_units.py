import pytest

from clear_attn.utils.units import BYTES, FLOPS, format_bytes, in_units


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0], (["0", "0"], "FLOPs")),
        ([999], (["999"], "FLOPs")),
        ([999.96e3, 5], (["1.000", "0.000"], "MFLOPs")),
        ([53.604e12, 1.433e12], (["53.60", "1.43"], "TFLOPs")),
        ([3.0554515e15, 81.69e12], (["3.055", "0.082"], "PFLOPs")),
        ([5e21], (["5,000"], "EFLOPs")),
    ],
)
def test_a_unit_that_fits_the_largest(values, expected):
    assert in_units(values, FLOPS, 4) == expected


def test_bytes():
    assert in_units([1023], BYTES, 3) == (["1,023"], "B")
    assert format_bytes(22.17 * 2**30) == "22.2 GiB"
    assert format_bytes(0.5 * 2**20, 176 * 2**20) == "0 to 176 MiB"
