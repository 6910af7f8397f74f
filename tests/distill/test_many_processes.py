"""Distillation on several processes gives the same steps as on one."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from clear_attn.distill import checkpoint, config_file, train
from clear_attn.distill.optimizers import prepare_plugins
from clear_attn.distill.trainer import RUN
from tests.helpers.training_runs import change, fill, small_settings

PROCESSES = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("data"), 6)


@pytest.fixture
def settings(tmp_path, data, flux_folder):
    return change(small_settings(tmp_path, data, flux_folder), train_batch_size=1, max_train_steps=3)


def train_on_two(kind, settings):
    """Train on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    environment = {"zero2": {"ACCELERATE_USE_DEEPSPEED": "true"}, "fsdp2": {"FSDP_VERSION": "2"}}
    run = subprocess.run(
        [*command, "-m", "tests.helpers.training_worker", kind, json.dumps(dataclasses.asdict(settings))],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment.get(kind, {})},
    )
    assert run.returncode == 0, run.stderr[-3000:]


def student_of(settings):
    return checkpoint.read(Path(settings.output_dir) / "checkpoint-3", RUN)["student"]


needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_two_processes_equal_one_with_two_batches_a_step(kind, settings, tmp_path):
    """Also if the run is stopped and continued, with a part saved by each process."""
    spread = change(settings, output_dir=str(tmp_path / kind), resume_from_checkpoint="latest")
    train_on_two(kind, change(spread, max_train_steps=2))
    train_on_two(kind, spread)
    train(change(settings, gradient_accumulation_steps=PROCESSES))
    ours, theirs = student_of(settings), student_of(spread)
    for name, value in ours.items():
        # Over the tensor, not per element: if a gradient is near zero, Adam turns a rounding error into a step.
        assert (theirs[name] - value).square().mean().sqrt() < 2e-6, name
    parts = {path.name for path in (Path(spread.output_dir) / "checkpoint-3").glob("optimizer-*.json")}
    assert len(parts) == (1 if kind == "ddp" else PROCESSES)
    with pytest.raises(ValueError, match=r"was made with processes=2, distributed='.*', not processes=1"):
        train(spread)


def test_fsdp2_rounds_no_more_than_autocast_does(settings):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    state = SimpleNamespace(fsdp_plugin=plugin)
    prepare_plugins(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state), settings)
    assert plugin.mixed_precision_policy.param_dtype is None
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32
    assert not plugin.mixed_precision_policy.cast_forward_inputs


@pytest.mark.parametrize("name", ["zero2", "fsdp2"])
def test_config_files(name):
    config = yaml.safe_load(config_file(name).read_text())
    assert config["distributed_type"] == {"zero2": "DEEPSPEED", "fsdp2": "FSDP"}[name]
    assert config["mixed_precision"] == "bf16"


def test_no_such_config_file():
    with pytest.raises(ValueError, match="there are config files named fsdp2, zero2, got 'zero9'"):
        config_file("zero9")
