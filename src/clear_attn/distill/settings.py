"""Settings of a training run, with the names of diffusers' training scripts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from diffusers.optimization import SchedulerType

from clear_attn.distill.data import buckets
from clear_attn.methods import Method, parse
from clear_attn.patching.resolve import resolve_method

# The default learning rate of each optimizer.
OPTIMIZERS = {"prodigy": 1.0, "adamw": 1e-4, "adamw8bit": 1e-4}
STUDENTS = ("full", "lora")
SCHEMES = ("none", "logit_normal", "mode")
SCHEDULERS = tuple(each.value for each in SchedulerType)
ENDLESS = ("constant", "constant_with_warmup")
WEIGHTS = ("flow_matching_weight", "prediction_weight", "attention_weight")


CHOICES = {"optimizer": OPTIMIZERS, "student": STUDENTS, "weighting_scheme": SCHEMES, "lr_scheduler": SCHEDULERS}
ABOVE_0 = (
    *("generate", "num_inference_steps", "rank", "max_sequence_length", "train_batch_size", "learning_rate"),
    *("gradient_accumulation_steps", "max_train_steps", "max_grad_norm", "validation_steps", "checkpointing_steps"),
    "checkpoints_total_limit",
)
AT_LEAST_0 = (*WEIGHTS, "lr_warmup_steps", "adam_weight_decay", "guidance_scale")
# Settings that may differ when a run is resumed.
RESUMABLE = (
    *("output_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "report_to"),
    *("logging_dir", "validation_prompts", "validation_steps", "max_train_steps"),
)


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with its help for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Settings of a training run. None means a default that depends on the model or on other settings."""

    pretrained_model_name_or_path: str = option(
        "", "The model to linearize: a Hub id or a folder; demo for the small FLUX."
    )
    output_dir: str = option("", "The folder of the result and the checkpoints.")
    train_data_dir: str | None = option(None, "A folder of images with captions.")
    dataset_name: str | None = option(None, "A dataset of the datasets library, in place of train_data_dir.")
    image_column: str = option("image", "The dataset's column of images.")
    caption_column: str = option("text", "The dataset's column of captions.")
    generate: int | None = option(None, "The number of images that the model generates into train_data_dir.")
    prompts: str | None = option(None, "A file of prompts for generate, one per line, used in turn.")
    num_inference_steps: int | None = option(None, "The steps of generated images; by default the pipeline's.")
    latents_dir: str | None = option(None, "The folder that caches latents and embeddings; by default in output_dir.")
    revision: str | None = option(None, "The revision of the model on the Hub.")
    window: int | None = option(None, "The radius of CLEAR's window in tokens, by default 16.")
    down_factor: int | None = option(None, "The side of CLEAR's pooled cells in tokens, by default 1 for no pooling.")
    # A `Method` in Python.
    method: str | None = option(None, "A method of clear_attn.methods, such as Swin(side=8); by default CLEAR.")
    student: str = option(
        "full", f"How projections are trained: one of {', '.join(STUDENTS)}, lora for low-rank updates."
    )
    rank: int = option(64, "The rank of the low-rank updates, with student=lora.")
    resolution: int | None = option(
        None, "The side in pixels of a square image, by default the model's own; other shapes have the same area."
    )
    max_sequence_length: int | None = option(None, "The number of text tokens; by default the pipeline's.")
    train_batch_size: int = option(1, "The number of images in a batch on each device.")
    gradient_accumulation_steps: int = option(1, "The number of batches per step.")
    max_train_steps: int = option(10_000, "The number of optimizer steps.")
    optimizer: str = option("prodigy", f"One of {', '.join(OPTIMIZERS)}.")
    learning_rate: float | None = option(None, "By default 1 for prodigy, which adapts it, and 1e-4 for the others.")
    lr_scheduler: str = option("constant", "A learning rate scheduler of diffusers.")
    lr_warmup_steps: int = option(0, "The number of warmup steps.")
    adam_weight_decay: float = option(1e-4, "Weight decay.")
    max_grad_norm: float = option(1.0, "The norm that gradients are clipped to.")
    guidance_scale: float = option(3.5, "The guidance scale for a model that embeds it.")
    weighting_scheme: str = option("none", f"How timesteps are sampled: one of {', '.join(SCHEMES)}; none is uniform.")
    flow_matching_weight: float = option(1.0, "Weight of the flow matching loss.")
    prediction_weight: float = option(0.5, "Weight of the difference from the teacher's prediction.")
    attention_weight: float = option(0.5, "Weight of the difference from the teacher's attention.")
    attention_layers: list[str] | None = option(None, "Layers whose attention is compared; by default the paper's.")
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass, to save memory.")
    mixed_precision: str | None = option(
        None, "no, bf16 or fp16; by default as accelerate is configured, else bf16 on a GPU."
    )
    use_ema: bool = option(False, "Keep a moving average of the weights on the CPU, and save it as the result.")
    ema_decay: float = option(0.999, "The decay of the moving average.")
    validation_prompts: list[str] | None = option(
        None, "Teacher and student generate images of these every validation_steps."
    )
    validation_steps: int = option(500, "The number of steps between validations.")
    seed: int = option(0, "The seed of the run.")
    checkpointing_steps: int = option(500, "The number of steps between checkpoints.")
    checkpoints_total_limit: int | None = option(2, "The number of checkpoints to keep.")
    resume_from_checkpoint: str | None = option(None, 'The folder of a checkpoint, or "latest".')
    report_to: str = option("tensorboard", "A tracker of accelerate, such as wandb; all; or none.")
    logging_dir: str = option("logs", "The folder of logs in output_dir.")

    def __post_init__(self) -> None:
        if isinstance(self.method, Method):
            self.method = self.method.as_text()

    @property
    def attention(self) -> Method:
        """The method to train."""
        return resolve_method(self.window, self.down_factor, None if self.method is None else parse(self.method))

    @property
    def rate(self) -> float:
        """The learning rate given to the optimizer."""
        return OPTIMIZERS[self.optimizer] if self.learning_rate is None else self.learning_rate

    def shared(self) -> dict[str, Any]:
        """Return the settings that must be the same when this run is resumed."""
        # With other schedulers, the learning rate depends on the number of steps.
        free = set(RESUMABLE) - (set() if self.lr_scheduler in ENDLESS else {"max_train_steps"})
        attention = {"window", "down_factor", "method"}  # several values of these mean the same method
        others = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in free | attention}
        return {**others, "attention": self.attention.as_arguments()}

    def check(self) -> None:
        """Raise ValueError if a value is out of range or contradicts another."""
        for name in ("pretrained_model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give it")
        if (self.generate is None) != (self.prompts is None):
            raise ValueError("generate and prompts go together: the number of images, and a file of prompts")
        if self.generate is not None and self.dataset_name is not None:
            raise ValueError("give one of generate and dataset_name")
        if self.generate is None and (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("give one of train_data_dir and dataset_name, or generate and prompts")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ABOVE_0:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in AT_LEAST_0:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not any(getattr(self, name) for name in WEIGHTS):
            raise ValueError(f"{', '.join(WEIGHTS)} are all 0: there is nothing to learn; set one of them above 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in 0 to below 1, got {self.ema_decay}; 0.999 is usual")
        if self.resolution is not None:
            buckets.sizes(self.resolution)
        self.attention  # noqa: B018 - checks window, down_factor and method
