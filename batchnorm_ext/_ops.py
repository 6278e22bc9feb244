"""Loads the compiled operators and says which calls they take."""

import functools
import importlib.util
import logging
import os
import platform
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as _functorch_active
from torch._C import _is_tracing
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling, is_exporting
from torch.overrides import (
    _get_current_function_mode_stack,
    has_torch_function,
)
from torch.utils._device import DeviceContext

from batchnorm_ext._native import Native

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


_refusal, _instruction_set, _cuda_architectures = _load()

_C = sys.modules["batchnorm_ext._C"]
_batch_norm = torch.ops.batchnorm_ext.batch_norm.default
_layer_norm = torch.ops.batchnorm_ext.layer_norm.default
_weight_norm = torch.ops.batchnorm_ext.weight_norm.default
batch_norm_update = torch.ops.batchnorm_ext.batch_norm_update.default
sync_batch_norm = torch.ops.batchnorm_ext.sync_batch_norm.default


def batch_norm(*arguments) -> Tensor:
    """The output of the operator, all of whose arguments are given.

    Called by torch.ops an operator takes longer than its kernel does for a small input; but a
    compiler knows only that way.
    """
    if is_dynamo_compiling():
        note_compiler()
        return _batch_norm(*arguments)[0]
    return _C.batch_norm(*arguments)


def layer_norm(*arguments) -> Tensor:
    return _layer_norm(*arguments)[0] if is_dynamo_compiling() else _C.layer_norm(*arguments)


def weight_norm(*arguments) -> Tensor:
    return _weight_norm(*arguments) if is_dynamo_compiling() else _C.weight_norm(*arguments)


DTYPES = _C.dtypes  # of inputs
_STRIDED = torch.strided
PLAIN = {Tensor, nn.Parameter}  # and, once that is imported, RecomputedTensor
STAND_INS = (FakeTensor, FunctionalTensor)  # of tracers, for a plain tensor


def leaves_process() -> bool:
    """Whether a graph is recorded that is to be loaded elsewhere, without this library."""
    return is_exporting() or _is_tracing()


def takes(native: Native, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call goes to the operators, here and now, and not to torch's own function.

    ``tensors``: those that the call takes, the input first.
    """
    reason = refusal(native, tensors)
    if reason is None:
        return True
    if not torch.compiler.is_compiling():
        log_once(native.name, reason)
    return False


def refusal(native: Native, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why a call does not go to the operators, or None if it does.

    What the operators find out by themselves is not asked here: see ``is_refusal``.
    """
    if native.is_replaced():
        return f"{native.name} of torch, or what it calls, has been replaced"
    if _functorch_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode automatic differentiation is active"
    input = tensors[0]
    if has_torch_function(tensors) and not torch.compiler.is_compiling():
        if reason := _overriding(*tensors):
            return reason
    if not isinstance(input, Tensor):
        return f"type {type(input).__qualname__}"
    if input.layout is not _STRIDED:
        return f"layout {input.layout}"
    if input.dtype not in DTYPES:
        return f"dtype {input.dtype}"
    if not (input.is_cpu or _has_kernels_for(native, input.device)):
        return f"device {input.device}"
    if type(input) not in PLAIN and _dispatches_in_python(input):
        return f"tensor subclass {type(input).__qualname__}"
    return None


def is_refusal(error: RuntimeError) -> bool:
    """Whether the operators have refused the call, which the checks do before anything is written.

    Other errors, as of hooks on what autograd saves, may come after that.
    """
    text = str(error)
    return _refusal in text or text.startswith(_REFUSALS_OF_PYTORCH)


_REFUSALS_OF_PYTORCH = (
    "batchnorm_ext::batch_norm_update() Expected",  # an argument that is no tensor
    "Could not run 'batchnorm_ext::batch_norm",  # an argument on another device, or quantized
    "Could not run 'batchnorm_ext::layer_norm",
)


def _overriding(*tensors: Tensor | None) -> str | None:
    """What overrides torch functions, or None if it is only the default device."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in PLAIN and has_torch_function((tensor,)):
            return f"tensor subclass {type(tensor).__qualname__}"
    for mode in _get_current_function_mode_stack():
        if not isinstance(mode, DeviceContext):
            return f"torch function mode {type(mode).__qualname__}"
    return None


def _has_kernels_for(native: Native, device: torch.device) -> bool:
    if device.type not in native.devices:
        return False
    if device.type == "cuda":
        return bool(_cuda_architectures) and _has_kernels_for_cuda(device.index)
    return True


def _has_kernels_for_cuda(index: int) -> bool:
    return _is_covered(index)


# What torch.compiler.assume_constant_result does; it would import all of the compiler, which takes
# longer than the rest of this package.
_has_kernels_for_cuda._dynamo_marked_constant = True
leaves_process._dynamo_marked_constant = True  # torch 2.11 compiles is_exporting() as True


@functools.cache
def _is_covered(index: int) -> bool:
    found = torch.cuda.get_device_capability(index)
    return any(
        (major, minor) <= found and (later or major == found[0])
        for major, minor, later in _cuda_architectures
    )


def _dispatches_in_python(input: Tensor) -> bool:
    kind = type(input)
    if issubclass(kind, STAND_INS):
        return False
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


@functools.lru_cache(maxsize=1000)
def log_once(name: str, reason: str) -> None:
    logger.debug("using torch's own %s: %s", name, reason)


# What recompute_activations lays on saved tensors, and whether it keeps a tensor by itself.
pack, unpack, is_recomputed, set_share = _C.pack, _C.unpack, _C.is_recomputed, _C.set_share


def recomputes() -> bool:
    """Whether outputs of norms are not kept for backward, here and now."""
    hooks = _top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0] is pack


@functools.cache
def log_kept_once(reason: str) -> None:
    logger.debug("recompute_activations has no effect %s", reason)


def note_compiler(asked: bool = False) -> None:
    """Say that outputs are not recomputed, for norms in code that is compiled.

    ``asked``: the code asks for it; otherwise who calls it may have.
    """
    if asked or recomputes():
        log_kept_once("in compiled code: the compiler decides what it computes again")


note_compiler._dynamo_marked_constant = True  # runs while the code is compiled


def show_config() -> str:
    """Describe the build: versions, compiler, the instruction set in use, CUDA architectures.

    Example::

        >>> print(batchnorm_ext.show_config())
        batchnorm_ext 0.1.0
        built for torch ..., loaded by torch ...
        ...
    """
    import batchnorm_ext
    from batchnorm_ext import _C, _build

    cuda = (
        f"{_build.CUDA}, architectures {_build.CUDA_ARCHITECTURES}" if _build.CUDA else "not built"
    )
    return (
        f"batchnorm_ext {batchnorm_ext.__version__}\n"
        f"built for torch {_build.TORCH}, loaded by torch {torch.__version__}\n"
        f"compiler: {_C.compiler}\n"
        f"CPU kernels: {_instruction_set}\n"
        f"CUDA kernels: {cuda}"
    )
