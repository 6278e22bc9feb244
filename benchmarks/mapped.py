"""Keeps freed memory with the process, so that a new output costs no page faults (glibc)."""

import os
import resource
import sys
from collections.abc import Callable

import torch

# Never serve a block by mmap, never give memory back.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}
HUGE_PAGE = 2 << 20
POOL_BYTES = 3 << 30  # a dozen times the largest tensor, and the heap has room around every pin


def keep_memory() -> None:
    """Restarts the process if its allocator returns memory, then maps a pool for all that follows.

    Without the pool, small blocks left between large ones make the heap grow, and fault, again.
    """
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        # The allocator reads its settings once, at the start of a process.
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)
    torch.ones(POOL_BYTES, dtype=torch.uint8)


def check_mapped(call: Callable[[], object], output_bytes: int) -> None:
    """Raises if a call faults as a fresh output would, even one backed by huge pages in part."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    if faults > output_bytes // HUGE_PAGE // 2:
        raise RuntimeError(f"{faults} page faults in a call: its output was not mapped already")
