"""Records in JSON: every error names the file and the key."""

import pytest

from clear_attn.utils.json_records import read_json, shorten, validate_record

FIELDS = {"size": int, "share": float | int, "note": str | None, "flag": bool, "items": list | tuple}
RECORD = {"size": 3, "share": 0.5, "note": "a", "flag": True, "items": []}


@pytest.mark.parametrize(
    "text",
    [b"{", b"\xff\xfe", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a": 1' + b"0" * 5000 + b"}"],
    ids=["half", "not UTF-8", "nested", "long integer"],
)
def test_invalid_json_is_named(tmp_path, text):
    (tmp_path / "some.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"some\.json is not readable as JSON"):
        read_json(tmp_path / "some.json")


def test_a_field_that_may_be_none_may_be_absent():
    record = {name: value for name, value in RECORD.items() if name != "note"}
    assert validate_record({**record, "other": 1}, FIELDS, "x") == {**record, "note": None, "other": 1}


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "note"])
def test_an_absent_field_is_named(name):
    record = {key: value for key, value in RECORD.items() if key != name}
    with pytest.raises(ValueError, match=f"x has no '{name}'"):
        validate_record(record, FIELDS, "x")


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [{"a": 1}, object(), True, "text", 1.5])
def test_a_wrong_type_is_named(name, value):
    if isinstance(value, FIELDS[name]) and (value is not True or name == "flag"):
        assert validate_record({**RECORD, name: value}, FIELDS, "x")[name] == value
    else:
        with pytest.raises(ValueError, match=f"x has {name}="):
            validate_record({**RECORD, name: value}, FIELDS, "x")


@pytest.mark.parametrize("values", [[], "text", None, {1: 2}])
def test_other_json_than_an_object_is_named(values):
    with pytest.raises(ValueError, match="x must hold a JSON object"):
        validate_record(values, {}, "x")


def test_values_are_short_in_errors():
    assert len(shorten("a" * 1000)) == 80
    assert shorten(10**5000) == "a int"
