"""Parametrizations of weights that normalize them."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from batchnorm_ext import _ops
from batchnorm_ext._native import WEIGHT_NORM
from batchnorm_ext._normalize import by_operator

__all__ = ["weight_norm"]

_Native = parametrizations._WeightNorm


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    r"""Weight normalization, as :func:`torch.nn.utils.parametrizations.weight_norm`.

    .. math:: w = g \frac{v}{\lVert v \rVert}

    Source: Salimans & Kingma, *Weight Normalization: A Simple Reparameterization to Accelerate
    Training of Deep Neural Networks*, 2016, equation 2. Forward and backward are one kernel each:
    PyTorch's fused ones for the first and the last dimension, otherwise those of the root mean
    square normalization. Derivatives are right in any order. On CUDA it
    is PyTorch's own function.

    Args:
        module: gets parameters ``parametrizations.<name>.original0`` (g) and ``original1`` (v) in
            place of the parameter ``name``, of the same values and with the same ``state_dict`` as
            by PyTorch's function. ``torch.nn.utils.parametrize.remove_parametrizations`` undoes it.
        name: of the parameter, in float32, float64, bfloat16 or float16.
        dim: the dimension that each index of has a norm of its own; None: one for all.

    Returns:
        ``module``. Its weight has the dtype of v. Other devices than CPUs, and other dtypes, are
        computed by PyTorch's own function.

    Raises:
        ValueError: a module without the parameter ``name``.
        IndexError: a ``dim`` that the parameter does not have.

    Example::

        >>> layer = batchnorm_ext.weight_norm(nn.Linear(20, 40))
        >>> layer.parametrizations.weight.original0.shape
        torch.Size([40, 1])
    """
    parametrizations.weight_norm(module, name, dim)
    norm = module.parametrizations[name][-1]
    norm.__class__ = _WeightNorm
    return module


class _WeightNorm(_Native):
    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            tensors = (weight_v, weight_g)
            weight = by_operator(WEIGHT_NORM, 0.0, tensors, _normalized, *tensors, self.dim)
            if weight is not None:
                return weight
        return torch._weight_norm(weight_v, weight_g, self.dim)


def _normalized(v: Tensor, g: Tensor, dim: int) -> Tensor | None:
    """``g * v / norm(v)``, or None where PyTorch has to look at the arguments."""
    whole, shape = dim == -1, v.shape
    norms = 1 if whole else shape[dim] if 0 <= dim < len(shape) else -1
    if v.numel() == 0 or g.numel() != norms or v.dtype != g.dtype:
        return None
    if dim in (0, len(shape) - 1):
        return _ops.weight_norm(v, g, dim)
    # channels of v.view(before, norms, after) by the root of their mean square
    x = v.reshape(1, 1, -1) if whole else v.reshape(shape[:dim].numel(), norms, -1)
    # norm = root mean square * root of the number of elements; halves would round the factor
    dtype = torch.promote_types(g.dtype, torch.float32)
    scale = g.reshape(-1).to(dtype) * (v.numel() // norms) ** -0.5
    y = _ops.batch_norm(x, scale, None, None, None, True, 0.0, 0, False, 1, None, "")
    return y.view(shape)
