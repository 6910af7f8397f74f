"""Distillation on several processes: the same steps, however they are spread."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from clear_attn.distill import config_file, train
from clear_attn.sources import WEIGHTS_FILE
from tests.training import fill, small_settings

PROCESSES = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("data"), 6)


@pytest.fixture
def settings(tmp_path, data):
    return dataclasses.replace(
        small_settings(tmp_path, data), train_batch_size=1, max_train_steps=3, mixed_precision="no"
    )


def on_many(kind, settings):
    """Trains on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    told = {"zero2": {"ACCELERATE_USE_DEEPSPEED": "true"}, "fsdp2": {"FSDP_VERSION": "2"}}
    run = subprocess.run(
        [*command, "-m", "tests.worker", kind, json.dumps(dataclasses.asdict(settings))],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **told.get(kind, {})},
    )
    assert run.returncode == 0, run.stderr[-3000:]


def weights_of(settings):
    return load_file(Path(settings.output_dir) / WEIGHTS_FILE)


@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        "fsdp2",
        pytest.param(
            "zero2",
            marks=pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"),
        ),
    ],
)
def test_two_processes_are_one_with_two_batches_to_a_step(kind, settings, tmp_path):
    """Also where the run on two is stopped and goes on, and each process has saved its own part."""
    spread = dataclasses.replace(settings, output_dir=str(tmp_path / kind), resume_from_checkpoint="latest")
    if kind != "ddp":
        on_many(kind, dataclasses.replace(spread, max_train_steps=2))
    on_many(kind, spread)
    train(dataclasses.replace(settings, gradient_accumulation_steps=PROCESSES))
    ours, theirs = weights_of(settings), weights_of(spread)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=2e-5, rtol=0)
    parts = {path.name for path in (Path(spread.output_dir) / "checkpoint-3").glob("optimizer-*.json")}
    assert len(parts) == (1 if kind == "ddp" else PROCESSES)
    with pytest.raises(ValueError, match=r"was made with processes=2, distributed='.*', not processes=1"):
        train(spread)


@pytest.mark.parametrize("name", ["zero2", "fsdp2"])
def test_config_files(name):
    config = yaml.safe_load(config_file(name).read_text())
    assert config["distributed_type"] == {"zero2": "DEEPSPEED", "fsdp2": "FSDP"}[name]
    assert config["mixed_precision"] == "bf16"


def test_no_such_config_file():
    with pytest.raises(ValueError, match="there is a config file for each of fsdp2, zero2; not for 'zero9'"):
        config_file("zero9")
