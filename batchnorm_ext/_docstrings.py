"""What the docstrings of all layers have in common."""

import inspect
import textwrap
from collections.abc import Callable
from typing import TypeVar

from batchnorm_ext._activations import ACTIVATIONS

Layer = TypeVar("Layer", bound=type)

_STANDARDIZED = r"""
.. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma + \beta
"""

_AFFINE = """
    affine: whether the layer has ``weight`` (gamma, at first 1) and ``bias`` (beta, at first 0).
        Default: {affine}.
"""

_CREATED = """
    device, dtype: of {state}.
    bias: whether there is a ``bias`` beside the ``weight``, if this version of PyTorch has the
        argument. Default: True.
"""

_TENSORS = """
Shape:
    Input: ``{shape}``.
    Output: the same, in the dtype and memory format of the input.

Dtypes:
    Input: float32, float64, bfloat16 or float16.
    {State}: float32 or the dtype of the input.
    Other dtypes, layouts and devices are computed by PyTorch's own function.

Raises:
"""

_MISFIT = """
    RuntimeError: sizes, dtypes or devices of input and parameters that do not fit together, as an
        integer input.
"""

BATCH = (
    _STANDARDIZED
    + """
Mean and (biased) variance are per channel C, over all other dimensions. In training they are those
of the batch, and the running statistics move towards them by ``momentum``, the variance to the
unbiased one; evaluation uses the running statistics. An empty batch changes neither them nor
``num_batches_tracked``.

Source: Ioffe & Szegedy, *Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift*, 2015, https://arxiv.org/abs/1502.03167, algorithms 1 and 2.

Args:
    num_features: C, the number of channels.
    eps: added to the variance; positive in training. Default: 1e-5.
    momentum: share of the batch in the new running statistics; None averages over all batches.
        Default: 0.1."""
    + _AFFINE
    + """\
    track_running_stats: whether the layer has running statistics; without them it uses those of
        the batch in evaluation, too. Default: True."""
    + _CREATED
    + _TENSORS
    + """\
    ValueError: an input of another number of dimensions; in training, one value per channel, or an
        ``eps`` that is not positive.
    RuntimeError: an input with another number of channels, or on another device; parameters or
        running statistics of a dtype that does not fit the input; running statistics that share
        memory with each other.
    NotImplementedError: an integer or boolean input.

    Running statistics and ``num_batches_tracked`` are then as before.
"""
)

INSTANCE = (
    _STANDARDIZED
    + """
Mean and (biased) variance are per sample and channel, over the spatial dimensions. With
``track_running_stats`` the running statistics move, in training, towards the average over the
samples, and evaluation uses them.

Source: Ulyanov, Vedaldi & Lempitsky, *Instance Normalization: The Missing Ingredient for Fast
Stylization*, 2016, https://arxiv.org/abs/1607.08022, equation 2.

Args:
    num_features: C, the number of channels.
    eps: added to the variance. Default: 1e-5.
    momentum: share of the input in the new running statistics. Default: 0.1."""
    + _AFFINE
    + """\
    track_running_stats: whether the layer has running statistics. Default: {tracks}."""
    + _CREATED
    + _TENSORS
    + """\
    ValueError: an input of another number of dimensions, or, with ``affine``, of channels; one
        element per sample and channel."""
    + _MISFIT
)

GROUP = (
    _STANDARDIZED
    + """
Mean and (biased) variance are per sample and group of adjacent channels.

Source: Wu & He, *Group Normalization*, 2018, https://arxiv.org/abs/1803.08494, equations 1, 2, 7.

Args:
    num_groups: number of groups, which divides ``num_channels``.
    num_channels: C, the number of channels.
    eps: added to the variance. Default: 1e-5."""
    + _AFFINE
    + _CREATED.lstrip("\n")
    + _TENSORS
    + """\
    ValueError: a ``num_groups`` that does not divide ``num_channels``; a single sample with one
        element per group."""
    + _MISFIT
)

_ACTIVATED = r"""
.. math:: y = \phi\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma
    + \beta + r\right)

with an activation phi and, where ``forward`` is given one, a residual r of the shape, dtype and
device of the input. Parameters, buffers and ``state_dict`` are those of the layer without these.
``convert`` and ``revert`` leave this layer as it is; ``convert_sync_batchnorm`` makes
``BatchNormAct1d/2d/3d`` a ``SyncBatchNormAct``.
"""

