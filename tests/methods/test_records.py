"""Methods as JSON and as text."""

import dataclasses
import json

import pytest

from clear_attn import methods
from clear_attn.methods.records import method_from_dict, parse, record_as_text, validate_method

ALL = [
    methods.Agent(3),
    methods.Clear(8, 4),
    methods.Dense(),
    methods.KVCompression(2),
    methods.LiT(heads=None, kernel_size=0),
    methods.Sigmoid(),
    methods.Strided(3),
    methods.Swin(4),
]
each_method = pytest.mark.parametrize("method", ALL, ids=repr)


@each_method
def test_a_record_survives_json(method):
    record = json.loads(json.dumps(method.to_dict()))
    assert record["name"] == type(method).__name__
    assert method_from_dict(record) == method


@each_method
def test_text_names_a_method_and_its_settings(method):
    assert parse(record_as_text(method.to_dict())) == method
    assert parse(repr(method)) == method


def test_a_name_alone_has_the_default_settings():
    assert parse("Swin") == methods.Swin()


def test_the_text_of_a_method_that_is_not_known():
    assert record_as_text({"name": "mine.Own", "settings": {"side": 3, "kind": "a"}}) == "mine.Own(side=3, kind='a')"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"name": "Unheard", "settings": {}}, "no attention method is named 'Unheard', only .*Swin"),
        ({"name": "Swin", "settings": {"depth": 3}}, r"Swin does not take these settings .*; it has: side"),
        ({"name": "Swin", "settings": {"side": 0}}, "side must be at least 1, got 0"),
    ],
)
def test_records_that_cannot_be_read(record, words):
    with pytest.raises(ValueError, match=words):
        method_from_dict(record)


@pytest.mark.parametrize("text", ["Swin(8)", "Swin(side=", "Swin(**{})", "1 + 1", "", "Swin(side=open('x'))"])
def test_invalid_texts_of_methods(text):
    with pytest.raises(ValueError, match=r"is not a name with settings in parentheses; write it as 'Swin\(side=8\)'"):
        parse(text)


def test_a_name_of_two_methods_is_written_in_full(monkeypatch):
    monkeypatch.setattr("clear_attn.methods.records.REGISTRY", {"mine.Own": methods.Swin, "yours.Own": methods.Swin})
    with pytest.raises(ValueError, match=r"method='Own\(side=3\)' may be any of mine.Own, yours.Own; write its whole"):
        parse("Own(side=3)")
    assert parse("yours.Own(side=3)") == methods.Swin(3)


def test_a_method_must_be_an_object_and_come_back_from_json():
    validate_method(methods.Swin(4))
    with pytest.raises(TypeError, match=r"method must be one of clear_attn\.methods"):
        validate_method(methods.Swin)
    broken = methods.Swin(4)
    object.__setattr__(broken, "side", {4})
    with pytest.raises(TypeError, match="must be a frozen dataclass"):
        validate_method(broken)


def test_lists_of_json_become_tuples():
    @dataclasses.dataclass(frozen=True)
    class Pair(methods.Swin):
        sides: tuple = (1, 2)

    method = Pair(sides=(3, 4))
    record = json.loads(json.dumps(method.to_dict()))
    assert record["settings"]["sides"] == [3, 4]
    assert method_from_dict(record).sides == (3, 4)
