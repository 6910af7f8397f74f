"""Saving and loading weights: save_pretrained, push_to_hub, and pipelines that diffusers saves."""

import importlib.metadata
import json
import socket
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from huggingface_hub import constants
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import clear_attn as clear
from clear_attn.patching import saving
from clear_attn.patching.target import entry_hook_of
from tests.helpers import dummy_models, families
from tests.helpers.families import each_family
from tests.helpers.placement import align
from tests.helpers.reference_model import run
from tests.helpers.snapshots import assert_same, checkpoint_for, snapshot, train


@pytest.fixture
def folder(trained, tmp_path):
    clear.save_pretrained(trained, tmp_path / "my-clear")
    return tmp_path / "my-clear"


@each_family()
def test_save_and_load(family, trained, folder, transformer):
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "clear_config.json",
        "clear_weights.safetensors",
    ]
    record = json.loads((folder / "clear_config.json").read_text())
    assert record == {
        "format": 2,
        "method": {"name": "Clear", "settings": {"window": 5, "down_factor": 2}},
        "schedule": {"dense_above_sigma": None, "dense_layers": [], "windows": {}, "windows_by_sigma": []},
        "architecture": type(transformer).__name__,
        "base_model": None,
        "model": None,
        "source": None,
        "training": None,
        "library_version": "0.1.0",
    }
    call = family.call(transformer, (11, 20))
    clear.linearize(transformer, weights=folder)
    assert torch.equal(run(transformer, call), run(trained, call))
    assert clear.cost(transformer, 64, 64) == clear.cost(trained, 64, 64)


def test_saving_needs_no_installed_package(trained, folder, monkeypatch):
    """As where the sources are on the path of imports alone."""

    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(vars(clear), "__version__", "")
    assert clear.__getattr__("__version__") == "unknown"
    clear.save_pretrained(trained, folder)
    assert json.loads((folder / "clear_config.json").read_text())["library_version"] is None
    clear.linearize(trained, weights=folder)


def test_trained_weights_are_saved(trained, folder):
    with torch.no_grad():
        trained.transformer_blocks[0].attn.to_q.weight.add_(1)
        trained.transformer_blocks[0].attn.processor.spatial_weight.add_(1)
    before = load_file(folder / "clear_weights.safetensors")
    clear.save_pretrained(trained, folder)
    after = load_file(folder / "clear_weights.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        "transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.0.attn.processor.spatial_weight",
    }


