import importlib
import os
import sys
from pathlib import Path

# Nothing in the tests may reach the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread for each worker: more would compete for the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings
from safetensors.torch import save_file

import clear_attn as clear
from tests.helpers import dummy_models, families
from tests.helpers.snapshots import checkpoint_for

EXAMPLES = Path(__file__).parents[1] / "examples"

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def fresh_accelerate():
    """Return a function that resets accelerate, which keeps its first mixed precision; also called at the end."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)

    forget()
    yield forget
    forget()


@pytest.fixture
def example(monkeypatch):
    """Return a function that imports a script of the examples, again in each test."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for file in EXAMPLES.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture(params=families.USUAL)
def family(request):
    return families.FAMILIES[request.param]


@pytest.fixture
def transformer(family):
    return family.transformer()


@pytest.fixture
def checkpoint(transformer, tmp_path):
    """A file of random weights for the transformer, with cells of 2 x 2 tokens."""
    save_file(checkpoint_for(transformer, 2), tmp_path / "weights.safetensors", metadata={"format": "pt"})
    return tmp_path / "weights.safetensors"


@pytest.fixture
def trained(family, tmp_path):
    """A transformer linearized with random weights, as a trainer would leave it."""
    transformer = family.transformer()
    save_file(checkpoint_for(transformer, 2), tmp_path / "trained.safetensors")
    return clear.linearize(transformer, 5, weights=tmp_path / "trained.safetensors")


@pytest.fixture
def pipe():
    """A random FLUX for images of 16 x 16 tokens, which a test may change."""
    return dummy_models.flux_pipeline()


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory):
    """The folder of the random FLUX."""
    folder = tmp_path_factory.mktemp("models") / "random_flux"
    dummy_models.flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_weights(tmp_path_factory):
    """The folder of random weights for the random FLUX, with a window of 8."""
    pipe, folder = dummy_models.flux_pipeline(), tmp_path_factory.mktemp("weights")
    save_file(checkpoint_for(pipe.transformer), folder / "values.safetensors")
    clear.linearize(pipe, 8, weights=folder / "values.safetensors")
    clear.save_pretrained(pipe, folder / "flux_weights")
    return folder / "flux_weights"
