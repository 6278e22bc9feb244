"""What a measurement was taken on; it travels with every result."""

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

import batchnorm_ext
from batchnorm_ext import _ops

CPUINFO = Path("/proc/cpuinfo")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cpu_model() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def huge_pages() -> str:
    """The chosen one of e.g. "always [madvise] never"."""
    return HUGE_PAGES.read_text().split("[")[1].split("]")[0] if HUGE_PAGES.exists() else "n/a"


def git_commit() -> str:
    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "-s") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def gpu() -> dict[str, str | int]:
    if not _ops.takes(torch.empty(2, 1, device="cuda")):  # and would be measured as native
        raise SystemExit(
            "batchnorm_ext was built without kernels for this GPU: make gpu builds them"
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2 bytes": properties.L2_cache_size,
        "memory bytes": properties.total_memory,
    }


def environment(device: str = "cpu") -> dict[str, str | int]:
    return (gpu() if device == "cuda" else {}) | {
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge pages": huge_pages(),
        "torch": torch.__version__,
        "batchnorm_ext": batchnorm_ext.show_config(),
        "commit": git_commit(),
        "date": date.today().isoformat(),
    }
