"""Loads the compiled operators, gives them their fake kernels and says which inputs they take."""

import functools
import importlib.util
import logging
import os
import re

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as _functorch_active
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

logger = logging.getLogger("batchnorm_ext")


def _load() -> tuple[str, list[tuple[int, int, bool]]]:
    """Load the operators and the kernels for this machine.

    Returns the instruction set of the CPU kernels, and the architectures of the CUDA kernels: their
    compute capability, and whether later ones can compile them.
    """
    try:
        from batchnorm_ext import _build
    except ImportError:
        raise ImportError(
            "batchnorm_ext is not built: run `pip install --no-build-isolation .` in its source "
            "directory"
        ) from None
    built, found = (".".join(v.split(".")[:2]) for v in (_build.TORCH, torch.__version__))
    if built != found:
        raise ImportError(
            f"batchnorm_ext was built for torch {built} and cannot be loaded by torch "
            f"{torch.__version__}: rebuild it with "
            "`pip install --no-build-isolation --force-reinstall --no-deps .`"
        )
    from batchnorm_ext import _C  # noqa: F401  (importing it registers the schemas)

    capability = torch.backends.cpu.get_cpu_capability().lower()
    # The environment may ask for less, and then gets exactly what it names.
    if capability == "avx512" and "ATEN_CPU_CAPABILITY" not in os.environ:
        if torch.cpu.get_capabilities().get("avx512_bf16"):
            capability = "avx512_bf16"
    for name in (capability, "default"):
        spec = importlib.util.find_spec(f"batchnorm_ext._cpu_{name}")
        if spec is not None:
            torch.ops.load_library(spec.origin)
            break
    cuda = importlib.util.find_spec("batchnorm_ext._cuda")
    if cuda is None:
        return name, []
    torch.ops.load_library(cuda.origin)
    built = re.findall(r"(\d+)\.(\d+)\w?(\+PTX)?", _build.CUDA_ARCHITECTURES)
    return name, [(int(major), int(minor), bool(ptx)) for major, minor, ptx in built]


_instruction_set, _cuda_architectures = _load()

batch_norm = torch.ops.batchnorm_ext.batch_norm.default
sync_batch_norm = torch.ops.batchnorm_ext.sync_batch_norm.default

# Integers are among them because the operator's own error for them is the clear one.
_DTYPES = frozenset(
    (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    + (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
)


def takes(input: Tensor) -> bool:
    """Whether the operators take this input here and now; if not, use torch's own function."""
    if (
        type(input) in (Tensor, nn.Parameter)
        and input.dtype in _DTYPES
        and input.layout is torch.strided
        and (input.is_cpu or _has_kernels_for(input.device))
        and not _functorch_active()
        and forward_ad._current_level < 0
    ):
        return True
    reason = refusal(input)
    if reason is not None and not torch.compiler.is_compiling():
        _log_once(reason)
    return reason is None


def refusal(input: Tensor) -> str | None:
    """Why the operators don't take this input, or None if they do."""
    if _functorch_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode automatic differentiation is active"
    if input.layout is not torch.strided:
        return f"layout {input.layout}"
    if input.dtype not in _DTYPES:
        return f"dtype {input.dtype}"
    if not _has_kernels_for(input.device):
        return f"device {input.device}"
    if _dispatches_in_python(input) and not isinstance(input, FakeTensor | FunctionalTensor):
        return f"tensor subclass {type(input).__qualname__}"
    return None


def _has_kernels_for(device: torch.device) -> bool:
    if device.type == "cuda" and _cuda_architectures:
        return _has_kernels_for_cuda(device.index)
    return device.type in ("cpu", "meta")


def _has_kernels_for_cuda(index: int) -> bool:
    return _is_covered(index)


# What torch.compiler.assume_constant_result does; it would import all of the compiler, which takes
# longer than the rest of this package.
_has_kernels_for_cuda._dynamo_marked_constant = True


@functools.cache
def _is_covered(index: int) -> bool:
    found = torch.cuda.get_device_capability(index)
    return any(
        (major, minor) <= found and (later or major == found[0])
        for major, minor, later in _cuda_architectures
    )


def _dispatches_in_python(input: Tensor) -> bool:
    return type(input).__torch_dispatch__ is not Tensor.__torch_dispatch__


@functools.cache
def _log_once(reason: str) -> None:
    logger.debug("using torch's own batch normalization: %s", reason)


def show_config() -> str:
    """Describe the build: versions, compiler, the instruction set in use, CUDA architectures.

    Example::

        >>> print(batchnorm_ext.show_config())
        batchnorm_ext 0.1.0
        built for torch 2.13.0+cpu, loaded by torch 2.13.0+cpu
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


@torch.library.register_fake("batchnorm_ext::batch_norm")
def _(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps):
    return _fake_forward(x, weight, bias, running_mean, running_var, num_batches_tracked)


@torch.library.register_fake("batchnorm_ext::batch_norm_backward")
def _(dy, x, weight, stats, training, output_mask):
    _check_devices(x, dy=dy, weight=weight, stats=stats)
    dx = torch.empty_like(x) if output_mask[0] else None
    if weight is not None:
        parameter = weight.new_empty(weight.shape)
    else:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        parameter = x.new_empty((x.shape[1],), dtype=dtype)
    dweight = torch.empty_like(parameter) if output_mask[1] else None
    dbias = parameter.new_empty((x.shape[1],)) if output_mask[2] else None
    return dx, dweight, dbias


@torch.library.register_fake("batchnorm_ext::moments")
def _(x):
    return x.new_empty((4 * x.shape[1] + 1,), dtype=torch.float64)


@torch.library.register_fake("batchnorm_ext::apply")
def _(x, weight, bias, running_mean, running_var, num_batches_tracked, sums, momentum, eps):
    _check_devices(x, sums=sums)
    return _fake_forward(x, weight, bias, running_mean, running_var, num_batches_tracked)


@torch.library.register_fake("batchnorm_ext::grad_moments")
def _(dy, x, stats):
    _check_devices(x, dy=dy, stats=stats)
    return x.new_empty((2 * x.shape[1],), dtype=torch.float64)


@torch.library.register_fake("batchnorm_ext::grad_apply")
def _(dy, x, weight, stats, grad_sums, count):
    _check_devices(x, dy=dy, weight=weight, stats=stats, grad_sums=grad_sums, count=count)
    return torch.empty_like(x)


def _fake_forward(x, weight, bias, running_mean, running_var, num_batches_tracked):
    _check_devices(
        x,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=num_batches_tracked,
    )
    return torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=torch.float64)


def _check_devices(x: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(
                f"batch_norm: expected {name} to be on the device of input, {x.device}, "
                f"got {tensor.device}"
            )
