"""What a measurement was taken on; it travels with every result."""

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

import batchnorm_ext

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


def environment() -> dict[str, str | int]:
    return {
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
