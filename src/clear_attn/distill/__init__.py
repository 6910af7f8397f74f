"""Training of linearized attention after the same model's dense attention."""

from pathlib import Path

from clear_attn.distill.settings import Settings
from clear_attn.distill.training_run import train

__all__ = ["Settings", "config_file", "train"]


def config_file(name: str) -> Path:
    """The file for `accelerate launch --config_file`: of "zero2" (DeepSpeed) or "fsdp2".

    Raises:
        ValueError: there is none of that name.
    """
    files = {path.stem: path for path in Path(__file__).with_name("configs").glob("*.yaml")}
    if name not in files:
        raise ValueError(f"there is a config file for each of {', '.join(sorted(files))}; not for {name!r}")
    return files[name]
