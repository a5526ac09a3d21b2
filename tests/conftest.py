"""Fixed seeds for every test, and the fixtures that several test files share."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.folders import make_adapter, make_model
from tests.makers import write_run

# The models of the tests are so small that a second thread costs more than it gains, here and in the commands
# that tests start as processes; and threads that wait for each other starve when tests run in parallel.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
settings.register_profile("fixed", derandomize=True, deadline=None)  # A busy machine fails no test.
settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory):
    """Keeps what is made of GGUF files out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A model folder with random weights; a test file that needs other sizes defines its own `base`."""
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> str:
    """An adapter folder for `base`."""
    return make_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, with the config, base and rows that `write_run` makes."""
    monkeypatch.chdir(write_run(tmp_path))
    return tmp_path
