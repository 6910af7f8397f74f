"""Published weights: an entry of the list is all that a family needs; errors for a model without any."""

import json
import shutil
from typing import ClassVar

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import clear_attn as clear
from clear_attn import demo
from clear_attn.models import adapter_for
from clear_attn.weights import published
from clear_attn.weights.metadata import CONFIG_FILE, WEIGHTS_FILE
from clear_attn.weights.published import HubRepository, License, PublishedWeights
from clear_attn.weights.recognition import ByName
from tests.helpers import dummy_models, dummy_pipelines, families
from tests.helpers.snapshots import assert_same, snapshot, train

pytestmark = families.needs("qwen")
MODEL = "someone/Qwen-Image"
REPOSITORY = "someone/qwen-image-clear"


def named(name):
    transformer = dummy_models.qwen_transformer()
    transformer.register_to_config(_name_or_path=name)
    return transformer


def weights_are(transformer, folder):
    state = transformer.state_dict()
    return all(torch.equal(state[name], value) for name, value in load_file(folder / WEIGHTS_FILE).items())


@pytest.fixture
def repository(tmp_path):
    """Return a folder as a repository of the Hub, with weights that were trained for two settings."""
    for window, down_factor in ((8, 1), (5, 2)):
        transformer = named(MODEL)
        schedule = clear.Schedule(dense_layers=["transformer_blocks.0"])
        clear.linearize(transformer, window, down_factor, weights=None, schedule=schedule)
        train(transformer)
        clear.save_pretrained(transformer, tmp_path / "repository" / f"window-{window}")
    return tmp_path / "repository"


