from __future__ import annotations

import os

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from batchnorm_ext import _build
from emulator.harness import HERE, build
from programs import CSRC


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The library of glue.cpp."""
    if _build.CUDA is not None:
        pytest.skip("a library that has the CUDA kernels registers the operators itself")
    base = tmp_path_factory.getbasetemp()
    library = build(
        HERE / "glue.cpp",
        "plain",
        defines=["BATCHNORM_EXT_CUDA_THREADS=64"],
        include=[HERE / "stubs", CSRC],
        flags=[
            *("-shared", "-fPIC", "-fvisibility=hidden"),
            *(f"-isystem{path}" for path in include_paths()),
            *(f"-L{path}" for path in library_paths()),
            *("-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"),
        ],
        # of the whole run: each process of pytest-xdist has its base in there
        directory=(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "glue",
    )
    torch.ops.load_library(library)


@pytest.fixture
def nan_in_fresh_memory():
    """What is not written is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
