"""Weight and bias of a layer, followed or preceded by a map per channel."""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd


class Weights:
    """Weight and bias of a layer in float64: (groups, out, in, taps) and (groups, out, 1)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    def of(cls, layer: nn.Module) -> "Weights":
        groups, (inputs, outputs) = getattr(layer, "groups", 1), channels(layer)
        sizes = inputs // groups, outputs // groups
        transposed = isinstance(layer, _ConvTransposeNd)
        weight = layer.weight.double().reshape(groups, *(sizes if transposed else sizes[::-1]), -1)
        bias = weight.new_zeros(()) if layer.bias is None else layer.bias.double()
        return cls(
            weight.transpose(1, 2) if transposed else weight,
            bias.expand(outputs).reshape(groups, -1, 1),
        )

    def before_map(self, scale: Tensor, shift: Tensor) -> "Weights":
        """``scale * layer(x) + shift``"""
        scale, shift = scale.view_as(self.bias), shift.view_as(self.bias)
        return Weights(self.weight * scale[..., None], self.bias * scale + shift)

    def after_map(self, scale: Tensor, shift: Tensor) -> "Weights":
        """``layer(scale * x + shift)``"""
        groups, _, inputs, _ = self.weight.shape
        scale, shift = scale.view(groups, 1, inputs, 1), shift.view(groups, inputs, 1)
        return Weights(self.weight * scale, self.weight.sum(-1) @ shift + self.bias)

    def rounded(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters in the dtype, the shape and the memory format of the layer's."""
        transposed = isinstance(layer, _ConvTransposeNd)
        weight = self.weight.transpose(1, 2) if transposed else self.weight
        weight = torch.empty_like(layer.weight).copy_(weight.reshape(layer.weight.shape))
        like = layer.weight if layer.bias is None else layer.bias
        return {
            "weight": nn.Parameter(weight, layer.weight.requires_grad),
            "bias": nn.Parameter(self.bias.flatten().to(like.dtype), like.requires_grad),
        }


def channels(layer: nn.Module) -> tuple[int, int]:
    """Those of the input and of the output."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels
