"""What every test stands on: checked shapes, fixed seeds, one thread, recorded answers."""

import json
import os
from pathlib import Path

# Before torch is imported. Threads do not survive a fork: a child that waits for those of its parent hangs.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch

# Before anything of ours is imported: every public shape is then checked wherever a test passes through it.
jaxtyping.install_import_hook(
    ["pellucid.objectives", "pellucid.steps", "pellucid.models"], "beartype.beartype"
)

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _repeatable():
    """The same numbers in whatever order tests run."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def unchecked_shapes():
    """For ``torch.compile`` and ``torch.export``, which cannot look through the shape checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.compiler.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def recorded():
    """``recorded(name) -> {key: tensor}`` from ``tests/fixtures``, with ``meta`` as a dict."""

    def load(name: str) -> dict:
        with np.load(Path(__file__).parent / "fixtures" / f"{name}.npz") as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
            return {**arrays, "meta": json.loads(str(file["meta"]))}

    return load


def pytest_collection_modifyitems(items):
    """Tests that train in a forked child go first.

    Autograd refuses to work in the child of a process in which its own threads have run, and some of the
    tests that compile or time models start them.
    """
    items.sort(key=lambda item: not {"fork", "in_child"} & set(getattr(item, "fixturenames", ())))
