"""Whether this build computes what it should, on this machine, in a few seconds."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm_ext import _ops, modules, reference
from batchnorm_ext._native import BATCH_NORM

_LAYERS = {2: modules.BatchNorm1d, 4: modules.BatchNorm2d, 5: modules.BatchNorm3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Odd sizes reach the ends of vectors, the larger ones are shared by threads.
_SIZES = [(33, 17), (256, 64), (3, 17, 13, 9), (8, 64, 28, 28), (2, 16, 3, 8, 7)]

# The largest error, relative to the largest value. It is far from what an element left out would
# cause, which is all that is to be found here; the tests have bounds for each quantity.
_ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.float16: 1, torch.bfloat16: 1}
_BOUNDS = {dtype: count * torch.finfo(dtype).eps for dtype, count in _ROUNDINGS.items()}


class Case(NamedTuple):
    size: tuple[int, ...]
    memory_format: torch.memory_format
    dtype: torch.dtype
    training: bool
    device: torch.device

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        mode = "training" if self.training else "evaluation"
        memory_format, dtype = (str(v).removeprefix("torch.") for v in self[1:3])
        return f"{size} {dtype} {memory_format}, {mode}, on {self.device}"


def cases(device: torch.device) -> Iterator[Case]:
    for size in _SIZES:
        formats = {torch.contiguous_format, _CHANNELS_LAST.get(len(size), torch.contiguous_format)}
        for memory_format in sorted(formats, key=str):
            for dtype in _BOUNDS:
                for training in (True, False):
                    yield Case(size, memory_format, dtype, training, device)


def failure(case: Case) -> str | None:
    """What is wrong in this case, or None."""
    try:
        for name, (actual, expected) in _results(case).items():
            error = (actual.cpu().double() - expected).abs().max() / expected.abs().max()
            bound = _BOUNDS[actual.dtype]
            if not error <= bound:  # NaN is a failure, too
                return f"{case}: {name} is off by {error:.1e} of its largest value, not {bound:.1e}"
    except Exception as error:
        return f"{case}: {type(error).__name__}: {error}"
    return None


def _results(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """What a layer computes, and the same in float64."""
    generator = torch.Generator().manual_seed(0)
    channels = case.size[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

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
    if reason := _ops.refusal(BATCH_NORM, (x, *statistics, layer.weight, layer.bias)):
        raise RuntimeError(f"the kernels do not take it: {reason}")
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
