"""The kernels of layer normalization over channels in the emulator, whole and without a barrier."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.harness import HERE, assert_passes, build, mutants, run
from emulator.test_kernels import BARRIER, DTYPES
from programs import CSRC, MODES, WRONG, Mutant, skip_without

SHAPES = [  # samples, channels and pixels, for blocks of two warps
    (2, 12, 64),  # whole packs
    (1, 70, 33),  # none
    (3, 5, 300),
    (2, 2, 40),
    (1, 97, 520),  # more than one strip of whole packs
]
DATA = ["normal", "shifted", "outlier", "huge", "tiny"]
KERNEL = CSRC / "cuda/across.cuh"
MUTANTS = [
    *(Mutant(KERNEL, str(line), text) for line, text in mutants(KERNEL, BARRIER)),
    Mutant.edit(KERNEL, "first ? double2{dot, sum} :", "", WRONG, "part that was not there"),
    Mutant.edit(KERNEL, "w < kWarps && w < s.channels", "w < kWarps - 1", WRONG),
    Mutant.edit(KERNEL, "lanes.recentre(count)", "lanes.recentre(1)", WRONG),
]


def compiled(mode: str, directory: Path, tree: Path = CSRC) -> Path:
    source, defines = HERE / "across.cpp", ["BATCHNORM_EXT_CUDA_THREADS=64"]
    return build(source, mode, defines=defines, include=[tree], directory=directory)


def configurations() -> list[list[str]]:
    """Each shape in each dtype; what else there is takes turns."""
    settings = []
    for i, (batch, channels, pixels) in enumerate(SHAPES):
        for j, dtype in enumerate(DTYPES):
            data, parameters = DATA[(i + j) % len(DATA)], ("f32", "same")[(i + j) % 2]
            settings.append(
                f"dtype={dtype} batch={batch} outer=1 stats={channels} inner={pixels} data={data} "
                f"parameters={parameters} aligned={int((i + j) % 3 > 0)} seed={i}"
            )
    return [text.split() for text in settings]


@pytest.mark.parametrize("mode", MODES)
def test_configurations(mode, pool, tmp_path):
    skip_without(mode)
    assert_passes(compiled(mode, tmp_path), pool, configurations())


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_reported(mutant, pool, tmp_path):
    skip_without(mutant.mode)
    with mutant.tree(tmp_path) as tree:
        program = compiled(mutant.mode, tmp_path, tree)
        ends = list(pool.map(lambda command: run(program, *command), configurations()))
    assert mutant.code in [end.code for end in ends], ends