def test_a_lora_is_not_saved(family, trained, folder, transformer, tmp_path):
    expected = load_file(folder / "clear_weights.safetensors")
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    clear.save_pretrained(trained, tmp_path / "with-lora")
    saved = load_file(tmp_path / "with-lora" / "clear_weights.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())
    trained.fuse_lora()
    with pytest.raises(RuntimeError, match=r"call pipe.unfuse_lora\(\) first"):
        clear.save_pretrained(trained, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_the_model_card_has_base_model_and_license(tmp_path):
    transformer = families.FLUX.transformer()
    transformer.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    clear.linearize(transformer, 8, 4, weights=None)
    train(transformer)
    clear.save_pretrained(transformer, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: black-forest-labs/FLUX.1-dev" in card
    assert "license_name: flux-1-dev-non-commercial-license" in card
    assert "at a distance below 8 tokens, and means over cells of 4 x 4 tokens." in card
    assert huggingface_hub.ModelCard(card).data.library_name == "clear_attn"


def test_the_license_is_that_of_the_weights(tmp_path):
    """Also for a copy of a published file, saved from another model."""
    transformer = families.FLUX.transformer()
    transformer.register_to_config(_name_or_path="black-forest-labs/FLUX.1-schnell")
    save_file(checkpoint_for(transformer), tmp_path / "clear_local_8.safetensors")
    clear.linearize(transformer, weights=tmp_path / "clear_local_8.safetensors")
    assert clear.cost(transformer, 64, 64).method.window == 8
    clear.save_pretrained(transformer, tmp_path / "first")
    clear.linearize(transformer, weights=tmp_path / "first")
    clear.save_pretrained(transformer, tmp_path / "second")
    card = (tmp_path / "second" / "README.md").read_text()
    assert "base_model: black-forest-labs/FLUX.1-schnell" in card
    assert "license_name: flux-1-dev-non-commercial-license" in card


def test_an_existing_card_is_kept(trained, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    clear.save_pretrained(trained, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_weights_file_has_the_settings_of_its_folder(transformer, folder):
    clear.linearize(transformer, weights=folder / "clear_weights.safetensors")
    assert clear.cost(transformer, 64, 64).method.window == 5


def test_refuses_layerwise_casting(trained, tmp_path):
    trained.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"float8_e4m3fn by layerwise casting.*save before"):
        clear.save_pretrained(trained, tmp_path / "cast")
    assert not (tmp_path / "cast").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_save_keeps_the_last_one(trained, folder, monkeypatch, error):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def interrupted(values, file, metadata):
        file.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(saving, "write_tensors", interrupted)
    with torch.no_grad():
        trained.transformer_blocks[0].attn.to_q.weight.add_(1)
    with pytest.raises((KeyboardInterrupt, OSError)):
        clear.save_pretrained(trained, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_new_weights_never_have_an_old_record(trained, folder, monkeypatch):
    def replace(file, target, real=Path.replace):
        if target.name == "clear_config.json":
            raise KeyboardInterrupt
        return real(file, target)

    monkeypatch.setattr(Path, "replace", replace)
    with torch.no_grad():
        trained.transformer_blocks[0].attn.to_q.weight.add_(1)
    expected = trained.transformer_blocks[0].attn.to_q.weight
    with pytest.raises(KeyboardInterrupt):
        clear.save_pretrained(trained, folder)
    assert {file.name for file in folder.iterdir()} == {"README.md", "clear_weights.safetensors"}
    saved = load_file(folder / "clear_weights.safetensors")
    assert torch.equal(saved["transformer_blocks.0.attn.to_q.weight"], expected)


def test_push_to_hub(trained, monkeypatch):
    calls = []

    def create_repo(repo, **kwargs):
        calls.append((repo, kwargs))
        return types.SimpleNamespace(repo_id="me/my-clear")

    def upload_folder(*, folder_path, **kwargs):
        calls.append((set(load_file(f"{folder_path}/clear_weights.safetensors")), kwargs))
        return types.SimpleNamespace(commit_url="address")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    assert clear.push_to_hub(trained, "my-clear", private=True, token="secret") == "address"
    (repo, creation), (names, upload) = calls
    assert (repo, creation) == ("my-clear", {"private": True, "token": "secret", "exist_ok": True})
    assert names == checkpoint_for(trained, 2).keys()
    assert (upload["repo_id"], upload["token"]) == ("me/my-clear", "secret")


class TestUploadsThatFail:
    """Nothing is uploaded, and the error says what to do."""

    @pytest.mark.parametrize(
        ("repo", "error", "words"),
        [
            ("a/b/c", ValueError, "'a/b/c' is not the id of a Hub repository"),
            (
                "me/mine",
                ConnectionError,
                r"me/mine cannot be uploaded, because HF_HUB_OFFLINE is set; save on this machine",
            ),
        ],
    )
    def test_before_anything_is_saved(self, trained, monkeypatch, repo, error, words):
        monkeypatch.setattr(saving, "save_pretrained", lambda *args: pytest.fail("saved"))
        with pytest.raises(error, match=words):
            clear.push_to_hub(trained, repo, token="secret")

    @pytest.mark.parametrize("token", [None, True, False])
    def test_without_a_token(self, trained, monkeypatch, token):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
        with pytest.raises(PermissionError, match=r"takes a token with write access; run `hf auth login`"):
            clear.push_to_hub(trained, "me/mine", token=token)

    def test_without_a_network(self, trained, monkeypatch):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            closed = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        api = huggingface_hub.HfApi(endpoint=closed)
        monkeypatch.setattr(huggingface_hub, "create_repo", api.create_repo)
        with pytest.raises(
            ConnectionError, match=r"^the Hub cannot be reached .* me/mine was not uploaded; save on this"
        ):
            clear.push_to_hub(trained, "me/mine", token="secret")

    @pytest.mark.parametrize(
        ("status", "error", "words"),
        [
            (403, PermissionError, "the token has no write access to me/mine"),
            (500, ConnectionError, "the Hub did not take the files of me/mine"),
        ],
    )
    def test_refused_by_the_hub(self, trained, monkeypatch, status, error, words):
        def create_repo(*args, **kwargs):
            refusal = huggingface_hub.errors.HfHubHTTPError.__new__(huggingface_hub.errors.HfHubHTTPError)
            refusal.response = types.SimpleNamespace(status_code=status)
            raise refusal

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
        with pytest.raises(error, match=words):
            clear.push_to_hub(trained, "me/mine", token="secret")


FORMAT_1 = Path(__file__).parents[1] / "data" / "format_1"
SCHEDULE = clear.Schedule(0.9, ("single_transformer_blocks.0",), {"transformer_blocks.0": 5})


@pytest.mark.parametrize(
    ("name", "method", "schedule"),
    [("clear", clear.methods.Clear(4, 2), SCHEDULE), ("swin", clear.methods.Swin(side=4), clear.Schedule())],
)
def test_weights_saved_in_format_1_load(name, method, schedule):
    transformer = clear.linearize(families.FLUX.transformer(), weights=FORMAT_1 / name)
    hook = entry_hook_of(transformer)
    assert (hook.method, hook.schedule) == (method, schedule)
    saved = load_file(FORMAT_1 / name / "clear_weights.safetensors")
    state = transformer.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in saved.items())


@pytest.mark.parametrize(
    ("folder", "weights", "method"),
    [
        ("transformer", "clear", clear.methods.Clear(4, 2)),
        ("transformer_swin", "auto", clear.methods.Swin(side=4)),
    ],
)
def test_a_transformer_saved_whole_in_format_1_is_recognized(folder, weights, method):
    config = json.loads((FORMAT_1 / folder / "config.json").read_text())
    transformer = FluxTransformer2DModel.from_config(config)
    with pytest.warns(UserWarning, match="was saved while it was linearized"):
        assert not clear.is_linearized(transformer)
    weights = weights if weights == "auto" else FORMAT_1 / weights
    assert entry_hook_of(clear.linearize(transformer, weights=weights)).method == method


class TestRefusals:
    def test_nothing_to_save(self, transformer, tmp_path):
        with pytest.raises(RuntimeError, match="not linearized, so there is nothing to save"):
            clear.save_pretrained(transformer, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()

    def test_a_processor_that_was_replaced(self, family, trained, tmp_path):
        trained.transformer_blocks[1].attn.set_processor(family.transformer().transformer_blocks[1].attn.processor)
        with pytest.raises(RuntimeError, match=r"transformer_blocks\.1\.attn was replaced by"):
            clear.save_pretrained(trained, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()

    def test_a_file_in_the_way(self, trained, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(NotADirectoryError, match="file' is a file; give a directory"):
            clear.save_pretrained(trained, tmp_path / "file")

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (
                lambda f: (f / "clear_config.json").unlink(),
                FileNotFoundError,
                r"a directory without clear_config\.json",
            ),
            (lambda f: (f / "clear_weights.safetensors").unlink(), FileNotFoundError, "does not exist"),
            (lambda f: _rewrite(f, format=3), ValueError, r"format 3, written by clear_attn 0\.1\.0, .*update"),
            (lambda f: _rewrite(f, format=0), ValueError, "format 0, .*this version reads 2"),
            (lambda f: _rewrite(f, method=_clear(window=0)), ValueError, "window must be at least 1, got 0"),
            (lambda f: _rewrite(f, method=_clear(window=None)), ValueError, "whole number, got None"),
            (
                lambda f: _rewrite(f, method=_clear(down_factor=3)),
                ValueError,
                "says window=5, down_factor=3, and the weights .*=2",
            ),
            (
                lambda f: _rewrite(f, architecture="Other2DModel"),
                ValueError,
                "distilled for a Other2DModel, and this is",
            ),
            (
                lambda f: (f / "clear_config.json").write_text('{"format": 1'),
                ValueError,
                r"clear_config.json is not readable as JSON",
            ),
            (
                lambda f: (f / "clear_config.json").write_text("[]"),
                ValueError,
                r"clear_config.json must hold a JSON object",
            ),
        ],
    )
    def test_folders(self, transformer, folder, change, error, words):
        change(folder)
        before = snapshot(transformer)
        with pytest.raises(error, match=words):
            clear.linearize(transformer, weights=folder)
        assert_same(transformer, before)

    @pytest.mark.parametrize("settings", [{"window": 6}, {"down_factor": 1}])
    def test_other_settings_than_the_folder_says(self, transformer, folder, settings):
        with pytest.raises(ValueError, match="does not fit weights that were distilled for"):
            clear.linearize(transformer, weights=folder, **settings)


def _clear(**changes):
    return {"name": "Clear", "settings": {"window": 5, "down_factor": 2, **changes}}


def _rewrite(folder, **changes):
    file = folder / "clear_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class TestSavedWhole:
    """A linearized pipeline that diffusers saves and loads."""

    @pytest.fixture
    def save_whole(self, pipe, tmp_path):
        def save_whole(factor, distilled):
            weights = None
            if distilled:
                weights = tmp_path / "weights.safetensors"
                save_file(checkpoint_for(pipe.transformer, factor), weights)
            clear.linearize(pipe, 5, factor, weights=weights)
            pipe.save_pretrained(tmp_path / "whole")
            loaded = FluxPipeline.from_pretrained(tmp_path / "whole")
            align(loaded.transformer)
            return loaded

        return save_whole

    def call(self, pipe):
        return dummy_models.flux_call(pipe.transformer, (11, 20))

    @pytest.mark.parametrize(("factor", "distilled"), [(1, False), (1, True)])
    def test_is_loaded(self, pipe, save_whole, factor, distilled):
        back = save_whole(factor, distilled)
        with pytest.warns(UserWarning, match="now runs with dense attention"):
            assert not clear.is_linearized(back)
        clear.linearize(back)
        assert clear.is_linearized(back)
        assert torch.equal(run(back.transformer, self.call(pipe)), run(pipe.transformer, self.call(pipe)))
        assert clear.cost(back, 128, 128) == clear.cost(pipe, 128, 128)

    def test_without_its_pooled_weights_it_needs_the_folder(self, pipe, save_whole, tmp_path):
        back = save_whole(2, distilled=True)
        before = snapshot(back.transformer)
        with pytest.raises(
            ValueError, match=r"nothing was trained since, weights='.*weights\.safetensors', which it had"
        ):
            clear.linearize(back)
        assert_same(back.transformer, before)
        clear.linearize(back, 5, weights=tmp_path / "weights.safetensors")
        assert torch.equal(run(back.transformer, self.call(pipe)), run(pipe.transformer, self.call(pipe)))

    def test_other_settings(self, save_whole):
        back = save_whole(1, distilled=True)
        with pytest.raises(ValueError, match=r"window=6, .* does not fit this pipeline, which was saved .* window=5"):
            clear.linearize(back, 6)

    def test_does_not_contain_the_original(self, save_whole):
        back = save_whole(1, distilled=True)
        before = snapshot(back.transformer)
        with clear.linearized(back):
            pass
        assert_same(back.transformer, before)
        clear.linearize(back)
        with pytest.raises(RuntimeError, match="load the original pipeline instead"):
            clear.restore(back)
        assert clear.is_linearized(back)

    def test_restore_warns_that_it_is_dense(self, save_whole):
        back = save_whole(1, distilled=True)
        with pytest.warns(UserWarning, match="now runs with dense attention"):
            clear.restore(back)
        assert clear.cost(back, 128, 128).method.window == 5

    def test_training_free_can_be_restored(self, pipe, save_whole):
        expected = run(dummy_models.flux_pipeline().transformer, self.call(pipe))
        back = save_whole(2, distilled=False)
        with pytest.raises(ValueError, match="nothing was trained since, weights=None, which initializes them again"):
            clear.linearize(back)
        clear.linearize(back, 5, 2, weights=None)
        clear.restore(back)
        assert torch.equal(run(back.transformer, self.call(pipe)), expected)

    def test_metadata_of_another_format(self, transformer):
        transformer.register_to_config(clear_attn={"format": 3})
        with pytest.raises(ValueError, match="config of this transformer is of format 3"):
            clear.linearize(transformer)


def test_restore_removes_the_metadata(transformer):
    before = dict(transformer.config)
    clear.linearize(transformer, 5, weights=None)
    assert transformer.config.clear_attn["method"]["settings"]["window"] == 5
    clear.restore(transformer)
    assert dict(transformer.config) == before
