"""Batches of several ranks and what a layer makes of them, for the tests of SyncBatchNorm."""

from contextlib import contextmanager

import torch

import tolerances
from cases import LAYOUTS
from support import assert_within

CHANNELS = 5
SPREAD = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64)  # the std of each channel


def precision_of(dtype, mean_over_std=1.0):
    """The error of what a layer computes, on its scale, however far from zero the channels are.

    float32: some ten roundings. float64: four times those of a normalized value, for gradients are
    made of several and steps of training add up.
    """
    if dtype is torch.float64:
        return 4 * tolerances.normalized(dtype, mean_over_std)
    return 3e-6


def with_parameters(layer, seed=1):
    """Weights and biases that every rank has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(CHANNELS, generator=generator, dtype=torch.float64))
    return layer


def make_batches(split, size, mean_over_std, step, dtype=torch.float64, layout="contiguous"):
    """The batch and the gradient of each rank, the same wherever this is called."""
    generator = torch.Generator().manual_seed(step)
    for n in split:
        x, dy = torch.randn(2, n, CHANNELS, *size, generator=generator, dtype=torch.float64)
        x = (x + mean_over_std) * SPREAD.reshape(-1, *[1] * len(size))
        yield LAYOUTS[layout](x.to(dtype)), LAYOUTS[layout](dy.to(dtype))


def assert_close(name, actual, expected, precision, scale=None, roundings=1):
    """On the scale of the whole, and to the rounding of the dtype of the result."""
    if scale is None:
        scale = expected.abs().max().clamp(min=1).item() if expected.numel() else 1
    rounding = roundings * tolerances.half_ulp(expected, actual.dtype)
    assert_within(name, actual, expected, precision * scale + rounding)


@contextmanager
def naming(*case):
    """Puts the case in front of what is wrong with it."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from None
