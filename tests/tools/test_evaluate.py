"""The evaluation of linearized weights: metrics compared with formulas, output files, errors."""

import errno
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
    modeling_utils,
)
from transformers.integrations import peft
from transformers.models.auto import auto_factory
from typer.testing import CliRunner

import clear_attn as clear
from clear_attn import demo
from clear_attn.tools import options
from clear_attn.tools.cli import app
from clear_attn.tools.evaluate import Evaluation, evaluate, evaluation
from clear_attn.tools.evaluate.embeddings import Clip, Dino
from clear_attn.tools.evaluate.evaluation import read_images
from clear_attn.tools.evaluate.fingerprint import describe_sources, fingerprint
from clear_attn.tools.evaluate.metric_registry import Sources, check_enough_for_fid, make_metrics
from clear_attn.tools.evaluate.metrics import Batch, Frechet, Mean, lpips, psnr, ssim
from clear_attn.tools.evaluate.unfinished import LOCK, check_output, locked
from clear_attn.utils import atomic, optional_dependencies, seeded_images
from clear_attn.utils.image_sheets import CELL
from tests.helpers import dummy_models, dummy_pipelines
from tests.helpers.image_processors import pillow_processor
from tests.helpers.modular_pipelines import needs_modular_pipelines

PROMPTS = ["a red circle on a blue ground, in the middle", "a white cross", "a green square on a black ground"]
CALL = {"height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 24}
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def nothing_in_the_caches(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))


