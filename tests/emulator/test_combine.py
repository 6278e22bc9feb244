"""The kernels that make statistics of cells, in the emulator."""

from __future__ import annotations

import pytest

from emulator.harness import HERE, assert_passes, build
from programs import CSRC, MODES, skip_without

CONFIGURATIONS = [
    f"dtype={dtype} batch={batch} stats={channels} per_stat={per_stat} outer={outer} inner={inner} "
    f"data={data} parameters={parameters}"
    for dtype, data, parameters in [
        ("f32", "normal", "f32"),
        ("f32", "shifted", "same"),
        ("f32", "constant", "f32"),
        ("f64", "normal", "same"),
        ("f64", "loud", "f32"),  # squares overflow: summed again
        ("bf16", "huge", "same"),
    ]
    for batch, channels, per_stat, outer, inner in [
        (2, 12, 4, 3, 5),
        (3, 70, 70, 6, 1),  # more cells than lanes
        (1, 40, 10, 2, 3),
        (5, 6, 2, 1, 7),
    ]
]


@pytest.mark.parametrize("mode", MODES)
def test_configurations(mode, pool, tmp_path):
    skip_without(mode)
    defines = ["BATCHNORM_EXT_CUDA_THREADS=64"]
    program = build(HERE / "combine.cpp", mode, defines=defines, include=[CSRC], directory=tmp_path)
    assert_passes(program, pool, [text.split() for text in CONFIGURATIONS])
