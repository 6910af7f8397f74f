"""Names of models and weights in shared files: Hub ids, or local names without their paths."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from safetensors.torch import save_file

import clear_attn as clear
from clear_attn.weights.published import base_model_of, shared_name_of
from clear_attn.weights.sources import shared_name, with_absolute_path
from tests.helpers import dummy_models
from tests.helpers.snapshots import checkpoint_for

SNAPSHOT = "/home/me/cache/models--someone--model/snapshots/0123abc"


def named(path):
    return SimpleNamespace(config={"_name_or_path": path})


@pytest.mark.parametrize(
    ("path", "base", "shared"),
    [
        ("models/mine/transformer", None, "mine"),  # a relative path, from another working directory
        ("models/mine", None, "mine"),
        ("/home/me/models/mine/transformer", None, "mine"),
        (SNAPSHOT + "/transformer", "someone/model", "someone/model"),
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("", None, ""),
    ],
)
def test_of_models(path, base, shared):
    assert base_model_of(None, named(path)) == base
    assert shared_name_of(None, named(path)) == shared


def test_an_id_is_valid_if_the_cache_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert base_model_of(None, named("someone/model")) is None
    (tmp_path / "models--someone--model").mkdir()
    assert base_model_of(None, named("someone/model")) == "someone/model"


def test_of_weights(tmp_path, monkeypatch):
    (tmp_path / "my" / "weights").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    local = with_absolute_path("my/weights")
    monkeypatch.chdir("/")
    assert local == str(tmp_path / "my" / "weights")
    assert shared_name(local) == "weights"
    assert shared_name(with_absolute_path("owner/repo/x.safetensors")) == "owner/repo/x.safetensors"


def test_weights_of_a_pipeline_that_is_saved_whole(pipe, tmp_path):
    folder = tmp_path / "at home"
    folder.mkdir()
    save_file(checkpoint_for(pipe.transformer), folder / "own.safetensors")
    clear.linearize(pipe, 3, weights=folder / "own.safetensors")
    pipe.transformer.save_pretrained(tmp_path / "whole")
    text = (tmp_path / "whole" / "config.json").read_text()
    assert json.loads(text)["clear_attn"]["weights"] == "own.safetensors"
    assert "at home" not in text
    clear.save_pretrained(pipe, folder / "saved")
    other = dummy_models.flux_pipeline()
    clear.linearize(other, weights=str(folder / "saved") + "/")
    assert other.transformer.config["clear_attn"]["weights"] == "saved"