@pytest.fixture(scope="session")
def feature_models(tmp_path_factory):
    """Return a folder with a random CLIP, DINOv2 and DINO (without pooler)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("feature_models")
    tokenizer = dummy_models.random_flux().tokenizer
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **ids}
    # With small weights, random models give the same features for all images.
    vision = {**TINY, "image_size": 32, "patch_size": 8, "initializer_range": 0.7, "initializer_factor": 20.0}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(**vision)).save_pretrained(folder / "dinov2")
    ViTModel(ViTConfig(**vision), add_pooling_layer=False).save_pretrained(folder / "dino")
    for name in ("clip", "dinov2"):
        pillow_processor("CLIP")(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
            folder / name
        )
    pillow_processor("ViT")(size={"height": 32, "width": 32}).save_pretrained(folder / "dino")
    return folder


def train(pipe):
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(1.001)


def random_images(count=3, height=24, width=40, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=rng)


def near(images, seed=1):
    noise = torch.randint(-20, 21, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + noise).clamp(0, 255).to(torch.uint8)


def reference_psnr(a, b):
    return 10 * np.log10(1 / np.mean((a / 255 - b / 255) ** 2))


def reference_ssim(a, b):
    """Wang et al. 2004, equation 13, over windows of 11 x 11 that are reflected at the border, channel by channel."""
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2

    def mean(x):
        x = np.pad(x, ((0, 0), (5, 5), (5, 5)), mode="reflect")
        return (np.lib.stride_tricks.sliding_window_view(x, (11, 11), (1, 2)) * weights).sum((-1, -2))

    a, b = a / 255, b / 255
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()


class TestMetrics:
    def test_psnr_and_ssim(self):
        teacher = random_images()
        batch = Batch(teacher, near(teacher), PROMPTS)
        for score, plain in ((psnr, reference_psnr), (ssim, reference_ssim)):
            expected = [plain(*pair) for pair in zip(*(x.double().numpy() for x in batch[:2]), strict=True)]
            assert score(batch)["student"].tolist() == pytest.approx(expected, rel=2e-4)

    def test_a_mean_over_batches_of_different_sizes(self):
        teacher = random_images()
        whole, parts = Mean(psnr), Mean(psnr)
        whole.update(Batch(teacher, near(teacher), PROMPTS))
        for part in (slice(0, 2), slice(2, 3)):
            parts.update(Batch(teacher[part], near(teacher)[part], PROMPTS[part]))
        assert parts.per_image["student"] == pytest.approx(whole.per_image["student"])
        assert parts.compute()["student"] == pytest.approx(fmean(whole.per_image["student"]))

    def test_frechet(self):
        class Corner(torch.nn.Module):
            num_features = 4

            def forward(self, images):
                return images.double().flatten(1)[:, :4] / 255

        from torchmetrics.image.fid import FrechetInceptionDistance

        teacher, student = random_images(30), random_images(30, seed=5) // 2
        metric = Frechet(FrechetInceptionDistance(Corner()))
        for part in (slice(0, 20), slice(20, 30)):
            metric.update(Batch(teacher[part], student[part], PROMPTS))
        x, y = Corner()(teacher).numpy(), Corner()(student).numpy()
        c, d = np.cov(x.T), np.cov(y.T)
        root = np.sqrt(np.linalg.eigvals(c @ d).real).sum()
        expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * root
        assert expected > 0.1
        assert metric.compute() == {"student": pytest.approx(expected, rel=1e-6)}

    def test_fid_needs_more_images_than_features(self):
        check_enough_for_fid(2049, 2048)
        with pytest.raises(optional_dependencies.Missing, match=r"more images than the 2048 features .* here 2048"):
            check_enough_for_fid(2048, 2048)

    def test_lpips_gets_pixels_from_0_to_1(self):
        teacher = random_images()
        batch = Batch(teacher, near(teacher), PROMPTS)

        class Distance(torch.nn.Module):
            def forward(self, a, b):
                return (a - b).abs().mean((1, 2, 3), keepdim=True)

        found = lpips(Distance())(batch)["student"]
        expected = [
            np.abs(a / 255 - b / 255).mean() for a, b in zip(teacher.numpy(), batch.student.numpy(), strict=True)
        ]
        assert found.tolist() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("name", ["dino", "dinov2"])
    def test_dino(self, feature_models, name):
        teacher = random_images()
        student = random_images(seed=3)
        metric = make_metrics(["dino"], Sources(PROMPTS, "", str(feature_models / name), False))[0]["dino"]
        with torch.inference_mode():
            metric.update(Batch(teacher, student, PROMPTS))
        maker, kind = ("ViT", ViTModel) if name == "dino" else ("CLIP", Dinov2Model)
        processor, model = (
            pillow_processor(maker).from_pretrained(feature_models / name),
            kind.from_pretrained(feature_models / name).eval(),
        )

        def token(pixels):
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            return model(**processor(image, return_tensors="pt")).last_hidden_state[0, 0].detach()

        expected = [
            100 * F.cosine_similarity(token(a), token(b), dim=0).item() for a, b in zip(teacher, student, strict=True)
        ]
        assert metric.per_image["student"] == pytest.approx(expected, rel=1e-4)
        assert max(expected) < 99.9

    def test_clip(self, feature_models):
        teacher = random_images()
        student = near(teacher)
        names = ["clip_i", "clip_t"]
        metrics, _ = make_metrics(names, Sources(PROMPTS, str(feature_models / "clip"), "", False))
        with torch.inference_mode():
            for metric in metrics.values():
                metric.update(Batch(teacher, student, PROMPTS))
        processor = pillow_processor("CLIP").from_pretrained(feature_models / "clip")
        model, tokenizer = (
            CLIPModel.from_pretrained(feature_models / "clip").eval(),
            dummy_models.random_flux().tokenizer,
        )
        for number, prompt in enumerate(PROMPTS):
            images = [Image.fromarray(x[number].permute(1, 2, 0).numpy()) for x in (teacher, student)]
            with torch.inference_mode():
                out = model(**processor(images, return_tensors="pt"), **tokenizer(prompt, return_tensors="pt"))
            of_teacher, of_student = F.normalize(out.image_embeds, dim=-1)
            text = F.normalize(out.text_embeds[0], dim=-1)
            found = [
                metrics["clip_i"].per_image["student"][number],
                metrics["clip_t"].per_image["teacher"][number],
                metrics["clip_t"].per_image["student"][number],
            ]
            expected = [
                100 * float(a @ b) for a, b in ((of_teacher, of_student), (text, of_teacher), (text, of_student))
            ]
            assert found == pytest.approx(expected, rel=1e-4)

    def test_prompts_that_clip_truncates_are_named(self, feature_models):
        long = "a red circle on a blue ground, at the top left " * 3
        with pytest.warns(UserWarning, match="1 of 2 prompts have more than the 24 tokens"):
            metrics, _ = make_metrics(["clip_t"], Sources([long, "a cross"], str(feature_models / "clip"), "", False))
        metrics["clip_t"].update(Batch(random_images(2), random_images(2), [long, "a cross"]))


class TestOptionalDependencies:
    def test_a_package(self, monkeypatch):
        for name in ("torchmetrics", "torchmetrics.functional.image"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(RuntimeError, match="metrics cannot be computed") as caught:
            make_metrics(None, Sources(PROMPTS, "no/clip", "no/dino", False))
        for reason in (
            "psnr: torchmetrics is not installed: pip install torchmetrics",
            "clip_i: no/clip is no folder and not in the cache of the Hugging Face Hub; download=True downloads it",
            "dino: no/dino is no folder",
            "fid: it takes more images",
        ):
            assert f"\n  {reason}" in str(caught.value)

    def test_incomplete_weights(self, feature_models, tmp_path):
        model = Dinov2Model.from_pretrained(feature_models / "dinov2")
        model.save_pretrained(tmp_path)
        values = load_file(tmp_path / "model.safetensors")
        gone = next(name for name in values if "attention" in name)
        save_file(
            {name: x for name, x in values.items() if name != gone}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(optional_dependencies.Missing, match=r"lacks weights of a Dinov2Model, encoder\.layer\.0"):
            Dino(str(tmp_path), False)

    def test_a_model_that_is_not_clip(self, feature_models):
        with pytest.raises(optional_dependencies.Missing, match="is a Dinov2Model, not a CLIP"):
            Clip(str(feature_models / "dinov2"), False)

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(optional_dependencies.Missing, match="does not hold what is needed"):
            Dino(str(tmp_path), False)

    def test_downloads_only_if_asked_and_online(self):
        with pytest.raises(optional_dependencies.Missing, match="not in the cache"):
            Dino("no/dino", False)
        with pytest.raises(optional_dependencies.Missing, match="cannot be downloaded"):  # the Hub is off in tests
            Dino("no/dino", True)

    def test_transformers_looks_for_no_adapter_online(self, monkeypatch):
        asked = []
        monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **options: ViTConfig(**TINY))
        for module in (auto_factory, modeling_utils, peft):  # transformers 4 and 5
            monkeypatch.setattr(
                module, "find_adapter_config_file", lambda name, **options: asked.append(options), raising=False
            )
        with pytest.raises(optional_dependencies.Missing):
            optional_dependencies.pretrained_model("no/dino", False)
        assert asked
        assert all(options["local_files_only"] for options in asked)

    def test_files_of_torch(self, tmp_path, monkeypatch):
        monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
        url, folder = "https://nowhere.invalid/net.pth", tmp_path / "hub" / "checkpoints"
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(optional_dependencies.Missing, match=r"Net's weights are not here \(.*net.pth\)"):  # noqa: SIM117
            with optional_dependencies.torch_hub_file(url, "Net", False):
                pytest.fail("nothing may be downloaded")

        class Command:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "made"),))

        folder.mkdir(parents=True)
        torch.save({"a": Command()}, folder / "net.pth")
        with pytest.raises(optional_dependencies.Missing, match="holds more than tensors"):  # noqa: SIM117
            with optional_dependencies.torch_hub_file(url, "Net", False):
                torch.hub.load_state_dict_from_url(url)
        assert not (tmp_path / "made").exists()
        torch.save({"a": torch.ones(3)}, folder / "net.pth")
        with optional_dependencies.torch_hub_file(url, "Net", False):
            assert torch.hub.load_state_dict_from_url(url)["a"].sum() == 3
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


class TestEvaluate:
    def test_a_whole_evaluation(self, pipe, feature_models, tmp_path):
        before = {name: p.clone() for name, p in pipe.transformer.named_parameters()}
        out = tmp_path / "deep" / "out"
        found = evaluate(
            pipe,
            PROMPTS,
            out,
            weights=None,
            window=2,
            seed=7,
            batch_size=2,
            clip=str(feature_models / "clip"),
            dino=str(feature_models / "dino"),
            save_images=True,
            **CALL,
        )
        assert sorted(path.name for path in out.iterdir()) == ["contact_sheet.png", "eval.json", "student", "teacher"]
        assert not clear.is_linearized(pipe)
        assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())

        def draw(number):
            rng = torch.Generator().manual_seed(7 + number)
            return np.asarray(pipe(PROMPTS[number], generator=rng, **CALL).images[0]).astype(int)

        files = {row: sorted((out / row).iterdir()) for row in ("teacher", "student")}
        drawn = {row: read_images(each).numpy() for row, each in files.items()}
        assert drawn["teacher"].shape == (3, 3, 64, 96)
        for number in (1, 2):  # one of each batch, which may round differently
            assert abs(drawn["teacher"][number].transpose(1, 2, 0) - draw(number)).max() <= 1
            with clear.linearized(pipe, 2, weights=None):
                assert abs(drawn["student"][number].transpose(1, 2, 0) - draw(number)).max() <= 1
        assert np.mean(drawn["student"] != drawn["teacher"]) > 0.1

        written = strict_json((out / "eval.json").read_text())
        assert written["settings"]["method"]["settings"]["window"] == 2
        assert written["settings"]["weights"] is None
        assert written["versions"]["torch"] == importlib.metadata.version("torch")
        images = written["images"]
        assert [(each["prompt"], each["seed"]) for each in images] == [(PROMPTS[n], 7 + n) for n in range(3)]
        for name, plain in (("psnr", reference_psnr), ("ssim", reference_ssim)):
            expected = [plain(*pair) for pair in zip(drawn["teacher"] / 1.0, drawn["student"] / 1.0, strict=True)]
            assert [each["student"][name] for each in images] == pytest.approx(expected, rel=1e-3)
        clip = Clip(str(feature_models / "clip"), False)
        for row in ("teacher", "student"):
            expected = 100 * (clip.images(read_images(files[row])) * clip.texts(PROMPTS)).sum(1)
            assert [each[row]["clip_t"] for each in images] == pytest.approx(expected.tolist(), rel=1e-4)
        assert images[0]["teacher"].keys() == {"clip_t"}
        for name in ("psnr", "ssim", "clip_i", "dino", "clip_t"):
            assert written["metrics"][name]["student"] == pytest.approx(fmean(p["student"][name] for p in images))
        assert written["metrics"]["clip_t"]["teacher"] != written["metrics"]["clip_t"]["student"]
        assert "more images than the 2048 features" in written["metrics"]["fid"]["missing"]
        assert re.search("torchvision is not installed|weights are not here", written["metrics"]["lpips"]["missing"])
        for row in ("teacher", "student"):
            assert 0 < written["seconds"][row]["per_image"] < written["seconds"][row]["total"]

        table = str(found)
        assert "3 images of 96 x 64 px" in table
        assert f"{found.means['psnr']['student']:.2f}" in table
        assert "FID is missing: it takes more images" in table
        assert "CLEAR, window=2, down_factor=1, training-free" in table
        assert Image.open(out / "contact_sheet.png").size[0] > 3 * CELL

    def test_named_metrics_and_distilled_weights(self, pipe, tmp_path):
        student = dummy_models.flux_pipeline()
        clear.linearize(student, 3, 2, weights=None)
        with torch.no_grad():
            for layer, attn in student.transformer.named_modules():
                if layer.endswith(".attn"):
                    attn.to_q.weight.mul_(0.5)
        clear.save_pretrained(student, tmp_path / "weights")
        found = evaluate(pipe, PROMPTS[:1], tmp_path / "out", weights=tmp_path / "weights", metrics=["ssim"], **CALL)
        assert found.settings["method"] == clear.methods.Clear(3, 2).to_dict()
        assert found.settings["weights"] == "weights"  # without the path, because the file is shared
        assert list(found.means) == ["ssim"]
        assert not found.missing
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["contact_sheet.png", "eval.json"]
        rng = torch.Generator().manual_seed(0)
        draw = [
            np.asarray(each(PROMPTS[0], generator=rng.manual_seed(0), **CALL).images[0]) for each in (pipe, student)
        ]
        expected = reference_ssim(*(each.transpose(2, 0, 1).astype(float) for each in draw))
        assert found.means["ssim"]["student"] == pytest.approx(expected, rel=1e-3)

    def test_the_small_flux_from_a_folder_has_its_size_text_length_and_weights(self, tmp_path):
        pipe = DiffusionPipeline.from_pretrained(demo.path())
        found = evaluate(pipe, PROMPTS[:1], tmp_path / "out", metrics=["psnr"], num_inference_steps=1)
        assert [found.settings[side] for side in ("height", "width")] == [demo.SIZE, demo.SIZE]
        assert found.settings["max_sequence_length"] == demo.TEXT_TOKENS
        linearized = clear.info(clear.linearize(pipe))
        assert (found.settings["method"], found.settings["weights"]) == (linearized.method.to_dict(), linearized.source)

    def test_sd3(self, tmp_path):
        call = {**CALL, "height": 32, "width": 48}
        found = evaluate(
            dummy_models.sd3_pipeline(), PROMPTS[:1], tmp_path, weights=None, window=1, metrics=["psnr"], **call
        )
        assert 0 < found.means["psnr"]["student"] < 100

    def test_the_psnr_of_equal_images_is_infinite(self):
        images = random_images()
        metric = Mean(psnr)
        metric.update(Batch(images, images, PROMPTS))
        settings = {"width": 40, "height": 24, "method": clear.methods.Clear(8).to_dict(), "weights": None}
        seconds = {row: {"total": 1.0, "per_image": 0.5} for row in ("teacher", "student")}
        found = Evaluation(settings, {}, seconds, {"psnr": metric.compute()}, {}, [])
        assert strict_json(found.to_json())["metrics"]["psnr"]["student"] == "inf"
        assert " inf " in str(found)

    def test_an_interruption_leaves_no_files(self, pipe, tmp_path, monkeypatch):
        calls, original = [], FluxPipeline.__call__

        def interrupted(self, *args, **kwargs):
            calls.append(clear.is_linearized(pipe))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        monkeypatch.setattr(FluxPipeline, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(pipe, PROMPTS, tmp_path / "out", weights=None, save_images=True, **CALL)
        assert calls == [True, True]
        assert not clear.is_linearized(pipe)
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_at_the_end_loses_no_images(self, pipe, tmp_path, monkeypatch):
        def full(path, *args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(evaluation, "atomic_file", full)
        call = {**CALL, "num_inference_steps": 1}
        with pytest.warns(UserWarning, match=r"out/contact_sheet\.png could not be written \(No space left on device"):
            evaluate(pipe, PROMPTS[:1], tmp_path / "out", weights=None, metrics=["psnr"], **call)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval.json", "unfinished"]
        with monkeypatch.context() as patched:
            patched.setattr(evaluation, "atomic_text", full)
            with pytest.warns(UserWarning, match="2 of 2 images are kept in .*the same arguments with resume=True"):
                found = evaluate(
                    pipe, PROMPTS[:1], tmp_path / "out", weights=None, metrics=["psnr"], resume=True, **call
                )
        assert found.means["psnr"]["student"] > 0
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished"]
        monkeypatch.setattr(evaluation, "atomic_file", atomic.atomic_file)
        monkeypatch.setattr(FluxPipeline, "__call__", lambda *args, **kwargs: pytest.fail("it drew"))
        evaluate(pipe, PROMPTS[:1], tmp_path / "out", weights=None, metrics=["psnr"], resume=True, **call)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["contact_sheet.png", "eval.json"]

    def test_one_evaluation_at_a_time_in_a_folder(self, pipe, tmp_path, monkeypatch):
        out, generate, refused = tmp_path / "out", seeded_images.generate_with_seeds, []
        other = dummy_models.flux_pipeline()
        call = {"weights": None, "metrics": ["psnr"], **CALL, "num_inference_steps": 1}

        def another_starts(*args, **each):
            assert (out / "unfinished").is_dir()
            for resume in (False, True):
                with pytest.raises(FileExistsError, match="out is being evaluated by another process; wait for it"):
                    evaluate(other, PROMPTS[:1], out, resume=resume, **call)
                refused.append(resume)
            return generate(*args, **each)

        monkeypatch.setattr(seeded_images, "generate_with_seeds", another_starts)
        evaluate(pipe, PROMPTS[:1], out, **call)
        assert refused == [False, True] * 2
        assert sorted(path.name for path in out.iterdir()) == ["contact_sheet.png", "eval.json"]

    def test_the_lock_of_a_killed_evaluation_is_no_content(self, tmp_path):
        (tmp_path / LOCK).touch()
        with locked(tmp_path):
            check_output(tmp_path, resume=False)
        assert list(tmp_path.iterdir()) == []

    def test_an_error_under_the_lock_leaves_no_new_folders(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no unfinished evaluation"), locked(tmp_path / "new" / "out"):
            check_output(tmp_path / "new" / "out", resume=True)
        assert list(tmp_path.iterdir()) == []

    def test_a_kill_leaves_a_folder_that_can_be_evaluated_to_or_resumed(self, tmp_path):
        folder = tmp_path / "out" / "unfinished"
        folder.mkdir(parents=True)  # killed before the settings were written
        check_output(tmp_path / "out", resume=False)
        assert not folder.exists()
        (folder / "student").mkdir(parents=True)
        (folder / "student" / "00000.png").write_bytes(b"")
        with pytest.raises(FileExistsError, match="holds something already"):  # killed while they were deleted
            check_output(tmp_path / "out", resume=False)
        (folder / "settings.json").write_text("{}")
        check_output(tmp_path / "out", resume=True)
        with pytest.raises(FileExistsError, match="go on with resume=True"):
            check_output(tmp_path / "out", resume=False)

    @pytest.mark.parametrize("killed_at", ["unfinished/student", "unfinished/teacher", "unfinished/settings.json"])
    def test_goes_on_after_a_kill_while_images_are_moved(self, pipe, tmp_path, monkeypatch, killed_at):
        def killed(method):
            def call(path, *args, **given):
                if path == tmp_path / killed_at:
                    raise KeyboardInterrupt
                return method(path, *args, **given)

            return call

        given = {"weights": None, "metrics": ["psnr"], "save_images": True, **CALL}
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", killed(Path.replace))
            patched.setattr(Path, "unlink", killed(Path.unlink))
            with pytest.raises(KeyboardInterrupt):
                evaluate(pipe, PROMPTS[:2], tmp_path, **given)
        monkeypatch.setattr(seeded_images, "generate_with_seeds", lambda *args, **each: pytest.fail("it draws again"))
        evaluate(pipe, PROMPTS[:2], tmp_path, resume=True, **given)
        assert {path.name for path in tmp_path.iterdir()} == {"contact_sheet.png", "eval.json", "student", "teacher"}
        assert len(list(tmp_path.glob("*/*.png"))) == 4

    def test_goes_on_from_the_images_that_a_full_disk_left(self, pipe, tmp_path, monkeypatch):
        given = {"weights": None, "window": 2, "batch_size": 2, "save_images": True, **CALL}
        expected = evaluate(pipe, PROMPTS, tmp_path / "expected", metrics=["psnr"], **given)
        out, unfinished, calls = tmp_path / "out", tmp_path / "out" / "unfinished", []
        with pytest.raises(FileNotFoundError, match="has no unfinished evaluation; leave resume=True out"):
            evaluate(pipe, PROMPTS, out, resume=True, **given)

        def full(path):
            if path == unfinished / "teacher" / "00001.png":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return atomic.atomic_file(path)

        with monkeypatch.context() as patched:
            patched.setattr(seeded_images, "atomic_file", full)
            with (
                pytest.raises(OSError, match=r"No space left on device.*00001\.png"),
                pytest.warns(UserWarning, match=f"4 of 6 images are kept in {unfinished}; the same arguments with res"),
            ):
                evaluate(pipe, PROMPTS, out, metrics=["psnr"], **given)
        assert not clear.is_linearized(pipe)
        taken = seeded_images.seconds_of(unfinished / "student" / "00000.png")
        with pytest.raises(FileExistsError, match="holds an unfinished evaluation; go on with resume=True"):
            evaluate(pipe, PROMPTS, out, **given)
        with monkeypatch.context() as patched:
            patched.setattr(evaluation, "make_metrics", lambda *args: pytest.fail("it loads metrics"))
            with pytest.raises(ValueError, match=r"seed must be the same \(was 0, is 1\), window must be "):
                evaluate(pipe, PROMPTS, out, resume=True, seed=1, **{**given, "window": 3})
        generate = seeded_images.generate_with_seeds
        monkeypatch.setattr(
            seeded_images, "generate_with_seeds", lambda *args, **each: calls.append(args[1]) or generate(*args, **each)
        )
        found = evaluate(pipe, PROMPTS, out, metrics=["psnr", "ssim"], resume=True, **given)
        assert calls == [range(0, 2), range(2, 3)]  # of the teacher, in whole batches
        assert found.means["psnr"] == expected.means["psnr"]
        assert found.seconds["student"]["total"] >= taken
        assert sorted(path.name for path in out.iterdir()) == ["contact_sheet.png", "eval.json", "student", "teacher"]

    @pytest.mark.parametrize(
        ("change", "differs"),
        [
            (
                lambda pipe: pipe.transformer.register_to_config(_name_or_path="b/model"),
                "model must be the same (was '/",
            ),
            (train, "transformer must be the same (was "),
            (lambda pipe: pipe.unload_lora_weights(), "adapters must be the same (was ['style'], is [])"),
            (lambda pipe: pipe.set_adapters("style", 0.5), "adapter_scales must be the same (was ['style * 1.0'], is"),
            (lambda pipe: pipe.scheduler.register_to_config(shift=2.5), "scheduler must be the same"),
        ],
        ids=["folder", "values", "lora", "scale", "scheduler"],
    )
    def test_resumes_with_the_same_model_alone(self, tmp_path, monkeypatch, change, differs):
        def full(path):
            if path.name == "00001.png":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return atomic.atomic_file(path)

        pipe = dummy_models.flux_pipeline()
        pipe.transformer.register_to_config(_name_or_path="a/model")
        pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]), "style")
        call = {"weights": None, "metrics": ["psnr"], **CALL, "num_inference_steps": 1}
        with monkeypatch.context() as patched:
            patched.setattr(seeded_images, "atomic_file", full)
            with pytest.raises(OSError, match="No space left"), pytest.warns(UserWarning, match="1 of 4 images"):
                evaluate(pipe, PROMPTS[:2], tmp_path / "out", **call)
        before = (tmp_path / "out" / "unfinished" / "settings.json").read_bytes()
        change(pipe)
        with pytest.raises(ValueError, match=re.escape(differs)):
            evaluate(pipe, PROMPTS[:2], tmp_path / "out", resume=True, **call)
        assert (tmp_path / "out" / "unfinished" / "settings.json").read_bytes() == before

    def test_other_weights_at_the_same_path_have_another_fingerprint(self, pipe, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        found = []
        for value in (1.0, 2.0):
            save_file({"a": torch.full((5000,), value)}, "weights.safetensors")
            found.append(describe_sources(pipe, pipe.transformer, "weights.safetensors"))
        assert found[0].pop("weights_file") != found[1].pop("weights_file")
        assert found[0] == found[1]
        assert found[0]["weights"] == str(tmp_path / "weights.safetensors")

    def test_quantized_values_have_a_fingerprint(self):
        quantization = pytest.importorskip("torchao.quantization")

        def quantized(value):
            layer = torch.nn.Sequential(torch.nn.Linear(64, 64))
            torch.nn.init.constant_(layer[0].weight, value)
            quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
            return fingerprint({"weight": layer[0].weight})

        assert quantized(1.0) == quantized(1.0) != quantized(2.0)

    def test_tensors_without_values_have_a_fingerprint(self):
        meta = [fingerprint({"a": torch.empty(3, device="meta", dtype=each)}) for each in (torch.half, torch.half)]
        assert meta[0] == meta[1] != fingerprint({"a": torch.zeros(3, dtype=torch.half)})

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"prompts": []}, ValueError, "prompts is empty"),
            ({"prompts": "a circle"}, TypeError, "prompts must be a list of strings, got 'a circle'"),
            ({"height": 7}, ValueError, "less than one token of 8 px"),
            ({"width": 0}, ValueError, "width must be at least 1, got 0"),
            ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
            ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be at least 1"),
            ({"max_sequence_length": 513}, ValueError, "`max_sequence_length` cannot be greater than 512"),
            ({"seed": -1}, ValueError, "seed must be at least 0"),
            ({"metrics": ["psnr", "nice"]}, ValueError, "'nice' is not a metric; there is fid, lpips"),
            ({"metrics": ["psnr", "fid"]}, RuntimeError, "fid: it takes more images"),
            ({"metrics": []}, RuntimeError, "none was asked for"),
            ({"metrics": ["lpips"]}, RuntimeError, "metrics cannot be computed:\n  lpips: "),
            ({"metrics": ["clip_t"], "clip": "no/clip"}, RuntimeError, "no/clip is no folder and not in the cache"),
            ({"weights": "auto"}, ValueError, "weights='auto' finds none for this model, a FluxTransformer2DModel"),
            ({"weights": "nowhere.safetensors"}, FileNotFoundError, "nowhere.safetensors"),
            ({"window": 0}, ValueError, "window must be at least 1"),
            ({"backend": "fast"}, ValueError, "fast"),
        ],
    )
    def test_errors_come_before_the_work(self, pipe, tmp_path, monkeypatch, change, error, message):
        monkeypatch.setattr(FluxPipeline, "__call__", lambda *args, **kwargs: pytest.fail("it drew"))
        given = {"prompts": PROMPTS, "weights": None, "clip": "no/clip", "dino": "no/dino", **CALL, **change}
        with pytest.raises(error, match=re.escape(message)):
            evaluate(pipe, output_dir=tmp_path / "out", **given)
        assert not clear.is_linearized(pipe)
        assert list(tmp_path.iterdir()) == []

    def test_folders_that_are_not_empty(self, pipe, tmp_path):
        (tmp_path / "eval.json").write_text("{}")
        with pytest.raises(FileExistsError, match="holds something already"):
            evaluate(pipe, PROMPTS, tmp_path, weights=None, metrics=["psnr"])
        with pytest.raises(NotADirectoryError, match="is a file"):
            evaluate(pipe, PROMPTS, tmp_path / "eval.json", weights=None, metrics=["psnr"])
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("eval.json", "{}")]

    def test_invalid_teachers(self, pipe, tmp_path):
        with pytest.raises(TypeError, match=r"must be a diffusers pipeline, .* got a FluxTransformer2DModel"):
            evaluate(pipe.transformer, PROMPTS, tmp_path)
        clear.linearize(pipe, 4, weights=None)
        with pytest.raises(ValueError, match="this pipeline is linearized"):
            evaluate(pipe, PROMPTS, tmp_path, weights=None)
        assert clear.is_linearized(pipe)


class TestCommand:
    @pytest.fixture
    def run(self, flux_folder):
        """Return a function that runs the command, by default with the random FLUX."""
        usual = {"model": flux_folder, "weights": "none", "height": 64, "width": 64, "max-sequence-length": 24}

        def run(*options, **given):
            named = [word for name, value in (usual | given).items() for word in (f"--{name}", str(value))]
            return CliRunner().invoke(app, ["eval", *named, *options])

        return run

    @pytest.fixture
    def prompts(self, tmp_path):
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(["", *PROMPTS, ""]))
        return file

    def test_it_evaluates(self, run, prompts, tmp_path):
        out = tmp_path / "out"
        options = ["--window", "3", "--num-inference-steps", "1", "--max-prompts", "2", "--clip", "no/clip"]
        result = run(*options, "--dino", "no/dino", **{"prompts": prompts, "output-dir": out, "device": "cpu"})
        assert result.exit_code == 0, result.output
        assert "2 images of 64 x 64 px" in result.output
        assert "CLIP-I is missing: no/clip is no folder" in result.output
        assert "; --download downloads it\n" in result.output
        assert f"Saved {out}" in result.output
        written = strict_json((out / "eval.json").read_text())
        assert written["settings"]["dtype"] == "float32"
        assert [each["prompt"] for each in written["images"]] == PROMPTS[:2]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"prompts": "nowhere.txt"}, "'nowhere.txt' does not exist"),
            ({"output-dir": "."}, "holds something already"),
            ({"model": "nowhere/model"}, "nowhere/model"),
            ({"metric": "nice"}, "'nice' is not a metric"),
            ({"metric": "fid"}, "metrics cannot be computed: fid"),
            ({"weights": "nowhere"}, "nowhere"),
            (
                {"model": demo.path(), "weights": "auto", "window": 5},
                "no weights are published for --window 5, --down-factor 1",
            ),
            ({"height": 7}, "is less than one token of 8 px"),
        ],
    )
    def test_errors_are_one_line(self, run, prompts, tmp_path, monkeypatch, given, message):
        monkeypatch.chdir(tmp_path)
        result = run(**{"prompts": prompts, "output-dir": "out", "clip": "no/clip", "dino": "no/dino"} | given)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("│", " ").split())
        assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]

    def test_a_missing_file_is_an_error(self, run, prompts, tmp_path, monkeypatch):
        monkeypatch.setattr(evaluation, "atomic_file", open)  # of a folder that does not exist
        monkeypatch.setattr(evaluation, "SHEET", "no/contact_sheet.png")
        out = tmp_path / "out"
        options = ["--num-inference-steps", "1", "--max-prompts", "1", "--metric", "psnr"]
        result = run(*options, **{"prompts": prompts, "output-dir": out, "device": "cpu"})
        assert result.exit_code == 1, result.output
        assert result.stdout.endswith(f"Saved {out}, without no/contact_sheet.png\n")

    def test_ctrl_c_says_how_to_go_on(self, run, prompts, tmp_path, monkeypatch):
        def interrupted(path):
            if path.parent.name == "teacher":
                raise KeyboardInterrupt
            return atomic.atomic_file(path)

        out = tmp_path / "out"
        options = ["--num-inference-steps", "1", "--max-prompts", "2", "--metric", "psnr", "--window", "3"]
        given = {"prompts": prompts, "output-dir": out, "device": "cpu"}
        with monkeypatch.context() as patched:
            patched.setattr(seeded_images, "atomic_file", interrupted)
            result = run(*options, **given)
        assert result.exit_code == 130, result.output
        kept = f"2 of 4 images are kept in {out}/unfinished; the same arguments with --resume go on from them\n"
        assert result.stderr.endswith(f"Warning: {kept}Interrupted; saved {out}/unfinished\n")
        assert "holds an unfinished evaluation; go on with --resume" in " ".join(run(*options, **given).stderr.split())
        prompts.write_text("\n".join(reversed(PROMPTS)))
        stderr = " ".join(run(*options, "--resume", "--batch-size", "2", **given).stderr.split())
        assert "--batch-size must be the same (was 1, is 2), --prompts must be the same (was [" in stderr
        assert stderr.endswith("; or give another --output-dir")
        prompts.write_text("\n".join(PROMPTS))
        result = run(*options, "--resume", **given)
        assert result.exit_code == 0, result.output
        assert f"Saved {out}" in result.output

    def test_a_folder_that_is_in_use(self, run, prompts, tmp_path, monkeypatch):
        monkeypatch.setattr(options, "load_pipeline", lambda *args: pytest.fail("it loads the model"))
        with locked(tmp_path / "out"):
            result = run("--resume", **{"prompts": prompts, "output-dir": tmp_path / "out", "device": "cpu"})
        assert result.exit_code == 2
        expected = "out is being evaluated by another process; wait for it, or give another --output-dir"
        assert expected in " ".join(result.stderr.split())

    def test_missing_devices(self, run, prompts):
        result = run(**{"prompts": prompts, "output-dir": "out", "device": "tpu"})
        assert result.exit_code == 2
        assert "'tpu' does not exist" in result.output


def test_the_time_of_an_image_is_its_share_of_its_batch(monkeypatch, tmp_path):
    clock = iter([0.0, 4.0, 10.0, 16.0, 20.0, 21.0])
    monkeypatch.setattr(seeded_images.time, "perf_counter", lambda: next(clock))
    calls = []

    def pipe(prompt, generator, steps):
        calls.append((prompt, [each.initial_seed() for each in generator], steps))
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))] * len(prompt))

    files = [tmp_path / f"{number}.png" for number in range(5)]
    seconds = seeded_images.save_images_with_seeds(pipe, "abcde", range(7, 12), files, batch_size=2, steps=3)
    assert seconds == [2.0, 2.0, 3.0, 3.0, 1.0]
    assert calls == [(["a", "b"], [7, 8], 3), (["c", "d"], [9, 10], 3), (["e"], [11], 3)]
    assert sorted(tmp_path.iterdir()) == files


@needs_modular_pipelines
def test_a_modular_pipeline_from_a_folder(tmp_path, monkeypatch):
    """It draws one prompt in a call."""
    dummy_pipelines.fake_flux3_text(monkeypatch.setattr)
    pipe = dummy_pipelines.flux3(text_blocks=["prompt_upsampler", "text_encoder"])
    pipe.save_pretrained(str(tmp_path / "model"), overwrite_modular_index=True)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    command = ["eval", "--model", tmp_path / "model", "--prompts", tmp_path / "prompts.txt", "--window", 4]
    command += ["--weights", "none", "--metric", "psnr", "--height", 64, "--width", 48, "--num-inference-steps", 1]
    command += ["--output-dir", tmp_path / "out"]
    result = CliRunner().invoke(app, list(map(str, [*command, "--batch-size", 2])))
    assert "FLUX.3 draws one prompt in a call, got 2; give them one by one" in " ".join(result.output.split())
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["metrics"]["psnr"]["student"] > 5
