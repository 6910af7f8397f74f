"""Distillation of a model's dense attention into its linearized attention."""

from pathlib import Path

from clear_attn.distill.settings import Settings
from clear_attn.distill.training_run import train

__all__ = ["Settings", "config_file", "train"]


def config_file(name: str) -> Path:
    """Return the path of a file for `accelerate launch --config_file`: "zero2" (DeepSpeed) or "fsdp2".

    Raises:
        ValueError: there is no such file.
    """
    files = {path.stem: path for path in Path(__file__).with_name("configs").glob("*.yaml")}
    if name not in files:
        raise ValueError(f"there are config files named {', '.join(sorted(files))}, got {name!r}")
    return files[name]
