"""Sources of weights: published weights, the Hub, folders; and errors."""

import dataclasses
import json
import types

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
import torch
from safetensors.torch import save

import clear_attn as clear
from clear_attn.weights import published
from tests.helpers import fake_hub, families
from tests.helpers.snapshots import assert_same, checkpoint_for, snapshot

SECRET = "hf_secret"


FLUX_DEV, SMALL_FLUX = published.PUBLISHED
PAIRS = {(method.window, method.down_factor): name for method, name in FLUX_DEV.files.items()}


@pytest.fixture
def transformer():
    return families.FLUX.transformer()


@pytest.fixture
def repos(transformer):
    """Return the published files with their real names, and repositories of others."""
    files = {
        name: save(checkpoint_for(transformer, factor, seed=window), metadata={"format": "pt"})
        for (window, factor), name in PAIRS.items()
    }
    mine = {
        "clear_config.json": json.dumps(
            {
                "format": 1,
                "window": 5,
                "down_factor": 1,
                "architecture": "FluxTransformer2DModel",
                "base_model": None,
                "source": None,
            }
        ).encode(),
        "clear_weights.safetensors": files["clear_local_16.safetensors"],
    }
    return {
        FLUX_DEV.location.id: {"files": files},
        "someone/weights": {"files": mine},
        "someone/secret": {"files": mine, "token": SECRET},
        "someone/gated": {"files": mine, "gated": True},
        "someone/refused": {"files": mine, "refused": True},
        "someone/else": {"files": {"model.safetensors": b""}},
    }


# huggingface_hub 1 renamed it.
forget_sessions = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils._http.reset_sessions


@pytest.fixture
def server(repos, monkeypatch, tmp_path):
    with fake_hub.serve(repos) as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        # Before version 1, file_download has a name of its own for it.
        for module in (huggingface_hub.constants, huggingface_hub.file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "*")
        forget_sessions()
        yield server
        forget_sessions()


@pytest.fixture
def as_flux(transformer, monkeypatch):
    """Return a function that names the small transformer, which counts as FLUX.1's architecture."""
    own = {name: transformer.config[name] for name in FLUX_DEV.recognizer.config}
    recognizer = dataclasses.replace(FLUX_DEV.recognizer, config=own)
    entry = dataclasses.replace(FLUX_DEV, recognizer=recognizer)
    monkeypatch.setattr(published, "PUBLISHED", [entry, SMALL_FLUX])

    def named(name):
        transformer.register_to_config(_name_or_path=name)
        return transformer

    return named


def weights_are(transformer, values):
    state = transformer.state_dict()
    return all(torch.equal(state[name], value) for name, value in values.items())


@pytest.mark.parametrize(("window", "factor"), PAIRS)
def test_the_published_weights(server, as_flux, window, factor):
    transformer = as_flux("black-forest-labs/FLUX.1-dev")
    before = snapshot(transformer)
    clear.linearize(transformer, window, factor)
    counted = clear.cost(transformer, 64, 64)
    assert (counted.method.window, counted.method.down_factor) == (window, factor)
    assert weights_are(transformer, checkpoint_for(transformer, factor, seed=window))
    clear.restore(transformer)
    assert_same(transformer, before)


def test_window_and_down_factor_left_out(server, as_flux, caplog):
    transformer = as_flux("/cache/hub/models--black-forest-labs--FLUX.1-schnell/snapshots/ab/transformer")
    clear.linearize(transformer)
    assert weights_are(transformer, checkpoint_for(transformer, 1, seed=16))
    assert "non-commercial license" in caplog.text
    assert "is not black-forest-labs/FLUX.1-dev by name" not in caplog.text


def test_the_second_time_the_cache_is_used(server, as_flux):
    transformer = as_flux("black-forest-labs/FLUX.1-dev")
    clear.linearize(transformer, 8, revision=fake_hub.COMMIT)
    server.requests.clear()
    clear.linearize(transformer, 8, revision=fake_hub.COMMIT)
    assert not server.requests


@pytest.mark.parametrize("name", ["someone/FLUX.1-dev-anime", "someone/FLUX.1-dev", "", "./trained"])
def test_a_fine_tune_gets_a_warning(server, as_flux, caplog, name):
    transformer = as_flux(name)
    clear.linearize(transformer, 16)
    assert f"{name or 'an unnamed FluxTransformer2DModel'} is not black-forest-labs/FLUX.1-dev by name" in caplog.text
    assert "to_q, to_k, to_v and to_out.0" in caplog.text


def test_a_fine_tuned_transformer_in_the_original_pipeline_gets_a_warning(server, as_flux, caplog):
    pipe = types.SimpleNamespace(
        transformer=as_flux("someone/anime"), config={"_name_or_path": "black-forest-labs/FLUX.1-dev"}
    )
    clear.linearize(pipe, 16)
    assert "someone/anime is not black-forest-labs/FLUX.1-dev by name" in caplog.text


def test_a_named_checkpoint_gets_no_warning(server, as_flux, caplog):
    transformer = as_flux("someone/FLUX.1-Kontext-anime")
    clear.linearize(transformer, weights="Huage001/CLEAR/clear_local_8_down_4.safetensors")
    counted = clear.cost(transformer, 64, 64)
    assert (counted.method.window, counted.method.down_factor) == (8, 4)
    clear.linearize(transformer, 32, weights="Huage001/CLEAR")
    assert weights_are(transformer, checkpoint_for(transformer, 1, seed=32))
    assert "by name" not in caplog.text


