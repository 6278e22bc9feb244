"""What the docstrings of all layers have in common."""

import inspect
from collections.abc import Callable
from typing import TypeVar

Layer = TypeVar("Layer", bound=type)

_DETAILS = r"""
.. math:: y = \frac{{x - \mathrm{{E}}[x]}}{{\sqrt{{\mathrm{{Var}}[x] + \epsilon}}}} * \gamma + \beta

Mean and (biased) variance are per channel C, over all other dimensions. In training they are those
of the batch, and the running statistics move towards them by ``momentum``, the variance to the
unbiased one; evaluation uses the running statistics. An empty batch changes neither them nor
``num_batches_tracked``.

Source: Ioffe & Szegedy, *Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift*, 2015, https://arxiv.org/abs/1502.03167, algorithms 1 and 2.

Args:
{num_features}    eps: added to the variance; positive in training. Default: 1e-5.
    momentum: share of the batch in the new running statistics; None averages over all batches.
        Default: 0.1.
    affine: whether the layer has ``weight`` (gamma, at first 1) and ``bias`` (beta, at first 0).
        Default: True.
    track_running_stats: whether the layer has running statistics; without them it uses those of
        the batch in evaluation, too. Default: True.
    device, dtype: of parameters and running statistics.
    bias: whether there is a ``bias`` where ``affine`` is true, if this version of PyTorch has the
        argument. Default: True.

Shape:
    Input: ``{shape}``.
    Output: the same, in the dtype and memory format of the input.

Dtypes:
    Input: float32, float64, bfloat16 or float16. Parameters and running statistics: float32 or the
    dtype of the input. Other dtypes, layouts and devices are computed by PyTorch's own function.

Raises:
    ValueError: an input of another number of dimensions; in training, one value per channel, or an
        ``eps`` that is not positive.
    RuntimeError: an input with another number of channels, or on another device; parameters or
        running statistics of a dtype that does not fit the input; running statistics that share
        memory with each other.
    NotImplementedError: an integer or boolean input.

    Running statistics and ``num_batches_tracked`` are then as before.
"""
_NUM_FEATURES = "    num_features: C, the number of channels.\n"


def documented(shape: str) -> Callable[[Layer], Layer]:
    """Complete the docstring of a layer for inputs of this shape.

    The class has the summary and the example; what all layers share goes between them.
    """

    def complete(layer: Layer) -> Layer:
        if layer.__doc__ is None:  # python -OO
            return layer
        summary, example = inspect.cleandoc(layer.__doc__).split("\n\n", 1)
        lazy = "num_features" not in inspect.signature(layer).parameters
        details = _DETAILS.format(shape=shape, num_features="" if lazy else _NUM_FEATURES)
        layer.__doc__ = f"{summary}\n{details}\n{example}\n"
        return layer

    return complete
