"""The CPU kernels, built for the baseline: right numbers, no stray access, no race.

They run in programs of their own, whose threads are not those of OpenMP: ThreadSanitizer does not
see how these wait for each other. An error put into the kernels on purpose has to be reported. A
failure prints the command line that repeats it.
"""

from __future__ import annotations

import shlex
from concurrent.futures import Future
from pathlib import Path

import pytest
from errors import IN_ACTIVATED, IN_KERNELS
from torch.utils.cpp_extension import include_paths

from programs import (
    CSRC,
    Mutant,
    build,
    run,
    selected,
    skip_without,
    unsupported,
)

HERE = Path(__file__).resolve().parent
ELEMENTS = {"f32": "float", "f64": "double", "f16": "c10::Half", "bf16": "c10::BFloat16"}

# Which data each program gets in each mode, "" for all: strays and races do not depend on the
# numbers, but for sums of tiny ones, which are taken twice.
DATA = {
    ("kernels", "address"): ["normal", "tiny"],
    ("kernels", "thread"): ["normal"],
    ("kernels", "plain"): [""],
    ("activated", "address"): [""],
    ("activated", "plain"): [""],
}
# The slowest to compile comes first. float64 takes the way of float32, float16 that of bfloat16.
BUILDS = [
    ("kernels", "address", "bf16"),
    ("kernels", "address", "f32"),
    ("kernels", "thread", "bf16"),
    *(("kernels", "plain", dtype) for dtype in ELEMENTS),
    ("activated", "address", "bf16"),
    ("activated", "address", "f32"),
    ("activated", "plain", "bf16"),
]

MUTANT_DTYPE = "bf16"  # whose vectors are widened to two
MUTANTS = [
    (program, Mutant.edit(CSRC / "cpu" / file, old, new, code, name))
    for program, edits in {"kernels": IN_KERNELS, "activated": IN_ACTIVATED}.items()
    for name, file, old, new, code in edits
]


def compile_program(name: str, mode: str, dtype: str, directory: Path, tree: Path = CSRC) -> Path:
    """The program, with the headers of ``tree``."""
    # Checks of every access take half as long to compile where less is inlined, and run as fast.
    optimization = ["-Og"] if mode == "address" else []
    return build(
        HERE / f"{name}.cpp",
        mode,
        defines=["CPU_CAPABILITY=DEFAULT", f"BATCHNORM_EXT_ELEMENT={ELEMENTS[dtype]}"],
        include=[HERE / "shim", tree, HERE],
        flags=[*optimization, "-pthread", *(f"-isystem{path}" for path in include_paths())],
        directory=directory,
    )


def escape(program: str, mutant: Mutant, directory: Path) -> list[str]:
    """How the program ended on each kind of data; nothing if it reported the mutant."""
    ends = []
    with mutant.tree(directory) as tree:
        binary = compile_program(program, mutant.mode, MUTANT_DTYPE, tree, tree)
        for data in DATA[program, mutant.mode]:
            result = run(binary, data)
            if result.code == mutant.code:
                return []
            ends.append(f"{data}: {result}")
    return ends


@pytest.fixture(scope="module")
def programs(request, pool, tmp_path_factory) -> dict[tuple[str, str, str], Future[Path]]:
    """By name, mode and dtype."""
    directory = tmp_path_factory.mktemp("programs")
    return {
        chosen: pool.submit(compile_program, *chosen, directory)
        for chosen in selected(request, "program")
        if not unsupported(chosen[1])
    }


@pytest.fixture(scope="module")
def escapes(request, pool, tmp_path_factory) -> dict[tuple[str, Mutant], Future[list[str]]]:
    directory = tmp_path_factory.mktemp("mutants")
    return {
        (program, mutant): pool.submit(escape, program, mutant, directory)
        for program, mutant in selected(request, "mutant")
        if not unsupported(mutant.mode)
    }


@pytest.mark.parametrize("program", BUILDS, ids="-".join)
def test_kernels(programs, escapes, program):
    name, mode, _ = program
    skip_without(mode)
    binary = programs[program].result()
    for data in DATA[name, mode]:
        result = run(binary, data)
        assert result.code == 0, f"{shlex.join([str(binary), data])}\n{result.err}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: str(mutant[1]))
def test_mutant_is_reported(escapes, mutant):
    skip_without(mutant[1].mode)
    assert not (ends := escapes[mutant].result()), "\n".join(ends)
