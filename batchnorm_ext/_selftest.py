"""Whether this build computes what it should, on this machine, in a few seconds."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as native_parametrizations

from batchnorm_ext import _ops, modules, parametrizations, reference
from batchnorm_ext._native import (
    BATCH_NORM,
    GROUP_NORM,
    INSTANCE_NORM,
    LAYER_NORM,
    LAYER_NORM_OF_CHANNELS,
    RMS_NORM,
    WEIGHT_NORM,
    Native,
)

_LAYERS = {2: modules.BatchNorm1d, 4: modules.BatchNorm2d, 5: modules.BatchNorm3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Odd sizes reach the ends of vectors, the larger ones are shared by threads.
_SIZES = [(33, 17), (256, 64), (3, 17, 13, 9), (8, 64, 28, 28), (2, 16, 3, 8, 7)]


class _OverChannels(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _over_channels(library: ModuleType) -> nn.Module:
    return _OverChannels(24) if library is nn else modules.LayerNorm(24, channel_dim=1)


def _weight_norm(library: ModuleType) -> nn.Module:
    norm = native_parametrizations if library is nn else parametrizations
    return norm.weight_norm(nn.Linear(37, 9, bias=False))


class Norm(NamedTuple):
    """A norm beside batch normalization: its layer in ``torch.nn`` or ``modules``, and a size."""

    native: Native
    make: Callable[[ModuleType], nn.Module]
    size: tuple[int, ...]


_IMAGES, _ROWS = (3, 24, 13, 9), (5, 70, 37)
NORMS = {
    "InstanceNorm2d": Norm(
        INSTANCE_NORM,
        lambda lib: lib.InstanceNorm2d(24, affine=True, track_running_stats=True),
        _IMAGES,
    ),
    "GroupNorm": Norm(GROUP_NORM, lambda lib: lib.GroupNorm(4, 24), _IMAGES),
    "LayerNorm": Norm(LAYER_NORM, lambda lib: lib.LayerNorm(37), _ROWS),
    "LayerNorm of channels": Norm(LAYER_NORM_OF_CHANNELS, _over_channels, _IMAGES),
    "RMSNorm": Norm(RMS_NORM, lambda lib: lib.RMSNorm(37, eps=1e-6), _ROWS),
    "weight_norm": Norm(WEIGHT_NORM, _weight_norm, (9, 37)),
}

# The largest error, relative to the largest value. It is far from what an element left out would
# cause, which is all that is to be found here; the tests have bounds for each quantity.
_ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.float16: 1, torch.bfloat16: 1}
_BOUNDS = {dtype: count * torch.finfo(dtype).eps for dtype, count in _ROUNDINGS.items()}


class Case(NamedTuple):
    norm: str
    size: tuple[int, ...]
    memory_format: torch.memory_format
    dtype: torch.dtype
    training: bool
    device: torch.device

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        mode = "training" if self.training else "evaluation"
        memory_format, dtype = (str(v).removeprefix("torch.") for v in self[2:4])
        return f"{self.norm} {size} {dtype} {memory_format}, {mode}, on {self.device}"


def cases(device: torch.device) -> Iterator[Case]:
    sizes = [("BatchNorm", size, (True, False)) for size in _SIZES]
    sizes += [
        (name, norm.size, (True,))
        for name, norm in NORMS.items()
        if device.type in norm.native.devices
    ]
    for name, size, modes in sizes:
        formats = {torch.contiguous_format, _CHANNELS_LAST.get(len(size), torch.contiguous_format)}
        for memory_format in sorted(formats, key=str):
            for dtype in _BOUNDS:
                for training in modes:
                    yield Case(name, size, memory_format, dtype, training, device)


def failure(case: Case) -> str | None:
    """What is wrong in this case, or None."""
    results = _batch_norm if case.norm == "BatchNorm" else _other_norm
    try:
        for name, (actual, expected) in results(case).items():
            error = (actual.cpu().double() - expected).abs().max() / expected.abs().max()
            bound = _BOUNDS[actual.dtype]
            if not error <= bound:  # NaN is a failure, too
                return f"{case}: {name} is off by {error:.1e} of its largest value, not {bound:.1e}"
    except Exception as error:
        return f"{case}: {type(error).__name__}: {error}"
    return None


def _batch_norm(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """What a layer computes, and the same in float64."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    channels = case.size[1]
    layer = _LAYERS[len(case.size)](channels).train(case.training)
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
        tensor.copy_(normal(channels) + 1)
    layer.running_var.copy_(normal(channels).square() + 0.5)
    if case.dtype is torch.float64:
        layer.double()
    x, dy = (normal(*case.size).to(case.dtype) for _ in range(2))
    x += 2
    state = [b.clone() for b in layer.buffers()]
    expected = reference.batch_norm(
        x, layer.weight, layer.bias, *state, case.training, layer.momentum, layer.eps
    )
    gradients = reference.batch_norm_backward(dy, x, layer.weight, expected.stats, case.training)

    layer.to(case.device)
    x, dy = (t.to(case.device).to(memory_format=case.memory_format) for t in (x, dy))
    statistics = layer.running_mean, layer.running_var
    _require_kernels(BATCH_NORM, x, *statistics, layer.weight, layer.bias)
    y = layer(x.requires_grad_())
    y.backward(dy)
    return {
        "y": (y.detach(), expected.y),
        "dx": (x.grad, gradients.dx),
        "dweight": (layer.weight.grad, gradients.dweight),
        "dbias": (layer.bias.grad, gradients.dbias),
        "running_mean": (layer.running_mean, expected.running_mean),
        "running_var": (layer.running_var, expected.running_var),
    }


def _other_norm(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """What a layer computes, and what the layer of ``torch.nn`` does in float64."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    norm = NORMS[case.norm]
    ours = norm.make(modules).to(case.device, case.dtype).train(case.training)
    for tensor in ours.parameters():
        tensor.data.copy_(normal(*tensor.shape) + 1)
    exact = norm.make(nn).to(case.device, torch.float64).train(case.training)
    exact.load_state_dict(copy.deepcopy(ours.state_dict()))
    x, dy = (normal(*case.size).to(case.device, case.dtype) for _ in range(2))
    x, dy = (x + 2).to(memory_format=case.memory_format), dy.to(memory_format=case.memory_format)
    _require_kernels(norm.native, x, *ours.parameters())
    results = []
    for layer, dtype in (ours, case.dtype), (exact, torch.float64):
        leaf = x.detach().to(dtype).requires_grad_()
        y = layer.weight if case.norm == "weight_norm" else layer(leaf)
        y.backward(dy.to(dtype))
        gradients = {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
        gradients |= {} if leaf.grad is None else {"dx": leaf.grad}
        buffers = {name: b for name, b in layer.named_buffers() if b.is_floating_point()}
        results.append({"y": y.detach()} | gradients | buffers)
    return {name: (actual, results[1][name].cpu()) for name, actual in results[0].items()}


def _require_kernels(native: Native, *tensors: Tensor) -> None:
    if reason := _ops.refusal(native, tensors):
        raise RuntimeError(f"the kernels do not take it: {reason}")
