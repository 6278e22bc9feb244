"""The launch plans of the CUDA kernels, without a GPU, by plan.cpp, which is compiled at first use.

BATCHNORM_EXT_CUDA_PLAN changes them as it does for the kernels; a wrong one is a ValueError.
"""

import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from math import prod
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PROGRAM = ROOT / "benchmarks" / "plan.cpp", ROOT / "build" / "plan"
HEADERS = ("geometry.h", *(f"cuda/{name}.h" for name in ("planner", "plan", "override", "shape")))

KERNELS = {  # pass -> inputs, coefficients, reduces, maps: what a Request of plan.h asks for
    "forward": (1, 3, True, True),
    "backward": (2, 5, True, True),
    "eval": (1, 3, False, True),
}


@dataclass(frozen=True)
class Gpu:
    """A Device of plan.h. Shared memory is in KB, L2 in MB."""

    name: str
    architecture: int
    sms: int
    shared_per_sm: int
    shared_per_block: int
    l2: int
    cooperative: bool = True

    def numbers(self) -> list[int]:
        shared = [self.shared_per_sm << 10, self.shared_per_block << 10]
        return [self.architecture, self.sms, *shared, self.l2 << 20, self.cooperative]


# From NVIDIA's architecture white papers.
A100 = Gpu("A100 80GB SXM", 80, 108, 164, 163, 40)
GPUS = {"h200": Gpu("H200", 90, 132, 228, 227, 50), "a100": A100}


@dataclass(frozen=True)
class Request:
    shape: tuple[int, ...]
    layout: str  # "nchw" or "nhwc"
    element_bytes: int
    what: str  # of KERNELS

    def numbers(self) -> list[int]:
        batch, channels, *space = self.shape
        positions = prod(space)
        outer, inner = (batch, positions) if self.layout == "nchw" else (batch * positions, 1)
        inputs, coefficients, *phases = KERNELS[self.what]
        sizes = [outer, channels, inner, self.element_bytes, inputs, coefficients]
        return [*sizes, True, *phases]  # aligned


def program() -> Path:
    """The compiled plan.cpp; again where it or the headers have changed."""
    newest = max(
        path.stat().st_mtime for path in (SOURCE, *(ROOT / "csrc" / name for name in HEADERS))
    )
    if not PROGRAM.exists() or PROGRAM.stat().st_mtime < newest:
        PROGRAM.parent.mkdir(exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        fresh = PROGRAM.with_suffix(f".{os.getpid()}")
        subprocess.run([*compiler, "-std=c++20", "-O1", SOURCE, "-o", fresh], check=True)
        fresh.replace(PROGRAM)  # at once, whoever else is compiling the same
    return PROGRAM


def plans(requests: Sequence[Request], gpu: Gpu, override: str = "") -> list:
    """A row for each request: the columns of plan.cpp, the elements of a tensor, how often the plan
    passes over them, and the bytes that it moves."""
    lines = [" ".join(str(int(n)) for n in [*r.numbers(), *gpu.numbers()]) for r in requests]
    environment = os.environ | ({"BATCHNORM_EXT_CUDA_PLAN": override} if override else {})
    options = {"text": True, "capture_output": True, "env": environment}
    done = subprocess.run([program()], input="\n".join(lines), **options)
    if done.returncode == 2:
        raise ValueError(done.stderr.strip())
    done.check_returncode()
    rows = pd.read_csv(StringIO(done.stdout))
    moved, elements = rows.loaded + rows.stored, [prod(r.shape) for r in requests]
    rows = rows.assign(elements=elements, passes=moved / elements)
    rows["bytes"] = moved * [r.element_bytes for r in requests]
    return list(rows.itertuples(index=False, name="Plan"))
