import os

# Nothing in the tests may reach the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Workers that each use all cores would starve each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings

from tests.helpers import dummy_models

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def fresh_accelerate():
    """What makes accelerate forget its first mixed precision, which it otherwise keeps for good; done at the end."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)

    forget()
    yield forget
    forget()


@pytest.fixture(params=dummy_models.FAMILIES)
def family(request):
    return dummy_models.FAMILIES[request.param]


@pytest.fixture
def transformer(family):
    return family.transformer()


@pytest.fixture
def pipe():
    return dummy_models.flux_pipeline()
