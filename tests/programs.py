"""Compiles test programs of kernels, runs them under sanitizers, breaks kernels on purpose."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock  # which torch needs as well

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

MODES = {
    "plain": (),
    "thread": ("-fsanitize=thread",),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}

# Exit codes: of the program itself where a number is off, of ThreadSanitizer, and of
# AddressSanitizer with UBSan.
WRONG, RACE, MEMORY = 1, 66, 67

_FLAGS = (
    "-std=c++20 -O1 -g1 -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off "
    "-fno-omit-frame-pointer -pthread"
).split()
_OPTIONS = {
    "TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}:atexit_sleep_ms=0",
    "ASAN_OPTIONS": f"exitcode={MEMORY}:detect_leaks=0",
    "UBSAN_OPTIONS": f"halt_on_error=1:exitcode={MEMORY}:print_stacktrace=1",
}
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
    flags: Iterable[str] = (),
    directory: Path,
) -> Path:
    """The executable of ``source``; compiled only where ``directory`` does not have it yet.

    It is found again by the compiler, its flags and all the text that it would read.
    """
    command = [
        *_compiler(),
        *_FLAGS,
        *MODES[mode],
        *(f"-D{define}" for define in defines),
        *(f"-I{path}" for path in include),
        *flags,
    ]
    text = _compile([*command, "-E", str(source)])
    key = hashlib.sha256("\0".join([*command, _version(), text]).encode()).hexdigest()[:16]
    binary = directory / f"{source.stem}-{mode}-{key}"
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{binary}.lock"):  # once, whoever else wants the same
        if not binary.exists():
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                fresh = Path(scratch) / binary.name
                _compile([*command, str(source), "-o", str(fresh)])
                fresh.replace(binary)  # at once, or what was cut off would pass for whole
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


def skip_without(mode: str) -> None:
    """Skip the test where there are no programs in this mode; --require-sanitizers forbids that."""
    if reason := unsupported(mode):
        pytest.skip(reason)


@dataclass(frozen=True)
class Mutant:
    """A file with an error in it, which is to end a program with this code."""

    file: Path
    name: str
    text: str
    code: int = RACE

    @classmethod
    def edit(cls, file: Path, old: str, new: str, code: int, name: str = "") -> Mutant:
        """``new`` for ``old``, which has to be there once."""
        text = file.read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
        return cls(file, name or new, text.replace(old, new), code)

    @property
    def mode(self) -> str:
        """In which it is to be seen."""
        return {RACE: "thread", MEMORY: "address"}.get(self.code, "plain")

    def __str__(self) -> str:
        return f"{self.file.name}:{self.name}"

    @contextlib.contextmanager
    def tree(self, directory: Path, root: Path = CSRC) -> Iterator[Path]:
        """A copy of ``csrc`` with the error, or with a file of ``root`` on top that has it."""
        with tempfile.TemporaryDirectory(dir=directory) as name:
            shutil.copytree(CSRC, name, dirs_exist_ok=True)
            (Path(name) / self.file.relative_to(root)).write_text(self.text)
            yield Path(name)


def selected(request: pytest.FixtureRequest, parameter: str) -> list:
    """The values of a parameter in those tests of the module that will run."""
    items = [item for item in request.session.items if item.path == request.path]
    params = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return list(dict.fromkeys(p[parameter] for p in params if parameter in p))


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
    return Result(done.returncode, done.stdout, done.stderr)