_NAMES = ", ".join(f"``{name}``" for name in ("identity", *ACTIVATIONS))
_SOURCES = "; ".join(f"{name}: {a.source}" for name, a in ACTIVATIONS.items() if a.source)
_ACTIVATION = "\n" + textwrap.fill(
    f'activation: one of {_NAMES}, with arguments as in ``"leaky_relu(0.1)"``, ``"elu(0.5)"``, '
    f'``"hardtanh(-2, 2)"``; or such a module of ``torch.nn``. Default: relu. Sources: {_SOURCES}.',
    width=100,
    initial_indent="    ",
    subsequent_indent="        ",
    break_on_hyphens=False,
)

_RECOMPUTE = """
    recompute: whether the next layer keeps a way to compute the output again for its backward, and
        not the output, as in :func:`batchnorm_ext.recompute_activations`. The output is then of a
        subclass of Tensor, whose results are plain ones; it takes effect where a function of torch
        is called with it, or with a view of it. Outputs of SyncBatchNorm over several ranks are
        kept. Default: False."""


def _activated(details: str) -> str:
    """The details of a layer that has an activation as well."""
    text = details.replace(_STANDARDIZED, _ACTIVATED)
    text = text.replace("\n    eps: ", f"{_ACTIVATION}\n    eps: ", 1)
    text = text.replace("\n    bias: whether", f"{_RECOMPUTE}\n    bias: whether", 1)
    error = "    ValueError: an unknown activation; a residual unlike the input.\n"
    return text.replace("\nRaises:\n", f"\nRaises:\n{error}")


BATCH_ACT, GROUP_ACT = _activated(BATCH), _activated(GROUP)

_ROWS = """
    normalized_shape: sizes of the last dimensions, or the size of the last one.
    eps: %s
    elementwise_affine: whether the layer has %s of that shape.
        Default: True."""

_ROW_TENSORS = _TENSORS.replace(" and memory format of the input", " of the input, contiguous")

LAYER = (
    _STANDARDIZED
    + """
Mean and (biased) variance are over the last dimensions. On CUDA the layer is PyTorch's own, but
with ``channel_dim`` for an input that is not ``channels_last``.

Source: Ba, Kiros & Hinton, *Layer Normalization*, 2016, https://arxiv.org/abs/1607.06450,
equation 3.

Args:"""
    + _ROWS % ("added to the variance. Default: 1e-5.", "``weight`` (at first 1) and ``bias`` (0)")
    + """
    channel_dim: 1 for mean and variance over the channels of each position of ``(N, C, *)``, as in
        ConvNeXt (Liu et al., *A ConvNet for the 2020s*, 2022); the output keeps the memory format.
        Default: None, the last dimensions."""
    + _CREATED
    + _ROW_TENSORS.replace(
        "``.\n    Output", "``, or ``(N, C, *)`` with ``channel_dim``.\n    Output"
    )
    + "    ValueError: a ``channel_dim`` other than None and 1, or 1 with several sizes."
    + _MISFIT
)

RMS = (
    r"""
.. math:: y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} * \gamma

The mean is over the last dimensions. On CUDA the layer is PyTorch's own.

Source: Zhang & Sennrich, *Root Mean Square Layer Normalization*, 2019,
https://arxiv.org/abs/1910.07467, equation 4.

Args:"""
    + _ROWS
    % (
        "added to the mean square. Default: the machine epsilon, as in PyTorch's function.",
        "``weight`` (at first 1)",
    )
    + "\n    device, dtype: of the parameter.\n"
    + _ROW_TENSORS.replace("contiguous", "contiguous or, as that, channels_last")
    + _MISFIT.lstrip("\n")
)


def documented(shape: str, details: str = BATCH) -> Callable[[Layer], Layer]:
    """Complete the docstring of a layer for inputs of this shape.

    The class has the summary and the example; what layers of its kind share goes between them.
    """

    def complete(layer: Layer) -> Layer:
        if layer.__doc__ is None:  # python -OO
            return layer
        summary, example = inspect.cleandoc(layer.__doc__).split("\n\n", 1)
        defaults = {n: p.default for n, p in inspect.signature(layer).parameters.items()}
        state = "parameters" + " and running statistics" * ("track_running_stats" in defaults)
        values = {"shape": shape, "state": state, "State": state.capitalize()}
        values |= {"affine": defaults.get("affine"), "tracks": defaults.get("track_running_stats")}
        text = details
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", str(value))
        if "num_features" not in defaults:  # lazy
            text = text.replace("    num_features: C, the number of channels.\n", "")
        layer.__doc__ = f"{summary}\n{text}\n{example}\n"
        return layer

    return complete
