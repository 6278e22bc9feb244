"""Programs of the emulator: CUDA kernels without a GPU, and without some of their barriers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import programs
from programs import Result

HERE = Path(__file__).resolve().parent
MISUSE = 3  # exit code of the emulator

_SWAPCONTEXT_WARNING = "ASan doesn't fully support makecontext/swapcontext"


def build(
    source: Path,
    mode: str,
    *,
    defines: Iterable[str] = (),
    include: Iterable[Path] = (),
    flags: Iterable[str] = (),
    directory: Path,
) -> Path:
    """The executable of ``source``; ``include`` is searched before the emulator's own directory."""
    return programs.build(
        source,
        mode,
        defines=["BATCHNORM_EXT_EMULATOR", *defines],
        include=[*include, HERE],
        flags=flags,
        directory=directory,
    )


def run(binary: Path, *arguments: object) -> Result:
    """Run an executable with the sanitizers set up to stop at the first error."""
    result = programs.run(binary, *arguments)
    lines = result.err.splitlines(keepends=True)
    return replace(result, err="".join(line for line in lines if _SWAPCONTEXT_WARNING not in line))


def assert_passes(
    program: Path, pool: ThreadPoolExecutor, commands: list[list[str]], start=""
) -> None:
    """Assert that the program succeeds on each of the commands, and that its lines start so."""
    results = pool.map(lambda command: run(program, *command), commands)
    failures = [
        f"{shlex.join([str(program), *command])}\n{result.out}{result.err}"
        for command, result in zip(commands, results, strict=True)
        if result.code
        or not all(line.startswith(start) for line in result.out.splitlines() or [""])
    ]
    assert not failures, "\n".join([f"{len(failures)} of {len(commands)} fail", *failures])


def mutants(path: Path, pattern: str) -> Iterator[tuple[int, str]]:
    """The text of a file without one of its statements, for each of them, and its line number.

    ``pattern`` is a regular expression for the statement, such as ``r"__syncthreads\\(\\);"``,
    which has to have the line to itself but for a comment. What is left of it is a lone
    semicolon: an ``if`` before it keeps its meaning, and the lines keep their numbers.
    """
    statement = re.compile(rf"(?P<indent>\s*){pattern}\s*(//.*)?")
    lines = path.read_text().splitlines()
    for i, line in enumerate(lines):
        if match := statement.fullmatch(line):
            mutant = [*lines[:i], f"{match['indent']};", *lines[i + 1 :]]
            yield i + 1, "\n".join(mutant) + "\n"