@pytest.fixture
def entry(repository, monkeypatch):
    """Publish the weights by one entry, and serve the folder in place of the Hub."""
    config = dict(dummy_models.qwen_transformer().config)
    entry = PublishedWeights(
        HubRepository(REPOSITORY),
        {
            clear.methods.Clear(8): f"window-8/{WEIGHTS_FILE}",
            clear.methods.Clear(5, 2): f"window-5/{WEIGHTS_FILE}",
        },
        ByName("QwenImageTransformer2DModel", {"num_layers": config["num_layers"]}, names=(MODEL,)),
        base_model=MODEL,
        license=License("someone-1", "of someone, and under their license"),
    )

    def download(repo, file, *, revision, token):
        assert (repo, revision, token) == (REPOSITORY, "v1", "secret")
        return str(repository / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(published, "PUBLISHED", [*published.PUBLISHED, entry])
    return entry


HUB = {"revision": "v1", "token": "secret"}


class TestAnEntry:
    @pytest.mark.parametrize(
        "name", [MODEL, "/cache/models--someone--Qwen-Image/snapshots/ab/transformer", "Qwen-Image"]
    )
    def test_the_model_takes_the_first_weights(self, entry, repository, name, caplog):
        transformer = clear.linearize(named(name), **HUB)
        assert weights_are(transformer, repository / "window-8")
        info = clear.info(transformer)
        assert info.method == clear.methods.Clear(8)
        assert info.schedule.dense_layers == ("transformer_blocks.0",)
        assert info.weights == info.source == f"{REPOSITORY}/window-8/{WEIGHTS_FILE}"
        assert "weights of someone, and under their license" in caplog.text

    @pytest.mark.parametrize("settings", [{"window": 5}, {"down_factor": 2}, {"method": clear.methods.Clear(5, 2)}])
    @pytest.mark.parametrize("weights", ["auto", REPOSITORY, f"{REPOSITORY}/window-5/{WEIGHTS_FILE}"])
    def test_the_settings_choose_the_file(self, entry, repository, settings, weights):
        transformer = clear.linearize(named(MODEL), **settings, weights=weights, **HUB)
        assert weights_are(transformer, repository / "window-5")
        assert clear.info(transformer).method == clear.methods.Clear(5, 2)

    def test_a_pipeline(self, entry, repository):
        pipe = dummy_pipelines.qwen(dummy_pipelines.diffusers.QwenImagePipeline)
        pipe.transformer.register_to_config(_name_or_path=MODEL)
        assert weights_are(clear.linearize(pipe, **HUB).transformer, repository / "window-8")

    @pytest.mark.parametrize("settings", [{"window": 16}, {"method": clear.methods.Swin(4)}], ids=str)
    def test_other_settings(self, entry, settings):
        transformer = named(MODEL)
        before = snapshot(transformer)
        message = f"for {MODEL} there are some for window=8, down_factor=1; window=5, down_factor=2; give one of these"
        with pytest.raises(ValueError, match=message):
            clear.linearize(transformer, **settings, **HUB)
        assert_same(transformer, before)

    @pytest.mark.parametrize("name", ["", "someone/Qwen-Image-anime", "else/Qwen-Image", "Qwen-Image-Edit"])
    def test_other_models_with_the_same_architecture(self, entry, name):
        with pytest.raises(ValueError, match="finds none for this model, a QwenImageTransformer2DModel") as raised:
            clear.linearize(named(name), **HUB)
        assert REPOSITORY not in str(raised.value)

    def test_the_same_name_with_another_config(self, entry):
        transformer = named(MODEL)
        transformer.register_to_config(num_layers=60)
        with pytest.raises(ValueError, match=f"finds none for this model, a QwenImageTransformer2DModel, {MODEL}"):
            clear.linearize(transformer, **HUB)

    def test_the_other_models_of_the_list_are_as_before(self, entry):
        assert clear.info(clear.linearize(demo.pipeline())).source.startswith(demo.distilled().parent.name)

    def test_what_is_saved_of_them_has_their_license(self, entry, tmp_path):
        transformer = clear.linearize(named(MODEL), **HUB)
        clear.save_pretrained(transformer, tmp_path / "copy")
        card = (tmp_path / "copy" / "README.md").read_text()
        assert "license_name: someone-1" in card
        assert f"base_model: {MODEL}" in card
        record = json.loads((tmp_path / "copy" / CONFIG_FILE).read_text())
        assert (record["base_model"], record["model"], record["source"]) == (
            MODEL,
            MODEL,
            f"{REPOSITORY}/window-8/{WEIGHTS_FILE}",
        )


def test_a_repository_of_anyone(repository, monkeypatch):
    """It needs no entry if it is given by its id."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copy(repository / "window-5" / file, repository)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **_: str(repository / file))
    transformer = clear.linearize(named(""), weights="nobody/known")
    assert weights_are(transformer, repository)


class TestTrainingFacts:
    FACTS: ClassVar = {"steps": 600, "resolution": 128, "loss_weights": {"attention": 0.5}}

    @pytest.fixture
    def folder(self, repository):
        file = repository / "window-5" / CONFIG_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), "training": self.FACTS}))
        return file.parent

    @staticmethod
    def facts_in(folder):
        return json.loads((folder / CONFIG_FILE).read_text())["training"]

    def test_they_stay_with_the_weights(self, folder, tmp_path):
        transformer = clear.linearize(named(""), weights=folder)
        clear.save_pretrained(transformer, tmp_path / "copy")
        assert self.facts_in(tmp_path / "copy") == self.FACTS
        card = (tmp_path / "copy" / "README.md").read_text()
        assert "- steps: 600" in card

    def test_weights_that_were_trained_since_have_none(self, folder, tmp_path):
        transformer = clear.linearize(named(""), weights=folder)
        with torch.no_grad():
            transformer.transformer_blocks[0].attn.to_q.weight.add_(1)
        clear.save_pretrained(transformer, tmp_path / "copy")
        assert self.facts_in(tmp_path / "copy") is None


@families.each_family()
def test_a_model_without_weights(family):
    """The error says what to do: train, if that can be done, or which window is right without."""
    transformer = family.transformer()
    with pytest.raises(ValueError, match=r"give weights=None for its own \(training-free\)") as raised:
        clear.linearize(transformer)
    message = str(raised.value)
    assert ("python -m clear_attn.distill" in message) == (adapter_for(transformer).training is not None)
    assert "window=90 for 64 x 64 tokens, if that is its size" in message


@pytest.mark.parametrize(
    ("make", "side"),
    [
        (lambda: dummy_models.sd3_pipeline(), 64 // 8),
        (lambda: dummy_pipelines.krea2(), 1024 // 16),
        (lambda: dummy_pipelines.qwen(dummy_pipelines.diffusers.QwenImagePipeline), 1024 // 16),
    ],
    ids=["Stable Diffusion 3", "Krea 2", "Qwen-Image"],
)
def test_the_window_that_covers_the_native_grid(make, side):
    try:
        pipe = make()
    except AttributeError as error:
        pytest.skip(f"diffusers has no such pipeline yet: {error}")
    with pytest.raises(ValueError, match=f"for its {side} x {side} tokens") as raised:
        clear.linearize(pipe)
    window = int(str(raised.value).split("window=")[1].split()[0])
    assert clear.methods.Clear(window).covers((side, side))
    assert not clear.methods.Clear(window - 1).covers((side, side))
