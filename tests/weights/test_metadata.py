"""The records of linearized models: writing, reading, formats."""

import json

import pytest

from clear_attn import Schedule, methods
from clear_attn.weights import metadata
from clear_attn.weights.metadata import CONFIG_ENTRY, Record, make_metadata, metadata_of, read_method, read_record
from tests.helpers import dummy_models

RECORD = Record(
    methods.Swin(4),
    "FluxTransformer2DModel",
    base_model="someone/model",
    source="someone/weights",
    schedule=Schedule(dense_above_sigma=0.5),
)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "clear_config.json").write_text(RECORD.to_json())
    return tmp_path / "clear_config.json"


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_record_is_read_from_its_file(file):
    assert read_record(file) == RECORD
    assert json.loads(file.read_text())["format"] == metadata.FORMAT


def test_format_1_has_the_settings_of_clear_at_the_top():
    assert read_method({"window": 8, "down_factor": 4}) == methods.Clear(8, 4)


def test_a_record_without_a_schedule(file):
    values = json.loads(file.read_text())
    del values["schedule"]
    file.write_text(json.dumps(values))
    assert read_record(file).schedule == Schedule()


def test_another_format_is_refused(file):
    change(file, format=3, library_version="9.9")
    with pytest.raises(ValueError, match=r"is of format 3, written by clear_attn 9\.9, and this version reads 2"):
        read_record(file)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"format": 2}'])
def test_broken_files_are_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"clear_config\.json .*; save or fetch it again"):
        read_record(file)


class TestOfATransformer:
    @pytest.fixture
    def transformer(self):
        transformer = dummy_models.flux_transformer()
        entry = make_metadata(transformer, methods.Swin(4), Schedule(), "file.safetensors", None)
        transformer.register_to_config(**{CONFIG_ENTRY: entry})
        return transformer

    def test_is_loaded(self, transformer):
        found = metadata_of(transformer)
        assert read_method(found) == methods.Swin(4)
        assert (found["weights"], found["source"]) == ("file.safetensors", None)
        assert metadata_of(dummy_models.flux_transformer()) is None

    def test_another_class_with_the_same_config_has_no_metadata(self, transformer):
        other = dummy_models.sd3_transformer()
        other.register_to_config(**{CONFIG_ENTRY: transformer.config[CONFIG_ENTRY]})
        assert metadata_of(other) is None

    def test_another_format_is_refused(self, transformer):
        entry = {**transformer.config[CONFIG_ENTRY], "format": 3}
        transformer.register_to_config(**{CONFIG_ENTRY: entry})
        with pytest.raises(ValueError, match="the config of this transformer is of format 3"):
            metadata_of(transformer)
