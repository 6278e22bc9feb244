"""What the CUDA kernels would do on a GPU, from their own launch plans: no GPU, no nvcc.

The plans come from a small program around csrc/cuda/plan.h, compiled at first use. The environment
variable BATCHNORM_EXT_CUDA_PLAN changes them as it changes those of the kernels; a wrong one is a
ValueError.
"""

import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "benchmarks" / "plan.cpp"
HEADERS = [
    ROOT / "csrc" / "geometry.h",
    *(ROOT / "csrc" / "cuda" / h for h in ("plan.h", "override.h", "shape.h")),
]
PROGRAM = ROOT / "build" / "plan"

KERNELS = {  # pass -> inputs, coefficients, reduces, maps: what a Request of plan.h asks for
    "forward": (1, 3, True, True),
    "backward": (2, 4, True, True),
    "eval": (1, 3, False, True),
}


@dataclass(frozen=True)
class Gpu:
    """A Device of plan.h, and the memory bandwidth of its data sheet in bytes per second."""

    name: str
    architecture: int
    sms: int
    shared_per_sm: int
    shared_per_block: int
    l2: int
    bandwidth: float
    cooperative: bool = True

    def numbers(self) -> list[int]:
        shared = [self.shared_per_sm << 10, self.shared_per_block << 10]
        return [self.architecture, self.sms, *shared, self.l2 << 20, int(self.cooperative)]


# Sizes in KB (shared memory) and MB (L2), from NVIDIA's architecture white papers and data sheets.
GPUS = {
    "h200": Gpu("H200", 90, 132, 228, 227, 50, 4.8e12),
    "a100": Gpu("A100 80GB SXM", 80, 108, 164, 163, 40, 2.039e12),
}


@dataclass(frozen=True)
class Plan:
    """One launch plan; `loaded` and `stored` are elements of all tensors together."""

    pattern: str
    policy: str
    pack: int
    ranks: int
    teams: int
    blocks: int
    width: int
    relay: int
    shared_bytes: int
    loaded: int
    stored: int
    rule: str
    elements: int  # of one tensor
    element_bytes: int

    @property
    def passes(self) -> float:
        """How often the plan goes over a tensor of the input's size."""
        return (self.loaded + self.stored) / self.elements

    @property
    def bytes(self) -> int:
        return (self.loaded + self.stored) * self.element_bytes


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
        aligned = 1
        sizes = [outer, channels, inner, self.element_bytes, inputs, coefficients]
        return [*sizes, aligned, *map(int, phases)]


def program() -> Path:
    """The compiled plan.cpp; again where it or the headers have changed."""
    newest = max(path.stat().st_mtime for path in (SOURCE, *HEADERS))
    if not PROGRAM.exists() or PROGRAM.stat().st_mtime < newest:
        PROGRAM.parent.mkdir(exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        fresh = PROGRAM.with_suffix(f".{os.getpid()}")
        subprocess.run([*compiler, "-std=c++20", "-O1", SOURCE, "-o", fresh], check=True)
        fresh.replace(PROGRAM)  # at once, whoever else is compiling the same
    return PROGRAM


def plans(requests: Sequence[Request], gpu: Gpu, override: str = "") -> list[Plan]:
    lines = [" ".join(map(str, [*r.numbers(), *gpu.numbers()])) for r in requests]
    environment = os.environ | ({"BATCHNORM_EXT_CUDA_PLAN": override} if override else {})
    done = subprocess.run(
        [program()],
        input="\n".join(lines),
        text=True,
        capture_output=True,
        env=environment,
    )
    if done.returncode == 2:
        raise ValueError(done.stderr.strip())
    done.check_returncode()
    result = []
    for request, line in zip(requests, done.stdout.splitlines(), strict=True):
        pattern, policy, *numbers, rule = line.split(maxsplit=11)
        sizes = prod(request.shape), request.element_bytes
        result.append(Plan(pattern, policy, *map(int, numbers), rule, *sizes))
    return result
