"""What every test runs under: fixed seeds, poisoned buffers, no display."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # where only the GPU tests run: they need none
    settings = None

# Read by cuBLAS when a device is first used: deterministic matrix products need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["MPLBACKEND"] = "Agg"

# derandomize: the same examples on every machine; no deadline: the first call compiles kernels.
if settings is not None:
    fixed = {"derandomize": True, "deadline": None, "database": None}
    settings.register_profile("fixed", max_examples=25, **fixed)
    settings.register_profile("thorough", max_examples=300, **fixed)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None:
    # The other cores have workers of their own. Tests of threads set the number that they need.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Compile each kernel in one of the workers, where a run is long enough to need them all."""
    if WORKER is not None and len(request.session.items) > 1000:
        from tests.compiling import compile_kernels

        compile_kernels(tmp_path_factory.getbasetemp().parent)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party code draws from the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_buffers(request: pytest.FixtureRequest):
    """Fill `torch.empty` with NaN, so that reading an unwritten element shows in the result."""
    # torch fills only in deterministic mode. CUDA lacks deterministic forms of a few operations
    # that the reference uses (cumsum), so there the mode must not raise.
    on_gpu = request.node.get_closest_marker("gpu") is not None
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where no CUDA device is present."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
