"""Which method is used: from arguments, weights and saved state."""

import types

import pytest

from clear_attn import methods
from clear_attn.patching.resolve import override_method, parameters_lost, resolve_method, resolve_saved

SWIN = types.SimpleNamespace(method=methods.Swin(4), down_factor=1)
POOLED = types.SimpleNamespace(method=None, down_factor=4)


@pytest.mark.parametrize(
    ("arguments", "source", "expected"),
    [
        ((None, None, None), None, methods.Clear(16, 1)),
        ((8, 2, None), None, methods.Clear(8, 2)),
        ((None, None, methods.LiT()), None, methods.LiT()),
        ((None, None, None), SWIN, methods.Swin(4)),
        ((None, None, methods.Swin(4)), SWIN, methods.Swin(4)),
        ((8, None, None), POOLED, methods.Clear(8, 4)),
        ((8, 4, None), POOLED, methods.Clear(8, 4)),
    ],
)
def test_arguments_override_weights_and_weights_override_defaults(arguments, source, expected):
    assert resolve_method(*arguments, source) == expected


@pytest.mark.parametrize(
    ("arguments", "source", "words"),
    [
        ((8, None, methods.Swin(4)), None, r"window=8 and method=Swin\(side=4\) are both given"),
        ((None, 2, methods.Swin(4)), None, "down_factor=2 and method=Swin"),
        ((None, None, methods.Swin(5)), SWIN, r"method=Swin\(side=5\) does not fit weights .* method=Swin\(side=4\)"),
        ((None, 2, None), POOLED, "down_factor=2 does not fit weights that were distilled for down_factor=4"),
        ((0, None, None), None, "window must be at least 1, got 0"),
    ],
)
def test_conflicting_settings_are_errors(arguments, source, words):
    with pytest.raises(ValueError, match=words):
        resolve_method(*arguments, source)


def test_an_override_keeps_the_other_setting():
    assert override_method(methods.Clear(8, 4), 5, None, None) == methods.Clear(5, 4)
    with pytest.raises(TypeError, match="method must be one of"):
        override_method(methods.Clear(8, 4), None, None, "Swin")


def test_a_pipeline_saved_whole_keeps_its_method():
    metadata = {"method": methods.Swin(4).to_dict()}
    assert resolve_saved(None, None, None, metadata) == methods.Swin(4)
    with pytest.raises(ValueError, match="does not fit this pipeline"):
        resolve_saved(None, None, methods.Swin(5), metadata)


@pytest.mark.parametrize(
    ("weights", "words"), [("w.safetensors", "weights='w.safetensors', which it had"), (None, "weights=None, which")]
)
def test_lost_parameters_name_the_weights(weights, words):
    assert words in str(parameters_lost({"weights": weights}))
