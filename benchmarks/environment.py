"""The machine and the allocator of a measurement, and the options that benchmarks share."""

import argparse
import ctypes.util
import gc
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

OUT = Path(__file__).resolve().parent.parent / "build" / "bench"
ALLOCATORS = ("glibc", "tcmalloc")
LIBRARIES = f"usr/lib/*-linux-gnu usr/lib64 usr/lib usr/local/lib {sys.prefix[1:]}/lib".split()


def loaded_allocator() -> str:
    """The allocator of this process, by the libraries that it has mapped."""
    preloaded = search("/lib(tcmalloc|jemalloc|mimalloc)", "/proc/self/maps")
    return preloaded or platform.libc_ver()[0] or "system"


def find_tcmalloc() -> str:
    """A path for LD_PRELOAD, or only a name, which PyTorch's launcher would drop."""
    for name in "tcmalloc_minimal", "tcmalloc":
        paths = [path for each in LIBRARIES for path in Path("/").glob(f"{each}/lib{name}.so*")]
        if found := sorted(map(str, paths)) or ctypes.util.find_library(name):
            return found if isinstance(found, str) else found[0]
    raise SystemExit("tcmalloc was not found. Debian, Ubuntu: apt install libtcmalloc-minimal4")


def with_allocator(name: str) -> dict[str, str]:
    """The environment variables of a process that uses this allocator."""
    preloaded = re.split("[ :]", os.environ.get("LD_PRELOAD", ""))
    kept = [library for library in preloaded if library and "malloc" not in library]
    added = [find_tcmalloc()] if name == "tcmalloc" else []
    return os.environ | {"LD_PRELOAD": ":".join(added + kept)}


def start(args: argparse.Namespace) -> None:
    """Set the threads; start this program again if it has to run under another allocator."""
    torch.set_num_threads(args.threads)
    args.rounds = min(args.rounds, 3) if args.quick else args.rounds
    gc.freeze()  # later collections need not look at what is there now
    if (name := args.allocator) == "both":
        find_tcmalloc()  # now, not after the first run
        again = [sys.executable, *sys.orig_argv[1:], "--allocator"]
        sys.exit(max(subprocess.run([*again, each]).returncode for each in ALLOCATORS))
    if name in (None, loaded_allocator()):
        return
    variables = with_allocator(name)
    if os.environ.get("LD_PRELOAD") == variables["LD_PRELOAD"]:  # it has been started again
        sys.exit(f"{name} cannot be loaded: {loaded_allocator()} is in use")
    os.execve(sys.executable, sys.orig_argv, variables)


def output(command: str) -> str:
    """What a shell command prints; "unknown" where it fails."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    return "unknown" if done.returncode else done.stdout.strip()


def git_commit() -> str:
    """The commit, and whether files other than results have changed since."""
    git = f"git -C '{Path(__file__).parent}'"
    changed = output(f"{git} status --short -- :/ :!/benchmarks/results")
    return output(f"{git} rev-parse --short=12 HEAD") + "+changes" * bool(changed)


def search(pattern: str, path: str) -> str | None:
    text = Path(path).read_text() if Path(path).exists() else ""
    found = re.search(pattern, text, re.MULTILINE)
    return found and found[1]


def gpu() -> dict[str, str]:
    driver = output("nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0")
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"gpu": torch.cuda.get_device_name(), "driver": driver} | versions


def machine(args: argparse.Namespace) -> dict[str, object]:
    """The header of a result file."""
    import batchnorm_ext

    on_gpu = args.device == "cuda"
    if on_gpu and not batchnorm_ext._ops.takes(
        batchnorm_ext._native.BATCH_NORM, (torch.empty(2, 1, device="cuda"),)
    ):
        raise SystemExit("batchnorm_ext was built without kernels for this GPU: see make gpu")
    header = gpu() if on_gpu else {}
    header |= {
        "cpu": search(r"^model name\s*: (.*)$", "/proc/cpuinfo") or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": loaded_allocator(),
        "huge pages": search(r"\[(\w+)\]", "/sys/kernel/mm/transparent_hugepage/enabled"),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": date.today(),
    }
    options = {name: vars(args).get(name) for name in ("rounds", "runs", "quick")}
    return header | {name: value for name, value in options.items() if value}


def path(args: argparse.Namespace, name: str) -> Path:
    """The result file, on a CPU one for each allocator."""
    return args.out / (name + f"-{loaded_allocator()}" * (args.device == "cpu") + ".csv")


def make_parser(description: str, rounds: int, runs: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    help = "run under this allocator, or under each in turn (default: the one that is loaded)"
    parser.add_argument("--allocator", choices=(*ALLOCATORS, "both"), help=help)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved samples per case")
    if runs:
        parser.add_argument("--runs", type=int, default=1, help="of which the median is kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=OUT, help="directory of the CSV files")
    parser.add_argument("--quick", action="store_true", help="a smoke run, not a measurement")
    return parser
