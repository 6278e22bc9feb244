"""The kernels of every instruction set that this processor has, each in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import batchnorm_ext
from batchnorm_ext import _build, _library

pytestmark = pytest.mark.only("cpu", reason="instruction sets are those of the CPU kernels")
X86 = ["default", "avx2", "avx512", "avx512_bf16"]
IN_USE = torch.backends.cpu.get_cpu_capability().lower()
if IN_USE == "avx512" and "ATEN_CPU_CAPABILITY" not in os.environ:
    if torch.cpu.get_capabilities()["avx512_bf16"]:
        IN_USE = "avx512_bf16"
# enough to reach every loop: (N, C), short and long rows, both layouts, every dtype
SOME = "257x3 or 4x17x7x7 or 2x3x5x6x7 or 3x64x14x14 or outlier or constant"
LOWER = X86[: X86.index(IN_USE)] if IN_USE in X86 else []


def test_the_best_one_is_in_use():
    assert f"CPU kernels: {IN_USE if IN_USE in X86 else 'default'}" in batchnorm_ext.show_config()


@pytest.mark.parametrize("name", LOWER)
def test_lower(name):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": name}

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True
        )

    config = run("-c", "import batchnorm_ext; print(batchnorm_ext.show_config())")
    assert f"CPU kernels: {name}" in config.stdout, config.stderr
    here = Path(__file__).parent
    files = [here / f"test_{part}.py" for part in ("forward", "backward", "accuracy")]
    result = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SOME, *map(str, files))
    assert result.returncode == 0, result.stdout + result.stderr


MISSING = """
import importlib.util, sys
find = importlib.util.find_spec
missing = sys.argv[1:]
importlib.util.find_spec = lambda name, *rest: (
    None if name.removeprefix("batchnorm_ext._cpu_") in missing else find(name, *rest)
)
import batchnorm_ext
print(batchnorm_ext.show_config())
"""


@pytest.mark.skipif(IN_USE not in X86[1:], reason="there is only one that this processor has")
@pytest.mark.parametrize("missing", [1, len(LOWER), len(LOWER) + 1])
def test_missing_builds(missing):
    """The next best is taken, not the baseline; without any the import says so."""
    usable = X86[: len(LOWER) + 1]
    command = [sys.executable, "-c", MISSING, *usable[len(usable) - missing :]]
    result = subprocess.run(command, capture_output=True, text=True)
    if missing == len(usable):
        assert "batchnorm_ext was built without kernels for this CPU" in result.stderr
    else:
        assert f"CPU kernels: {usable[-1 - missing]}\n" in result.stdout, result.stderr


def test_cuda_module_of_an_earlier_build_is_not_loaded(monkeypatch, tmp_path):
    """A build in place without CUDA leaves it where it is."""
    stale = tmp_path / "_cuda.so"
    stale.touch()
    find_spec = importlib.util.find_spec

    def find(name):
        if name == "batchnorm_ext._cuda":
            return importlib.util.spec_from_file_location(name, stale)
        return find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(_build, "CUDA", None)
    monkeypatch.setattr(_build, "CUDA_ARCHITECTURES", None)
    *_, architectures = _library._load()
    assert architectures == []
