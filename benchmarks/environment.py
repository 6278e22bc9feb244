"""The machine and the allocator of a measurement. Both are written into every result file."""

import ctypes.util
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

ALLOCATORS = ("glibc", "tcmalloc")
PREFERRED = ("tcmalloc_minimal", "tcmalloc")
LIBRARIES = ["/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"]


def loaded_allocator() -> str:
    """The allocator of this process, by the libraries that it has mapped."""
    maps = Path("/proc/self/maps")
    found = re.search("/lib(tcmalloc|jemalloc|mimalloc)", maps.read_text() if maps.exists() else "")
    return found[1] if found else platform.libc_ver()[0] or "system"


def find_tcmalloc() -> str:
    """A name or path that LD_PRELOAD takes."""
    for name in PREFERRED:
        if found := ctypes.util.find_library(name):
            return found
        for directory in [f"{sys.prefix}/lib", *LIBRARIES]:  # find_library needs ldconfig
            if paths := sorted(Path("/").glob(f"{directory[1:]}/lib{name}.so*")):
                return str(paths[0])
    raise SystemExit("tcmalloc was not found. Debian, Ubuntu: apt install libtcmalloc-minimal4")


def with_allocator(name: str) -> dict[str, str]:
    """The environment variables of a process that uses this allocator."""
    preloaded = re.split("[ :]", os.environ.get("LD_PRELOAD", ""))
    kept = [library for library in preloaded if library and "malloc" not in library]
    added = [find_tcmalloc()] if name == "tcmalloc" else []
    return os.environ | {"LD_PRELOAD": ":".join(added + kept)}


def use_allocator(name: str | None) -> None:
    """Start this program again unless it runs under the allocator; under both, one by one."""
    if name in (None, loaded_allocator()):
        return
    if name == "both":
        find_tcmalloc()  # now, not after the first run
        again = [sys.executable, *sys.orig_argv[1:], "--allocator"]
        sys.exit(max(subprocess.run([*again, each]).returncode for each in ALLOCATORS))
    variables = with_allocator(name)
    if os.environ.get("LD_PRELOAD") == variables["LD_PRELOAD"]:  # it has been started again
        sys.exit(f"{name} cannot be loaded: {loaded_allocator()} is in use")
    os.execve(sys.executable, sys.orig_argv, variables)


def output(*command: str) -> str:
    """What a command prints; "unknown" where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def git_commit() -> str:
    """The commit, and whether files other than results have changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    changed = output(*git, "status", "--short", "--", ":/", ":!/benchmarks/results")
    return output(*git, "rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.M)
    return found[1] if found else platform.processor() or platform.machine()


def huge_pages() -> str:
    """The chosen one of e.g. "always [madvise] never"."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.read_text().split("[")[1].split("]")[0] if path.exists() else "n/a"


def gpu() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "gpu": properties.name,
        "driver": output(*query),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def machine(device: str = "cpu") -> dict[str, object]:
    import batchnorm_ext

    if device == "cuda" and not batchnorm_ext._ops.takes(torch.empty(2, 1, device="cuda")):
        raise SystemExit("batchnorm_ext was built without kernels for this GPU: see make gpu")
    return (gpu() if device == "cuda" else {}) | {
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": loaded_allocator(),
        "huge pages": huge_pages(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": date.today().isoformat(),
    }
