"""Records that cannot be read: the error names the file or the config's entry, and the key; nothing is changed."""

import json
import warnings

import pytest
from safetensors.torch import save_file

import clear_attn as clear
from clear_attn.weights.metadata import CONFIG_ENTRY
from tests.helpers import dummy_models
from tests.helpers.snapshots import assert_same, checkpoint_for, snapshot, train

VALUES = [None, [], [1], {}, {"a": [{}]}, 0, -1, 10**155, 1.5, float("nan"), True, "", "x" * 300]
KEYS = ("format", "method", "architecture", "schedule", "base_model", "model", "source", "training", "library_version")
INNER = {
    "method": ("name", "settings"),
    "method.settings": ("window", "down_factor", "other"),
    "schedule": ("dense_above_sigma", "dense_layers", "windows", "windows_by_sigma", "other"),
}
PATHS = [(key,) for key in KEYS] + [(*outer.split("."), key) for outer, keys in INNER.items() for key in keys]


def replace(record, path, value):
    """Return a record with one value replaced."""
    first, *rest = path
    return {**record, first: replace(record[first], rest, value) if rest else value}


def error_of(transformer, **arguments):
    """Return the message of a ValueError, or None."""
    try:
        clear.linearize(transformer, **arguments)
    except ValueError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    transformer = dummy_models.flux_transformer()
    clear.linearize(transformer, 3, 2, weights=None)
    train(transformer)
    clear.save_pretrained(transformer, folder)
    return folder


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_folder(saved, path):
    file = saved / "clear_config.json"
    text = file.read_text()
    transformer = dummy_models.flux_transformer()
    before = snapshot(transformer)
    try:
        for value in VALUES:
            file.write_text(json.dumps(replace(json.loads(text), path, value)))
            error = error_of(transformer, weights=saved)
            if error:
                assert "clear_config.json" in error or path[0] == "architecture", (value, error)
                assert_same(transformer, before)
            clear.restore(transformer)
    finally:
        file.write_text(text)


def test_folder_with_an_invalid_record(saved):
    file = saved / "clear_config.json"
    text = file.read_text()
    try:
        for broken in ("", "[]", "3", "null", '"text"', "[" * 5000, '{"format": 1' + "0" * 5000 + "}"):
            file.write_text(broken)
            with pytest.raises(ValueError, match=r"clear_config\.json"):
                clear.linearize(dummy_models.flux_transformer(), weights=saved)
    finally:
        file.write_text(text)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": 3, "settings": {}}', '{"name": "Swin", "settings": {"side": []}}']
)
def test_method_named_in_a_file(tmp_path, text):
    transformer = dummy_models.flux_transformer()
    save_file(checkpoint_for(transformer), tmp_path / "own.safetensors", metadata={"clear_method": text})
    with pytest.raises(ValueError, match=r"own\.safetensors"):
        clear.linearize(transformer, weights=tmp_path / "own.safetensors")


@pytest.mark.parametrize("path", [(), ("weights",), *PATHS], ids=lambda path: ".".join(path) or "all")
def test_entry_in_a_config(path):
    made = dummy_models.flux_transformer()
    clear.linearize(made, 3, 2, weights=None)
    entry = dict(made.config[CONFIG_ENTRY])
    for value in VALUES:
        transformer = dummy_models.flux_transformer()
        transformer.register_to_config(**{CONFIG_ENTRY: replace(entry, path, value) if path else value})
        before = snapshot(transformer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not clear.is_linearized(transformer)
            clear.restore(transformer)
        error = error_of(transformer, window=3)
        if error:
            assert f"the entry {CONFIG_ENTRY}" in error or "weights" in error, (value, error)
            assert_same(transformer, before)


def test_the_remedy_for_an_entry_that_cannot_be_read():
    transformer = dummy_models.flux_transformer()
    transformer.register_to_config(**{CONFIG_ENTRY: {"format": []}})
    with pytest.warns(UserWarning, match=r"register_to_config\(clear_attn=None\)"):
        assert not clear.is_linearized(transformer)
    with pytest.raises(ValueError, match=r"register_to_config\(clear_attn=None\)"):
        clear.linearize(transformer, 3, weights=None)
    transformer.register_to_config(**{CONFIG_ENTRY: None})
    assert clear.is_linearized(clear.linearize(transformer, 3, weights=None))


@pytest.mark.parametrize("window", [2**20 + 1, 10**155, 10**5000], ids=["2^20", "10^155", "10^5000"])
def test_a_window_beyond_any_image(window):
    for make in (clear.methods.Clear, clear.methods.Swin, lambda w: clear.Schedule(windows={"a": w})):
        with pytest.raises(ValueError, match="must be at most 1048576"):
            make(window)
