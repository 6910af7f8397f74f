"""Whole runs of distillation, on the random FLUX."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clear_attn as clear
from clear_attn import demo
from clear_attn.distill import Settings, checkpoint, train
from clear_attn.distill import trainer as run_module
from clear_attn.distill import training_run as training
from clear_attn.distill.data.cache import Cache
from clear_attn.distill.data.examples import from_folder
from clear_attn.distill.data.seeds import hash_of
from clear_attn.distill.losses import interpolate
from clear_attn.distill.student import STUDENT, student_values
from clear_attn.distill.validation import Validation
from clear_attn.models.flux import FluxTraining
from clear_attn.utils.image_sheets import contact_sheet
from clear_attn.weights.metadata import WEIGHTS_FILE
from tests.helpers import dummy_models
from tests.helpers.reference_model import run
from tests.helpers.training_runs import change, fill, small_settings, weights_of


@pytest.fixture
def settings(tmp_path, flux_folder):
    return small_settings(tmp_path, fill(tmp_path / "data", 6), flux_folder)


@pytest.mark.parametrize("student", ["full", "lora"])
def test_a_run_and_its_result(settings, student):
    settings = change(settings, student=student, rank=4)
    folder = train(settings)
    pipe = dummy_models.flux_pipeline()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    clear.linearize(pipe, weights=folder)
    assert pipe.transformer.transformer_blocks[0].attn.processor.method == clear.methods.Clear(2, 2)
    moved = {
        name for name, value in pipe.transformer.state_dict().items() if not torch.equal(value, before.get(name, value))
    }
    assert moved
    assert all(".attn.to_" in name for name in moved)
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "README.md", "clear_config.json", WEIGHTS_FILE, "checkpoint-2", "checkpoint-4"
    }  # fmt: skip
    clear.restore(pipe)
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())


def test_the_record_says_how_the_weights_were_trained(settings, tmp_path):
    record = json.loads((train(change(settings, use_ema=True)) / "clear_config.json").read_text())
    assert (record["architecture"], record["model"]) == ("FluxTransformer2DModel", "random_flux")
    assert record["training"] == {
        "steps": 4,
        "images_per_step": 2,
        "resolution": 64,
        "images": 6,
        "data": "data",
        "loss_weights": {"flow_matching": 1.0, "prediction": 0.5, "attention": 0.5},
        "student": "full",
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "use_ema": True,
        "mixed_precision": "no",
        "seed": 0,
    }
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize("packaged", [True, False])
def test_size_and_text_length_are_the_models_own(tmp_path, flux_folder, packaged):
    settings = small_settings(tmp_path, tmp_path / "generated", "demo" if packaged else flux_folder)
    settings = change(settings, resolution=None, max_sequence_length=None, generate=1, num_inference_steps=1)
    (tmp_path / "prompts.txt").write_text("a red circle")
    settings = change(settings, prompts=str(tmp_path / "prompts.txt"), max_train_steps=1)
    train(settings)
    (image,) = (tmp_path / "generated").glob("*.png")
    size, text_tokens = (demo.SIZE, demo.TEXT_TOKENS) if packaged else (128, 24)
    assert Image.open(image).size == (size, size)
    generated = json.loads((tmp_path / "generated" / "generated.json").read_text())
    assert (generated["resolution"], generated["text_tokens"]) == (size, text_tokens)
    batch = Cache(Path(settings.latents_dir)).read([0], torch.Generator())
    assert (batch.latents.shape[-1], batch.text["text"].shape[1]) == (size // 4, text_tokens)


def test_a_models_own_size_that_images_cannot_have(settings, tmp_path):
    pipe = dummy_models.flux_pipeline()
    pipe.vae.register_to_config(sample_size=100)
    pipe.save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="resolution must be a multiple of 16 pixels, got 100"):
        train(change(settings, pretrained_model_name_or_path=str(tmp_path / "odd"), resolution=None))


@pytest.mark.parametrize("student", ["full", "lora"])
def test_another_method(settings, student):
    settings = change(settings, student=student, rank=4, window=None, down_factor=None, method="LiT(heads=1)")
    pipe = clear.linearize(dummy_models.flux_pipeline(), weights=train(settings))
    own = [module for module in pipe.transformer.modules() if isinstance(module, clear.ClearAttnProcessor)]
    assert {module.method for module in own} == {clear.methods.LiT(heads=1)}
    assert all(module.convolution.abs().max() > 0 for module in own)
    clear.restore(pipe)


def test_training_reduces_the_error(settings):
    """The student's prediction is nearer to the teacher's than that of the training-free model, for new noise."""
    settings = change(settings, max_train_steps=50, checkpointing_steps=50, flow_matching_weight=1e-9)
    train(settings)
    rng = torch.Generator().manual_seed(11)
    batch = Cache(Path(settings.latents_dir)).read(range(6), rng)
    adapter, transformer = FluxTraining(), dummy_models.flux_pipeline().transformer
    noise, sigma = torch.randn(batch.latents.shape, generator=rng), torch.linspace(0.1, 0.9, 6)
    call = adapter.training_call(interpolate(batch.latents, noise, sigma), sigma, batch.text, None)
    teacher = run(transformer, call)
    errors = []
    for weights in (None, settings.output_dir):
        with clear.linearized(transformer, 2, 2, weights=weights):
            errors.append((run(transformer, call) - teacher).square().mean())
    assert errors[1] < 0.9 * errors[0]


def test_gradients_of_accumulated_batches_are_averaged(settings, monkeypatch):
    """The gradient of a step with two batches is the mean of their gradients."""
    gradients = []

    def clip(accelerator, parameters, norm):
        gradients.append([parameter.grad.clone() for parameter in parameters])

    monkeypatch.setattr(training.Accelerator, "clip_grad_norm_", clip)
    still = change(settings, learning_rate=1e-12, adam_weight_decay=0.0)
    train(change(still, max_train_steps=2))
    train(change(still, max_train_steps=1, gradient_accumulation_steps=2, output_dir=settings.output_dir + "-parts"))
    for first, second, both in zip(*gradients, strict=True):
        torch.testing.assert_close(both, (first + second) / 2)


def test_mixed_precision(settings, fresh_accelerate):
    """The student is in float32, the trunk in bfloat16, the result in the dtype of the trunk."""
    settings = change(settings, mixed_precision="bf16", max_train_steps=2, validation_prompts=["a"], use_ema=True)
    train(change(settings, num_inference_steps=1))
    state = checkpoint.read(Path(settings.output_dir) / "checkpoint-2", run_module.RUN)
    assert {value.dtype for value in state["student"].values()} == {torch.float32}
    assert {value.dtype for value in weights_of(settings).values()} == {torch.bfloat16}


class TestGenerated:
    @pytest.fixture
    def settings(self, settings, tmp_path):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a red circle on a blue ground, in the middle\n\na white cross on a red ground\n")
        folder = str(tmp_path / "drawn")
        drawn = {"generate": 3, "prompts": str(prompts), "train_data_dir": folder, "num_inference_steps": 2}
        return change(settings, max_train_steps=1, train_batch_size=1, **drawn)

    def test_the_teacher_draws_missing_images(self, settings, tmp_path, monkeypatch):
        saved = []

        def save(image, file, *args, save=Image.Image.save, **options):
            if len(saved) == 2:
                raise KeyboardInterrupt
            saved.append(file.name)
            save(image, file, *args, **options)

        monkeypatch.setattr(Image.Image, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
        monkeypatch.undo()
        drawn = Path(settings.train_data_dir)
        first = (drawn / "000000.png").read_bytes()
        assert {path.name for path in drawn.glob("*.png")} == {"000000.png", "000001.png"}
        train(settings)
        assert (drawn / "000000.png").read_bytes() == first
        examples = from_folder(drawn)
        circle, cross = "a red circle on a blue ground, in the middle", "a white cross on a red ground"
        assert [each.prompt for each in examples] == [circle, cross, circle]
        images = [each.open().tobytes() for each in examples]
        assert images[0] != images[2]  # one prompt, two seeds

    def test_with_other_settings(self, settings):
        train(settings)
        other = change(settings, num_inference_steps=3, output_dir=settings.output_dir + "2")
        with pytest.raises(ValueError, match="were generated for steps 2, not 3; give another folder"):
            train(other)

    def test_with_other_prompts(self, settings):
        train(settings)
        prompts, before = Path(settings.prompts), from_folder(Path(settings.train_data_dir))
        prompts.write_text("a new one\n" + prompts.read_text())
        other = change(settings, output_dir=settings.output_dir + "2")
        with pytest.raises(ValueError, match=r"000000.png was generated for 'a red .*, and the prompts now say 'a new"):
            train(other)
        after = from_folder(Path(settings.train_data_dir))
        assert [each.prompt for each in after] == [each.prompt for each in before]

    def test_more_and_fewer(self, settings, tmp_path):
        for number, generate in enumerate((3, 4, 2)):
            other = change(settings, generate=generate, output_dir=str(tmp_path / f"out-{number}"))
            train(change(other, latents_dir=None))
        assert len(from_folder(Path(settings.train_data_dir))) == 4

    def test_a_folder_with_other_files(self, settings):
        folder = Path(settings.train_data_dir)
        folder.mkdir()
        (folder / "holiday.png").write_bytes(b"mine")
        with pytest.raises(ValueError, match="drawn is not empty; give an empty folder"):
            train(settings)
        assert [path.name for path in folder.iterdir()] == ["holiday.png"]

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"prompts": None}, ValueError, "generate and prompts go together"),
            ({"prompts": "nowhere.txt"}, FileNotFoundError, "nowhere.txt"),
            ({"generate": 0}, ValueError, "generate must be above 0, got 0"),
            ({"dataset_name": "a/b"}, ValueError, "give one of generate and dataset_name"),
        ],
    )
    def test_refusals(self, settings, changes, error, message):
        with pytest.raises(error, match=message):
            train(change(settings, **changes))


class TestTrackers:
    def test_losses_and_images(self, settings):
        prompt = "a red circle on a blue ground, in the middle"
        shown = {"validation_prompts": [prompt, prompt], "validation_steps": 2, "num_inference_steps": 2}
        train(change(settings, report_to="tensorboard", **shown))
        folder = Path(settings.output_dir)
        assert {path.name for path in (folder / "validation").iterdir()} == {"step-2.png", "step-4.png"}
        logged = EventAccumulator(str(folder / settings.logging_dir / "distill")).Reload()
        losses = [event.value for event in logged.Scalars("attention")]
        assert len(losses) == 4
        assert min(losses) > 0
        assert logged.Scalars("learning_rate")[0].value == pytest.approx(1e-3)
        assert [event.step for event in logged.Images("validation")] == [2, 4]

    def test_draws_with_the_average_that_is_saved(self, settings, monkeypatch):
        def draw(validation, role):
            if role == STUDENT:
                shown.append(
                    {name: value.clone() for name, value in student_values(validation.pipe.transformer).items()}
                )
            return [Image.new("RGB", (64, 64))]

        shown = []
        monkeypatch.setattr(Validation, "_images", draw)
        train(change(settings, use_ema=True, validation_prompts=["a red circle"]))
        for name, value in weights_of(settings).items():
            assert torch.equal(value, shown[-1][name]), name

    def test_validation_changes_nothing(self, settings, tmp_path):
        train(settings)
        other = change(settings, output_dir=str(tmp_path / "other"), validation_steps=2, num_inference_steps=2)
        train(change(other, validation_prompts=["a red circle"]))
        for name, value in weights_of(settings).items():
            assert torch.equal(value, weights_of(other)[name]), name

    def test_the_teachers_row_is_drawn_by_the_pipeline(self, settings):
        prompt = "a red circle on a blue ground, in the middle"
        shown = {"validation_prompts": [prompt], "num_inference_steps": 2, "max_train_steps": 1}
        train(change(settings, **shown))
        pipe = dummy_models.flux_pipeline()
        rng = torch.Generator().manual_seed(hash_of("validation", settings.seed, 0))
        expected = pipe(
            prompt, height=64, width=64, num_inference_steps=2, max_sequence_length=24, generator=rng
        ).images
        with Image.open(Path(settings.output_dir) / "validation" / "step-1.png") as sheet:
            row = sheet.convert("RGB").crop((0, 0, sheet.width, sheet.height))
        alone = contact_sheet({"teacher": expected}, [prompt])
        difference = ImageChops.difference(row.crop((0, 0, alone.width, alone.height)), alone)
        assert max(high for _, high in difference.getextrema()) <= 3

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("paper", ValueError, r"report_to must be one of .*tensorboard.*; got 'paper'"),
            ("aim", ImportError, "report_to='aim' needs aim: pip install aim, or give report_to='none'"),
        ],
    )
    def test_refusals(self, settings, name, error, message):
        with pytest.raises(error, match=message):
            train(change(settings, report_to=name))


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"optimizer": "sgd"}, "optimizer must be one of prodigy, adamw, adamw8bit, got 'sgd'"),
            ({"student": "half"}, "student must be one of full, lora, got 'half'"),
            ({"output_dir": ""}, "output_dir is missing"),
            ({"train_data_dir": None}, "give one of train_data_dir and dataset_name, or generate and"),
            ({"max_train_steps": 0}, "max_train_steps must be above 0, got 0"),
            ({"window": 0}, "window"),
            ({"method": "LiT"}, "window=2 and method=LiT.* are both given"),
            (
                {"method": "Lit", "window": None, "down_factor": None},
                "no attention method is named 'Lit', only Agent",
            ),
            ({"method": "LiT(2)"}, r"method='LiT\(2\)' is not a name with settings in parentheses"),
            ({"attention_layers": ["blocks.7"]}, "attention_layers has 'blocks.7', which is not an attention layer"),
            ({"lr_scheduler": "step"}, "lr_scheduler must be one of linear, cosine, .*, got 'step'"),
            ({"prediction_weight": -1.0}, "prediction_weight must be at least 0, got -1"),
            (
                {"flow_matching_weight": 0.0, "prediction_weight": 0.0, "attention_weight": 0.0},
                "are all 0: there is nothing to learn",
            ),
            ({"ema_decay": 1.0}, "ema_decay must be in 0 to below 1, got 1.0"),
            ({"resolution": 100}, "resolution must be a multiple of 16 pixels, got 100"),
        ],
    )
    def test_settings(self, settings, changes, message):
        with pytest.raises(ValueError, match=message):
            train(change(settings, **changes))
        assert {file.name for file in Path(settings.output_dir).glob("*")} <= {".lock"}

    def test_a_folder_that_another_run_uses(self, settings):
        with checkpoint.locked(Path(settings.output_dir)), pytest.raises(FileExistsError, match="another run is using"):
            train(settings)

    def test_accelerate_is_configured_differently(self, settings, monkeypatch, fresh_accelerate):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
        with pytest.raises(ValueError, match="configured with 3 gradient_accumulation_steps, and the run with 2"):
            train(change(settings, gradient_accumulation_steps=2))

    def test_a_teacher_that_was_saved_linearized(self, settings, tmp_path):
        clear.linearize(dummy_models.flux_pipeline(), 3, weights=None).save_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match="was saved while it was linearized, but the teacher must be dense"):
            train(change(settings, pretrained_model_name_or_path=str(tmp_path / "saved")))

    def test_a_file_instead_of_a_folder(self, settings):
        Path(settings.output_dir).write_text("mine")
        with pytest.raises(NotADirectoryError, match="is a file; give a directory"):
            train(settings)
        assert Path(settings.output_dir).read_text() == "mine"

    def test_a_window_beyond_the_grid(self, settings):
        with pytest.warns(UserWarning, match="window=40, down_factor=1 covers the largest image, .* dense"):
            train(change(settings, window=40, down_factor=1, max_train_steps=1))


@pytest.mark.slow
def test_the_command(settings, tmp_path):
    options = {**dataclasses.asdict(settings), "max_train_steps": 1}
    defaults = dataclasses.asdict(Settings())
    words = [word for name, value in options.items() if value != defaults[name] for word in (f"--{name}", str(value))]
    run = subprocess.run(
        [sys.executable, "-m", "clear_attn.distill", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert "use it with clear_attn.linearize(pipe, weights=" in run.stdout
    assert (
        json.loads((Path(settings.output_dir) / "clear_config.json").read_text())["method"]["settings"]["window"] == 2
    )
    again = subprocess.run(
        [sys.executable, "-m", "clear_attn.distill", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("error: ")


def test_a_checkpoint_can_hold_the_state_of_any_optimizer():
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 1: {}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False, "foreach": None, "params": [0, 1]}],
    }
    tensors = {}
    packed = json.loads(json.dumps(checkpoint.pack(state, tensors)))
    back = checkpoint.unpack(packed, tensors)
    assert torch.equal(back["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert back["state"].keys() == {0, 1}
    assert back["param_groups"][0]["lr"] == 0.1
    with pytest.raises(TypeError, match="is a set, which a checkpoint cannot hold"):
        checkpoint.pack({"a": {1}}, {})


def test_a_method_is_given_as_an_object_or_as_text(settings):
    given = {"window": None, "down_factor": None}
    one, other = (change(settings, method=each, **given) for each in (clear.methods.Swin(4), "Swin(side=4)"))
    assert one.attention == other.attention == clear.methods.Swin(4)
    assert one.shared() == other.shared()