def test_a_folder_of_the_hub_needs_no_other_argument(server, transformer):
    clear.linearize(transformer, weights="someone/weights")
    assert clear.cost(transformer, 64, 64).method.window == 5
    clear.linearize(transformer, weights="someone/secret", token=SECRET)


class TestRefusals:
    """Each error leaves the transformer unchanged."""

    @pytest.fixture(autouse=True)
    def untouched(self, transformer):
        before = snapshot(transformer)
        before["config"].pop("_name_or_path", None)
        yield
        transformer._internal_dict = {
            name: value for name, value in transformer.config.items() if name != "_name_or_path"
        }
        assert_same(transformer, before)

    @pytest.mark.parametrize("settings", [{"window": 12}, {"down_factor": 4, "window": 32}, {"down_factor": 2}])
    def test_pairs_that_are_not_published(self, as_flux, settings):
        existing = "window=16, down_factor=1; window=8, down_factor=1; window=32"
        with pytest.raises(ValueError, match=rf"no weights are published for .* there are some for {existing}"):
            clear.linearize(as_flux("black-forest-labs/FLUX.1-dev"), **settings)

    def test_another_method(self, as_flux):
        with pytest.raises(ValueError, match=r"no weights are published for method=LiT.* there are some for window=16"):
            clear.linearize(as_flux("black-forest-labs/FLUX.1-dev"), method=clear.methods.LiT())

    def test_kontext(self, as_flux):
        with pytest.raises(
            ValueError, match=r"a FluxTransformer2DModel, black-forest-labs/FLUX\.1-Kontext-dev; give weights=None"
        ) as raised:
            clear.linearize(as_flux("black-forest-labs/FLUX.1-Kontext-dev"))
        assert_recommends_no_published_weights(raised.value)

    @pytest.mark.parametrize(
        ("weights", "error", "words"),
        [
            (
                "nobody/nothing",
                FileNotFoundError,
                "nobody/nothing is not a local path, and is missing on the Hub or private",
            ),
            ("someone/secret", FileNotFoundError, "or private; .* give token="),
            ("someone/gated", PermissionError, "someone/gated is gated: accept its terms"),
            (
                "someone/refused",
                ConnectionError,
                "the Hub did not give clear_config.json of someone/refused",
            ),
            ("someone/else", FileNotFoundError, r"someone/else has no file clear_config\.json; name one"),
            ("Huage001/CLEAR/clear_local_64.safetensors", FileNotFoundError, "has no file clear_local_64"),
            ("some..one/weights", ValueError, "is not the id of a Hub repository"),
            ("./weights", FileNotFoundError, "'weights' does not exist; give the path"),
            ("../my/weights", FileNotFoundError, "does not exist; give the path"),
            ("weights", FileNotFoundError, "'weights' does not exist; give the path of .* a Hub id"),
            ("folder/weights.safetensors", FileNotFoundError, "does not exist; give the path"),
            ("none", ValueError, "weights='none' does not exist; did you mean weights=None?"),
            ("Auto", ValueError, "weights='Auto' does not exist; did you mean weights='auto'?"),
        ],
    )
    def test_missing_repositories_and_files(self, server, transformer, weights, error, words):
        with pytest.raises(error, match=words):
            clear.linearize(transformer, weights=weights)

    def test_invalid_numbers_are_found_before_the_download(self, server, transformer):
        with pytest.raises(ValueError, match="window must be at least 1, got 0"):
            clear.linearize(transformer, 0, weights="someone/weights")
        assert not server.requests

    def test_a_missing_revision(self, server, transformer):
        with pytest.raises(FileNotFoundError, match="has no revision 'v7'"):
            clear.linearize(transformer, weights="someone/weights", revision="v7")

    def test_offline(self, server, as_flux, monkeypatch):
        transformer = as_flux("black-forest-labs/FLUX.1-dev")
        with clear.linearized(transformer, 8):
            pass
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        forget_sessions()  # before version 1, they remember whether they are offline
        with clear.linearized(transformer, 8):
            pass
        with pytest.raises(
            ConnectionError, match=r"not in the cache, which has \['clear_local_8\.safetensors'\] of it"
        ):
            clear.linearize(transformer, 32)

    def test_a_window_that_is_not_the_weights_own(self, server, transformer):
        with pytest.raises(
            ValueError, match="window=7, down_factor=1 does not fit weights that were distilled for window=5"
        ):
            clear.linearize(transformer, 7, weights="someone/weights")

    def test_interrupted_download(self, server, transformer, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            clear.linearize(transformer, weights="someone/weights")


def assert_recommends_no_published_weights(error):
    words = {each.base_model for each in published.PUBLISHED} | {FLUX_DEV.location.id, *FLUX_DEV.files.values()}
    assert not any(word in str(error) for word in words)


@pytest.mark.parametrize("settings", [{}, {"window": 12}, {"down_factor": 2}, {"method": clear.methods.LiT()}], ids=str)
def test_no_published_weights_are_recommended_for_another_model(family, settings):
    transformer = family.transformer()
    before = snapshot(transformer)
    with pytest.raises(ValueError, match=f"finds none for this model, a {type(transformer).__name__}") as raised:
        clear.linearize(transformer, **settings)
    assert_recommends_no_published_weights(raised.value)
    assert_same(transformer, before)


def test_the_names_of_the_published_files():
    """The names of the files at https://huggingface.co/Huage001/CLEAR, by window and down_factor."""
    for (window, factor), name in PAIRS.items():
        assert name == f"clear_local_{window}{f'_down_{factor}' if factor > 1 else ''}.safetensors"
    assert set(PAIRS) == {(32, 1), (16, 1), (8, 1), (16, 4), (8, 4)}
