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
from torch.utils.cpp_extension import include_paths

from programs import (
    CSRC,
    MEMORY,
    RACE,
    WRONG,
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
EDITS = [
    (
        "tail of a column block is as wide as the block",
        "column.h",
        "lanes[whole].add(row + whole * L, stride(), tile, rest);",
        "lanes[whole].add(row + whole * L, stride(), tile);",
        MEMORY,
    ),
    (
        "coefficients end with the columns",
        "column.h",
        "spreads(s) ? s.columns + L : 0",
        "spreads(s) ? s.columns : 0",
        MEMORY,
    ),
    (
        "last chunk of rows has as many as the others",
        "row.h",
        "std::min(runs, g.outer - run)",
        "runs",
        MEMORY,
    ),
    (
        "partial load is whole",
        "vec.h",
        "std::clamp<int64_t>(count - first, 0, Vec<T>::size())",
        "Vec<T>::size()",
        MEMORY,
    ),
    (
        "partial store is whole",
        "transform.h",
        "part.store(out[k] + i, count);",
        "part.store(out[k] + i);",
        MEMORY,
    ),
    (
        "threads share the scratch of whole blocks",
        "schedule.h",
        "Scratch scratch;\n      const int64_t capacity",
        "static Scratch scratch;\n      const int64_t capacity",
        RACE,
    ),
    (
        "threads share the scratch of chunks",
        "schedule.h",
        "Scratch scratch;\n    for (int64_t task = begin; task < end; ++task) {",
        "static Scratch scratch;\n    for (int64_t task = begin; task < end; ++task) {",
        RACE,
    ),
    (
        "each thread finishes all cells",
        "schedule.h",
        "finish(begin, end - begin, a, a + cells);",
        "finish(0, end, part(0, 0), part(0, 0) + cells);",
        RACE,
    ),
    (
        "weights of a merge are swapped",
        "schedule.h",
        "merge(n, pattern.count(chunk), width, ",
        "merge(pattern.count(chunk), n, width, ",
        WRONG,
    ),
    (
        "chunks of others do not count",
        "schedule.h",
        "merge(n, pattern.count(chunk), end - begin, ",
        "merge(pattern.count(chunk), pattern.count(chunk), end - begin, ",
        WRONG,
    ),
    (
        "count of a chunk leaves out folded rows",
        "column.h",
        "s.rows * s.folded * g.inner",
        "s.rows * fold * g.inner",
        WRONG,
    ),
    (
        "last folded row is not joined",
        "column.h",
        "f < s.folded; ++f) sets.join",
        "f < s.folded - 1; ++f) sets.join",
        WRONG,
    ),
    (
        "rows left over by folds are skipped",
        "column.h",
        "full_chunks + (g.outer % fold != 0)",
        "full_chunks",
        WRONG,
    ),
    (
        "piece of a row goes on into the next channel",
        "row.h",
        "std::min(piece, g.inner - begin)",
        "piece",
        WRONG,
    ),
    (
        "blocks of all samples are those of the first",
        "column.h",
        "block / blocks_per_sample * g.channels + first_channel(block)",
        "first_channel(block)",
        WRONG,
    ),
    (
        "lanes beyond the end of a short run count",
        "row.h",
        "v.v[q] = Vec<A>::set(centre[r], v.v[q], ",
        "static_cast<void>(",
        WRONG,
    ),
    (
        "few elements of a cell are all those of its first run",
        "row.h",
        "const int64_t here = run * stride() + i;",
        "const int64_t here = i;",
        WRONG,
    ),
    (
        "last lanes of a fold are left out",
        "moments.h",
        "if (i < at + width) add(i, at + width - i);",
        "",
        WRONG,
    ),
    (
        "last lanes of a sum are left out",
        "moments.h",
        "if (n > width) odd = odd + Vec<double>::loadu(p + width, n - width);",
        "",
        WRONG,
    ),
    (
        "sums of a fold keep their centres",
        "moments.h",
        "moved = at::vec::fmadd(some, e, first)",
        "moved = first",
        WRONG,
    ),
    (
        "centre stays where it was",
        "lanes.h",
        "moved = at::vec::fmadd(sum, inverse, centre)",
        "moved = centre",
        WRONG,
    ),
    (
        "squares of a tile are not kept",
        "lanes.h",
        "flush(s2, m2, first_tile(), m2);",
        "",
        WRONG,
    ),
    (
        "sums of gradients begin anew with every tile",
        "lanes.h",
        "first_tile = false;",
        "",
        WRONG,
    ),
    (
        "head of a streamed row is not written",
        "transform.h",
        "if (i > 0) partial(0, i);",
        "",
        WRONG,
    ),
    (
        "last element of a streamed row is not written",
        "transform.h",
        "partial(i, n - i);",
        "partial(i, n - i - 1);",
        WRONG,
    ),
]
ACTIVATED_EDITS = [
    (
        "partial store of a kept gradient is whole",
        "lanes.h",
        "part.store(p + offset, std::min<int64_t>(count, Vec<T>::size()));",
        "part.store(p + offset);",
        MEMORY,
    ),
    (
        "end of a row in place is computed twice",
        "transform.h",
        "kStream || n < width || in_place",
        "kStream || n < width",
        WRONG,
    ),
    (
        "gradients are kept one element further on",
        "maps.h",
        "part.store(kept.to + (from - first_dy), g, kept.streams);",
        "part.store(kept.to + (from - first_dy) + 1, g, kept.streams);",
        MEMORY,
    ),
]
MUTANTS = [
    (program, Mutant.edit(CSRC / "cpu" / file, old, new, code, name))
    for program, edits in {"kernels": EDITS, "activated": ACTIVATED_EDITS}.items()
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
