"""Compiles CUDA kernels for the emulator, runs them under sanitizers, removes barriers."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

MODES = {
    "plain": (),
    "thread": ("-fsanitize=thread",),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}

# Exit codes: of the emulator, ThreadSanitizer, and AddressSanitizer with UBSan.
MISUSE, RACE, MEMORY = 3, 66, 67

_FLAGS = (
    "-std=c++20 -O1 -g1 -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off "
    "-fno-omit-frame-pointer -pthread -DBATCHNORM_EXT_EMULATOR"
).split()
_OPTIONS = {
    "TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}:atexit_sleep_ms=0",
    "ASAN_OPTIONS": f"exitcode={MEMORY}:detect_leaks=0",
    "UBSAN_OPTIONS": f"halt_on_error=1:exitcode={MEMORY}:print_stacktrace=1",
}
_SWAPCONTEXT_WARNING = "ASan doesn't fully support makecontext/swapcontext"
_LAYOUT_ERROR = "FATAL: ThreadSanitizer: unexpected memory mapping"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class BuildError(Exception):
    """The compiler's message."""


def build(
    source: Path,
    mode: str,
    *,
    defines: Iterable[str] = (),
    include: Iterable[Path] = (),
    directory: Path | None = None,
) -> Path:
    """The executable of ``source``; compiled only where ``directory`` does not have it yet.

    ``include`` is searched before the emulator's own directory. An executable is found again by
    the compiler, its flags and all the text that it would read.
    """
    directory = ROOT / "build" / "emulator" if directory is None else directory
    command = [
        *_compiler(),
        *_FLAGS,
        *MODES[mode],
        *(f"-D{define}" for define in defines),
        *(f"-I{path}" for path in (*include, HERE)),
    ]
    text = _compile([*command, "-E", str(source)])
    key = hashlib.sha256("\0".join([*command, _version(), text]).encode()).hexdigest()[:16]
    binary = directory / f"{source.stem}-{mode}-{key}"
    if not binary.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            fresh = Path(scratch) / binary.name
            _compile([*command, str(source), "-o", str(fresh)])
            fresh.replace(binary)  # at once, whoever else is compiling the same
    return binary


def run(binary: Path, *arguments: object, timeout: float = 300) -> Result:
    """Run an executable with the sanitizers set up to stop at the first error."""
    command = [str(binary), *map(str, arguments)]
    result = _run(command, timeout)
    setarch = shutil.which("setarch")
    if _LAYOUT_ERROR in result.err and setarch:  # too random an address space for this libtsan
        result = _run([setarch, platform.machine(), "-R", *command], timeout)
    if "FATAL: ThreadSanitizer" in result.err:
        raise RuntimeError(result.err)
    return result


@functools.cache
def unsupported(mode: str) -> str | None:
    """Why programs cannot be built or run in this mode, if they cannot."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "empty.cpp"
        source.write_text("int main() {}\n")
        try:
            result = run(build(source, mode, directory=source.parent))
        except (BuildError, RuntimeError, OSError) as error:
            return f"no {mode} mode: {error}"
    return None if result.code == 0 else f"no {mode} mode: exit code {result.code}, {result.err}"


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


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


@functools.cache
def _version() -> str:
    return _compile([*_compiler(), "--version"])


def _compile(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr}")
    return done.stdout


def _run(command: list[str], timeout: float) -> Result:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        env=os.environ | _OPTIONS,
    )
    lines = done.stderr.splitlines(keepends=True)
    err = "".join(line for line in lines if _SWAPCONTEXT_WARNING not in line)
    return Result(done.returncode, done.stdout, err)
