"""The compiled operators: loads those for this machine, and says how they were built."""

import importlib.util
import logging
import os
import platform
import re
import sys
from pathlib import Path

import torch

logger = logging.getLogger("batchnorm_ext")

_REBUILD = (
    "rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .` in its "
    "source directory"
)


def _load() -> tuple[str, str, list[tuple[int, int, bool]]]:
    """Load the operators and the kernels for this machine.

    Returns the words of a refusal, the instruction set of the CPU kernels, and the architectures of
    the CUDA kernels: their compute capability, and whether later ones can compile them.
    """
    try:
        from batchnorm_ext import _build
    except ImportError:
        raise ImportError(_not_built()) from None
    if importlib.util.find_spec("batchnorm_ext._C") is None:
        version = platform.python_version()
        raise ImportError(f"batchnorm_ext was built for another Python than {version}: {_REBUILD}")
    built, found = (".".join(v.split(".")[:2]) for v in (_build.TORCH, torch.__version__))
    if built != found:
        raise ImportError(
            f"batchnorm_ext was built for torch {built} and cannot be loaded by torch "
            f"{torch.__version__}: {_REBUILD}"
        )
    from batchnorm_ext import _C  # importing it registers the schemas

    name = _load_for_this_cpu()
    if _build.CUDA is None:  # an earlier build in place may have left kernels behind
        return _C.refusal, name, []
    torch.ops.load_library(importlib.util.find_spec("batchnorm_ext._cuda").origin)
    built = re.findall(r"(\d+)\.(\d+)\w?(\+PTX)?", _build.CUDA_ARCHITECTURES)
    architectures = [(int(major), int(minor), bool(ptx)) for major, minor, ptx in built]
    return _C.refusal, name, architectures


def _not_built() -> str:
    """What is wrong where this folder holds sources only."""
    package = Path(__file__).parent
    for entry in sys.path:
        other = Path(entry, package.name)
        if (other / "_build.py").exists() and not other.samefile(package):
            return (
                f"{package} is not built and hides the installed {other}: start Python in another "
                "directory, or build this one with `pip install --no-build-isolation --editable .`"
            )
    return (
        f"{package} is not built: run `pip install --no-build-isolation --editable .` in "
        f"{package.parent}"
    )


# From the least to the most that a processor may have.
_INSTRUCTION_SETS = ("default", "avx2", "avx512", "avx512_bf16")


def _load_for_this_cpu() -> str:
    """Load the kernels for the most that this CPU has and that was built; say which that is."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    # The environment may ask for less, and then gets exactly what it names.
    if capability == "avx512" and "ATEN_CPU_CAPABILITY" not in os.environ:
        if torch.cpu.get_capabilities().get("avx512_bf16"):
            capability = "avx512_bf16"
    at_most = _INSTRUCTION_SETS.index(capability) if capability in _INSTRUCTION_SETS else 0
    for name in reversed(_INSTRUCTION_SETS[: at_most + 1]):
        spec = importlib.util.find_spec(f"batchnorm_ext._cpu_{name}")
        if spec is not None:
            torch.ops.load_library(spec.origin)
            return name
    raise ImportError(
        f"batchnorm_ext was built without kernels for this CPU ({capability}): {_REBUILD}"
    )


REFUSAL, INSTRUCTION_SET, CUDA_ARCHITECTURES = _load()
C = sys.modules["batchnorm_ext._C"]


def show_config() -> str:
    """Describe the build: versions, compiler, the instruction set in use, CUDA architectures.

    Example::

        >>> print(batchnorm_ext.show_config())
        batchnorm_ext 0.1.0
        built for torch ..., loaded by torch ...
        ...
    """
    import batchnorm_ext
    from batchnorm_ext import _build

    cuda = (
        f"{_build.CUDA}, architectures {_build.CUDA_ARCHITECTURES}" if _build.CUDA else "not built"
    )
    return (
        f"batchnorm_ext {batchnorm_ext.__version__}\n"
        f"built for torch {_build.TORCH}, loaded by torch {torch.__version__}\n"
        f"compiler: {C.compiler}\n"
        f"CPU kernels: {INSTRUCTION_SET}\n"
        f"CUDA kernels: {cuda}"
    )
