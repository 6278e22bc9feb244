"""What most situations are made of: a batch, a layer with numbers of its own, a training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from situations.harness import Library

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [
    *FLOATS,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def batch(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values whose channels have a mean and a spread of their own; the same for the same size."""
    generator = torch.Generator().manual_seed(sum(size))
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    if len(size) > 1:
        per_channel = [-1, *[1] * (len(size) - 2)]
        channel = torch.arange(size[1], dtype=torch.float64).view(per_channel)
        values = values * (1 + channel / 4) + channel / 2
    return values.to(dtype)


def numbered(layer: nn.Module) -> nn.Module:
    """Give parameters and running statistics values that tell the channels apart."""
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.dim() == 1 and not tensor.is_meta:
                start = 0.5 if name.endswith(("weight", "running_var")) else -0.25
                tensor.copy_(start + torch.arange(len(tensor)) / 4)
    return layer


def both_modes(lib: Library, run: Callable[[nn.Module], object]) -> list:
    """What ``run`` makes of a layer in training and of one in evaluation."""
    return [run(numbered(lib.BatchNorm2d(3)).train(training)) for training in (True, False)]


def weights_of(y: Tensor) -> Tensor:
    """A gradient for ``y``: of both signs and nothing that its channels sum to zero with."""
    return batch(*y.shape).cos().to(y.dtype)


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def gradients(layer: nn.Module) -> dict[str, Tensor | None]:
    """Copies, since a later backward adds to the tensors."""
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: None if g is None else g.clone() for name, g in gradients.items()}


def step(layer: Callable, x: Tensor) -> dict[str, object]:
    """All that a training step leaves: output, gradients, state."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(weights_of(y))
    left = {"y": y, "dx": x.grad}
    if isinstance(layer, nn.Module):
        left |= {"gradients": gradients(layer), "state": state(layer)}
    return left


def statistics() -> tuple[Tensor, Tensor]:
    """A running mean and variance of three channels."""
    return torch.tensor([0.5, -0.25, 1.0]), torch.tensor([0.5, 1.0, 2.0])


def affine() -> tuple[Tensor, Tensor]:
    """A weight and a bias of three channels."""
    return torch.tensor([1.5, -0.5, 0.25]), torch.tensor([0.25, 0.5, -1.0])


def arguments(**changed) -> dict[str, object]:
    """The arguments of ``batch_norm``, some of them changed."""
    mean, var = statistics()
    weight, bias = affine()
    return {
        "input": batch(4, 3, 2, 2),
        "running_mean": mean,
        "running_var": var,
        "weight": weight,
        "bias": bias,
        "training": True,
    } | changed
