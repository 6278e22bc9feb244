"""Calls the compiled operators, and says which calls they take."""

import functools

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as _functorch_active
from torch._C import _is_tracing
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling, is_exporting
from torch.overrides import (
    _get_current_function_mode_stack,
    has_torch_function,
)
from torch.utils._device import DeviceContext

from batchnorm_ext._library import CUDA_ARCHITECTURES, REFUSAL, C, logger
from batchnorm_ext._native import Native
from batchnorm_ext._recompute import RecomputedTensor, note_compiler

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
    return C.batch_norm(*arguments)


def layer_norm(*arguments) -> Tensor:
    return _layer_norm(*arguments)[0] if is_dynamo_compiling() else C.layer_norm(*arguments)


def weight_norm(*arguments) -> Tensor:
    return _weight_norm(*arguments) if is_dynamo_compiling() else C.weight_norm(*arguments)


DTYPES = C.dtypes  # of inputs
_STRIDED = torch.strided
PLAIN = {Tensor, nn.Parameter, RecomputedTensor}
STAND_INS = (FakeTensor, FunctionalTensor)  # of tracers, for a plain tensor


def leaves_process() -> bool:
    """Whether a graph is recorded that is to be loaded elsewhere, without this library."""
    return is_exporting() or _is_tracing()


def is_for_compiler() -> bool:
    """Whether a plain batch normalization is torch's own because its code is being compiled.

    Inductor, the usual backend, fuses that with what stands around it, which costs less than the
    fastest norm that it cannot look into.
    """
    if not is_dynamo_compiling():
        return False
    note_compiler()
    return True


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
    return REFUSAL in text or text.startswith(_REFUSALS_OF_PYTORCH)


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
        return bool(CUDA_ARCHITECTURES) and _has_kernels_for_cuda(device.index)
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
        for major, minor, later in CUDA_ARCHITECTURES
    )


def _dispatches_in_python(input: Tensor) -> bool:
    kind = type(input)
    if issubclass(kind, STAND_INS):
        return False
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


@functools.lru_cache(maxsize=1000)
def log_once(name: str, reason: str) -> None:
    logger.debug("using torch's own %s: %s", name, reason)
