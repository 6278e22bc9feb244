"""Normalization, residual and activation: the one table of cases, and the same in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm_ext import functional
from cases import LAYOUTS

C = 8

# hardsigmoid by relu6: PyTorch's own derivative multiplies float64 values by 1/6 in float32.
ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardtanh(-0.5, 1.25)": partial(F.hardtanh, min_val=-0.5, max_val=1.25),
    "leaky_relu": F.leaky_relu,
    "leaky_relu(0.25)": partial(F.leaky_relu, negative_slope=0.25),
    "leaky_relu(-0.5)": partial(F.leaky_relu, negative_slope=-0.5),
    "elu": F.elu,
    "elu(0.7)": partial(F.elu, alpha=0.7),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": lambda z: F.relu6(z + 3) / 6,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
PIECEWISE = [
    *("identity", "relu", "relu6", "hardtanh", "hardtanh(-0.5, 1.25)"),
    *("leaky_relu", "leaky_relu(0.25)"),
]
MODULES = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(inplace=True),
    "hardtanh(-0.5, 1.25)": nn.Hardtanh(-0.5, 1.25),
    "leaky_relu(0.25)": nn.LeakyReLU(0.25),
    "elu(0.7)": nn.ELU(0.7),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "mish": nn.Mish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}
# Rows of few and of many elements, columns, volumes; what has gaps in memory.
INPUTS = [
    ((3, C, 9, 7), "contiguous"),
    ((2, C, 40, 33), "contiguous"),
    ((3, C, 9, 7), "channels_last"),
    ((2, C, 40, 33), "channels_last"),
    ((4, C, 21), "contiguous"),
    ((4, C, 21), "channels_last"),
    ((2, C, 3, 4, 5), "channels_last"),
    ((40, C), "contiguous"),
    ((3, C, 9, 7), "channel_slice"),
    ((3, C, 9, 7), "every_other"),
    ((3, C, 9, 7), "last_two_swapped"),
]
NORMS = ("batch, training", "batch, evaluation", "instance", "group")


@dataclass
class Problem:
    """Tensors that require gradients, but for dy and the running statistics."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    dy: Tensor
    mean: Tensor
    var: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        names = ("x", "weight", "bias", "residual")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def double(self) -> Problem:
        copies = {
            name: None if v is None else v.detach().double().requires_grad_(v.requires_grad)
            for name, v in vars(self).items()
        }
        return Problem(**copies)


def make_problem(size, layout, dtype, has_residual: bool, device="cpu") -> Problem:
    def tensor(*size: int, as_parameter: bool = False) -> Tensor:
        values = torch.randn(*size, dtype=torch.float64)
        if as_parameter:
            return values.to(torch.promote_types(dtype, torch.float32)).to(device)
        return LAYOUTS[layout](values.to(dtype).to(device))

    per_channel = partial(tensor, size[1], as_parameter=True)
    return Problem(
        x=tensor(*size).requires_grad_(),
        weight=per_channel().requires_grad_(),
        bias=per_channel().requires_grad_(),
        residual=tensor(*size).requires_grad_() if has_residual else None,
        dy=tensor(*size),
        mean=per_channel() / 4,
        var=per_channel().abs() + 0.5,
    )


def fused(p: Problem, norm: str, activation: str) -> Tensor:
    rest = {"eps": 1e-5, "activation": activation, "residual": p.residual}
    if norm == "instance":
        return functional.instance_norm_act(p.x, p.weight, p.bias, **rest)
    if norm == "group":
        return functional.group_norm_act(p.x, 2, p.weight, p.bias, **rest)
    training = norm == "batch, training"
    state = (None, None) if training else (p.mean, p.var)
    return functional.batch_norm_act(p.x, *state, p.weight, p.bias, training, **rest)


def oracle(p: Problem, norm: str, activation: str, rounded_to: torch.dtype | None) -> Tensor:
    """By PyTorch's functions. With ``rounded_to`` the activation sees its input in that dtype, as
    it does where nothing is fused."""
    if norm == "instance":
        z = F.group_norm(p.x, C, p.weight, p.bias, 1e-5)
    elif norm == "group":
        z = F.group_norm(p.x, 2, p.weight, p.bias, 1e-5)
    elif norm == "batch, training":
        z = F.batch_norm(p.x, None, None, p.weight, p.bias, True)
    else:
        z = F.batch_norm(p.x, p.mean, p.var, p.weight, p.bias)
    if p.residual is not None:
        z = z + p.residual
    if rounded_to is not None:
        z = z + (z.to(rounded_to).double() - z).detach()
    return ACTIVATIONS[activation](z)


def gradients(y: Tensor, p: Problem) -> dict[str, Tensor]:
    leaves = p.leaves
    found = torch.autograd.grad(y, leaves.values(), p.dy.detach().to(y.dtype))
    return {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}


def bound(exact: Tensor, dtype: torch.dtype, terms: float) -> Tensor:
    """float32 arithmetic: some roundings of each term, sums of terms of both signs, at most 64
    units of the largest result or of a term; and the rounding of the result."""
    arithmetic = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    largest = max(exact.abs().max().item(), terms)
    return exact.abs() * torch.finfo(dtype).eps / 2 + largest * arithmetic
