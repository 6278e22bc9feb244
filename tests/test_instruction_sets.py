"""The kernels of every instruction set that this processor has, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import batchnorm_ext

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
