"""The norms beside batch normalization: this library's layer, PyTorch's, and the formula by hand.

"native" is PyTorch's layer; for layer normalization of channels, which has none, layer_norm between
two permutations. "hand" is the formula in PyTorch operators, as users write it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import batchnorm_ext

GROUPS, EPS = 32, 1e-5


class Formula(nn.Module):
    """A function of the input and of so many vectors of parameters."""

    def __init__(self, function: Callable[..., Tensor], size: int, count: int = 2) -> None:
        super().__init__()
        self.function = function
        self.vectors = nn.ParameterList(torch.ones(size) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.vectors)


def standardized(x: Tensor, *dims: int) -> Tensor:
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).pow(2).mean(dims, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    size = (-1, *[1] * (x.dim() - 2))
    return weight.view(size) * x + bias.view(size)


def permuted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.permute(0, 2, 3, 1)
    return F.layer_norm(rows, weight.shape, weight, bias, EPS).permute(0, 3, 1, 2)


def root_mean_square(x: Tensor, weight: Tensor) -> Tensor:
    """As LlamaRMSNorm of transformers."""
    single = x.float()
    single = single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * single.to(x.dtype)


def scaled(v: Tensor, g: Tensor) -> Tensor:
    norm = v.norm(2, tuple(range(1, v.dim())), keepdim=True)
    return v * (g.view(norm.shape) / norm)


HAND = {
    "GroupNorm": lambda x, w, b: affine(
        standardized(x.reshape(len(x), GROUPS, -1), 2).view(x.shape), w, b
    ),
    "InstanceNorm": lambda x, w, b: affine(standardized(x, *range(2, x.dim())), w, b),
    "LayerNorm of channels": lambda x, w, b: affine(standardized(x, 1), w, b),  # as in ConvNeXt
    "LayerNorm": lambda x, w, b: affine(standardized(x, -1), w, b),
    "RMSNorm": root_mean_square,
    "weight_norm": scaled,
}


def weight_norm(library, size: int) -> nn.Module:
    """The weight alone, as a function of its direction and of the norms."""
    norm = library.weight_norm(nn.Linear(1, 1)).parametrizations.weight[0]
    return Formula(lambda v, g: norm(g.view(-1, *[1] * (v.dim() - 1)), v), size, 1)


def layer_of(library, norm: str, shape: tuple[int, ...]) -> nn.Module:
    if norm == "GroupNorm":
        return library.GroupNorm(GROUPS, shape[1])
    if norm in ("BatchNorm", "InstanceNorm"):
        return getattr(library, f"{norm}{max(len(shape) - 2, 1)}d")(shape[1], affine=True)
    if norm == "LayerNorm of channels":
        ours = library is batchnorm_ext
        return library.LayerNorm(shape[1], channel_dim=1) if ours else Formula(permuted, shape[1])
    if norm == "weight_norm":
        return weight_norm(parametrizations if library is nn else library, shape[0])
    return getattr(library, norm)(shape[-1], EPS)


class Chain(nn.Module):
    """A norm, an addition and an activation: three modules, or one that takes the residual."""

    def __init__(self, norm: nn.Module, residual: Tensor | None, activation=None) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation
        self.residual = None if residual is None else nn.Parameter(residual)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is None:
            return self.norm(x, self.residual)
        y = self.norm(x)
        if self.residual is not None:
            y += self.residual  # in place, as in torchvision
        return self.activation(y)


def chains(name: str, x: Tensor) -> dict[str, nn.Module]:
    """Name -> what "norm + add + activation" or "norm + activation" is, for this input."""
    norm, *add, activation = name.split(" + ")
    residual, module = torch.randn_like(x) if add else None, getattr(nn, activation)(inplace=True)
    if norm == "GroupNorm":
        fused = batchnorm_ext.GroupNormAct(GROUPS, x.size(1), module)
    else:
        fused = batchnorm_ext.BatchNormAct2d(x.size(1), module)
    native = layer_of(nn, norm, x.shape)
    if x.is_cuda and norm == "BatchNorm":  # compiled code saves what several calls would write
        fused, native = map(without_running_statistics, (fused, native))
    return {"ours": Chain(fused, residual), "native": Chain(native, residual, module)}


def without_running_statistics(norm: nn.Module) -> nn.Module:
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False
    return norm


def layers(norm: str, shape: tuple[int, ...]) -> dict[str, nn.Module]:
    """Name -> a layer for inputs of this shape."""
    pair = {"ours": layer_of(batchnorm_ext, norm, shape), "native": layer_of(nn, norm, shape)}
    if norm == "BatchNorm":
        return pair
    size = shape[0] if norm == "weight_norm" else shape[1]
    count = 1 if norm in ("RMSNorm", "weight_norm") else 2
    return pair | {"hand": Formula(HAND[norm], size, count)}
