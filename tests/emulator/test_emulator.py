"""The emulator runs right kernels to the right end and finds what is wrong with the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from emulator.harness import HERE, MISUSE, build, mutants, run
from programs import MEMORY, MODES, RACE, Result, skip_without

SOURCE = HERE / "selftest.cpp"
SEEDS = range(3)

RIGHT = [
    "block_reduction",
    "grid_barrier",
    "launches_are_ordered",
    "last_block",
    "warp_barrier",
    "poisoned_memory",
    "collectives",
]

# The first text is where the error is reported: the line of the source that holds it.
MISUSED = {
    "divergent_barrier": ("  __syncthreads();", "divergent __syncthreads"),
    "early_exit": ("__syncthreads();", "exited"),
    "partial_warp": ("__shfl_xor_sync(kFullMask, 1, 1)", "exited"),
    "deadlock": ("__syncwarp();", "deadlock: no thread can go on"),
    "grid_barrier_without_residency": ("__syncthreads();", "livelock"),
    "partial_mask": ("__syncwarp(0xffff)", "0x0000ffff"),
    "ragged_block": (None, "whole warps"),
}
RACES = {
    "missing_barrier": "partial[",
    "missing_grid_barrier": "row[",
    "global_race": "*out = 1",
    "missing_warp_barrier": "values[threadIdx.x",
    "warp_barrier_for_block": "values[threadIdx.x",
}
MEMORY_ERRORS = {
    "shared_overrun": "heap-buffer-overflow",
    "global_overrun": "heap-buffer-overflow",
    "misaligned_vector": "misaligned address",
}


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return request.param


@pytest.fixture(scope="module")
def selftest(mode: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    binary = build(SOURCE, mode, directory=tmp_path_factory.mktemp("selftest"))
    return lambda case, seed=0: run(binary, case, seed)


def assert_names_line(err: str, text: str) -> None:
    """Assert that ``err`` names a line of the source that has ``text`` in it."""
    named = {int(n) for n in re.findall(rf"{re.escape(SOURCE.name)}:(\d+)", err)}
    lines = SOURCE.read_text().splitlines()
    assert any(text in lines[n - 1] for n in named), err


@pytest.mark.parametrize("case", RIGHT)
def test_right_kernel(selftest, case):
    for seed in SEEDS:
        assert selftest(case, seed) == Result(0, "", ""), f"seed {seed}"


def test_numbers(mode, tmp_path):
    assert run(build(HERE / "numbers.cpp", mode, directory=tmp_path)) == Result(0, "", "")


@pytest.mark.parametrize("case", MISUSED)
def test_misuse(selftest, case):
    line, message = MISUSED[case]
    for seed in SEEDS:
        result = selftest(case, seed)
        assert result.code == MISUSE and message in result.err, result
        if line:
            assert_names_line(result.err, line)


@pytest.mark.parametrize("case", RACES)
def test_race(selftest, mode, case):
    for seed in SEEDS:
        result = selftest(case, seed)
        if mode != "thread":  # the results are right all the same
            assert result == Result(0, "", "")
            continue
        assert result.code == RACE and "data race" in result.err, result
        assert_names_line(result.err, RACES[case])


@pytest.mark.parametrize("mode", ["address"], indirect=True)
@pytest.mark.parametrize("case", MEMORY_ERRORS)
def test_memory_error(selftest, case):
    result = selftest(case)
    assert result.code == MEMORY and MEMORY_ERRORS[case] in result.err, result


def test_stack_overflow(selftest):
    assert selftest("stack_overflow").code not in (0, MISUSE)


@pytest.mark.parametrize("case", ["tickets", "block_order"])
def test_interleaving(selftest, case):
    """Other seeds interleave otherwise, the same seed does not."""
    orders = [selftest(case, seed).out.split() for seed in SEEDS]
    assert all(sorted(order, key=int) == list(map(str, range(len(order)))) for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    assert selftest(case, SEEDS[0]).out.split() == orders[0]


def test_build_is_cached(tmp_path):
    source, header = tmp_path / "main.cpp", tmp_path / "value.h"
    source.write_text('#include "value.h"\n#include "emulator.h"\nint main() { return VALUE; }\n')
    header.write_text("#define VALUE 5\n")

    def binary(**options) -> Path:
        return build(source, "plain", directory=tmp_path / "out", **options)

    first = binary()
    written = first.stat().st_mtime_ns
    assert run(first).code == 5
    assert binary() == first and first.stat().st_mtime_ns == written
    assert binary(defines=["OTHER=1"]) != first
    header.write_text("#define VALUE 6\n")
    assert run(binary()).code == 6


def test_mutants(tmp_path):
    path = tmp_path / "kernel.cuh"
    path.write_text("a();\n  sync(x, 1);  // why\nif (b)\n  sync(y);\nc(); sync(z);\n")
    assert list(mutants(path, r"sync\(.*\);")) == [
        (2, "a();\n  ;\nif (b)\n  sync(y);\nc(); sync(z);\n"),
        (4, "a();\n  sync(x, 1);  // why\nif (b)\n  ;\nc(); sync(z);\n"),
    ]
