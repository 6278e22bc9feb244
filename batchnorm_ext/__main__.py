"""What a report of a bug needs, and a self-test of this build: ``python -m batchnorm_ext``.

The exit code is 1 if the self-test fails.
"""

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

import batchnorm_ext
from batchnorm_ext import _ops, _selftest
from batchnorm_ext._native import BATCH_NORM

# What decides speed and choice of kernels.
_VARIABLES = (
    *("ATEN_", "BATCHNORM_EXT_", "CUDA_", "GLIBC_", "GOMP_", "KMP_", "LD_PRELOAD", "MALLOC_"),
    *("MKL_", "OMP_", "PYTORCH_", "THP_"),
)


def report() -> dict[str, str]:
    """Versions, processor, GPUs, allocator and settings, by name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)]
    return {
        "installed in": str(Path(batchnorm_ext.__file__).parent),
        "Python": f"{platform.python_version()} {platform.python_implementation()}",
        "torch": f"{torch.__version__}, for CUDA {torch.version.cuda}",
        "numpy": _version("numpy"),
        "system": f"{platform.platform()}, {' '.join(platform.libc_ver())}",
        "CPU": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": f"{cores} of {os.cpu_count()}, {torch.get_num_threads()} threads",
        "huge pages": _read("/sys/kernel/mm/transparent_hugepage/enabled").strip() or "unknown",
        "allocator": _allocator(),
        **{f"GPU {index}": _gpu(index) for index in _gpus()},
        "environment": ", ".join(variables) or "nothing set",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _read(path: str) -> str:
    return Path(path).read_text(errors="replace") if Path(path).exists() else ""


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _allocator() -> str:
    """The library that serves malloc, by what is mapped into this process."""
    mapped = {line.split()[-1] for line in _read("/proc/self/maps").splitlines()}
    known = ("tcmalloc", "jemalloc", "mimalloc")
    return ", ".join(sorted(p for p in mapped if any(k in p for k in known))) or "of the C library"


def _gpus() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _has_kernels(index: int) -> bool:
    return _ops._has_kernels_for(BATCH_NORM, torch.device("cuda", index))


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    kernels = "with kernels" if _has_kernels(index) else "without kernels: PyTorch's own run there"
    return (
        f"{found.name}, compute capability {found.major}.{found.minor}, "
        f"{found.total_memory >> 20} MiB, driver {_driver()}, {kernels}"
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True).splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def self_test() -> bool:
    """Print each failure and the verdict; return whether there is no failure."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in _gpus() if _has_kernels(index)]
    start = time.perf_counter()
    cases = [case for device in devices for case in _selftest.cases(device)]
    failures = [text for case in cases if (text := _selftest.failure(case))]
    for text in failures:
        print(f"FAILED {text}")
    verdict = f"FAILED in {len(failures)} of" if failures else "passed,"
    seconds = time.perf_counter() - start
    print(
        f"self-test {verdict} {len(cases)} cases on {', '.join(map(str, devices))}, {seconds:.1f} s"
    )
    return not failures


def main() -> int:
    print(batchnorm_ext.show_config())
    for name, value in report().items():
        print(f"{name}: {value}")
    print(flush=True)
    return 0 if self_test() else 1


if __name__ == "__main__":
    sys.exit(main())
