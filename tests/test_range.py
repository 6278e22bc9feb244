"""Values up to the ends of their range: as right as any others, and finite where they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchnorm_ext.reference import along_channels
from cases import LAYOUTS
from scaled_problem import Call, alternating, check, elements, lay_out, normal, parameters, uniform
from support import assert_bitwise, batch_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# Of few elements, of several chunks in rows and in columns, of folded rows and of odd runs.
SIZES = [(3,), (20000,), (2, 3, 3), (5, 70, 90), (40, 13, 9)]
PLACES = [
    ((*size[:1], 0, *size[1:]), layout)
    for size in SIZES
    for layout in (["contiguous", "channels_last"] if len(size) > 1 else ["contiguous"])
]
at_all_places = pytest.mark.parametrize("place", PLACES, ids=str)


def _with_first(values: Tensor, first: float) -> Tensor:
    values[0] = first
    return values


# n values of a channel; `largest` is that of the dtype.
CHANNELS: dict[str, Callable[[int, float], Tensor]] = {
    "ordinary": lambda n, largest: normal(n),
    "squares overflow": lambda n, largest: normal(n) * 4 * largest**0.5,
    "far beyond": lambda n, largest: normal(n) * largest**0.8,
    "sums overflow": lambda n, largest: normal(n).clamp(-4, 4) * (largest / 16),
    "all there is": lambda n, largest: uniform(n) * largest,
    "largest, both signs": lambda n, largest: alternating(n) * largest,
    "large mean": lambda n, largest: (0.9 + 0.02 * uniform(n)) * -largest,
    "one outlier": lambda n, largest: _with_first((0.9 + 0.02 * uniform(n)) * largest, -largest),
    "one is not 0": lambda n, largest: _with_first(torch.zeros(n, dtype=torch.float64), largest),
    "constant": lambda n, largest: torch.full((n,), largest, dtype=torch.float64),
    "large and tiny": lambda n, largest: (
        torch.where(alternating(n) > 0, uniform(n), 1e-40) * largest
    ),
    "smallest normal": lambda n, largest: normal(n) / largest,
    "subnormal": lambda n, largest: normal(n) / largest / 16,
}


def _call(place, dtype, device, gradient: Callable[[int, float], Tensor] | None = None) -> Call:
    """One channel of each kind."""
    n, largest = elements(place), torch.finfo(dtype).max
    gradient = gradient or (lambda n, _: normal(n))
    x = lay_out([values(n, largest) for values in CHANNELS.values()], place, dtype, device)
    dy = lay_out([gradient(n, largest) for _ in CHANNELS], place, dtype, device)
    return Call(x, dy, *parameters(len(CHANNELS), dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@at_all_places
def test_training(place, dtype, device):
    check(_call(place, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.8, -1.0])
@at_all_places
def test_evaluation_with_a_mean_that_x_minus_overflows(place, mean, dtype, device):
    call, largest = _call(place, dtype, device), torch.finfo(dtype).max
    means = torch.full_like(call.weight, mean * largest)
    call.statistics = means, torch.full_like(means, largest**0.1)
    call.weight = call.weight / largest**0.2
    check(call)


@pytest.mark.parametrize("dtype", DTYPES)
@at_all_places
def test_evaluation_with_infinite_variance_is_the_bias(place, dtype, device):
    """As natively; ``x - mean`` may overflow, and infinity times 0 is NaN."""
    call = _call(place, dtype, device)
    mean = torch.full_like(call.weight, -torch.finfo(dtype).max)
    var = torch.full_like(mean, torch.inf)
    y, _ = batch_norm(call.x, call.weight, call.bias, mean, var, None, False, 0.1, 1e-5)
    assert_bitwise("y", y, along_channels(call.bias.to(dtype), y).expand_as(y))


@pytest.mark.parametrize("dtype", DTYPES)
@at_all_places
def test_large_gradients(place, dtype, device):
    """Sums of ``dy`` and of ``dy * (x - mean)`` overflow float32, and not float64."""
    power = 0.9 if dtype is torch.float64 else 1
    check(_call(place, dtype, device, lambda n, m: normal(n).clamp(-4, 4) / 16 * m**power))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@at_all_places
def test_products_that_vanish_next_to_a_tiny_eps(place, dtype, device):
    """Squares of 1e-30, and its products with such a gradient, are 0 in float32."""
    n = elements(place)
    kinds = [normal(n), alternating(n)]
    x = lay_out([1e-30 * values for values in kinds], place, dtype, device)
    dy = lay_out([1e-25 * normal(n) for _ in kinds], place, dtype, device)
    check(Call(x, dy, *parameters(len(kinds), dtype, device), eps=1e-70))


def test_large_values_do_not_spoil_the_running_statistics(device):
    """Sums of values whose difference overflows float32 left NaN for good."""
    x = torch.tensor([[1.8e38, 0.0], [-1.8e38, 1.0]], device=device)
    mean, var = torch.zeros(2, device=device), torch.ones(2, device=device)
    y, _ = batch_norm(x, None, None, mean, var, None, True, 0.5, 1e-5)
    assert (mean.tolist(), var.tolist()) == ([0.0, 0.25], [torch.inf, 0.75])
    assert y[:, 0].tolist() == [1, -1]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("at", [0, -1])
@at_all_places
def test_infinity_is_in_the_running_mean(place, at, dtype, device):
    """Infinite, as natively, and not NaN; the variance, a difference of infinities, is NaN."""
    n = elements(place)
    kinds = [[torch.inf], [-torch.inf], [torch.inf, -torch.inf], [torch.nan], [1.0]]
    channels = [normal(n) for _ in kinds]
    for values, kind in zip(channels, kinds, strict=True):
        values[at], values[n // 2] = kind[0], kind[-1]
    size, layout = place
    values = torch.stack(channels).view(len(kinds), size[0], *size[2:]).transpose(0, 1)
    x = LAYOUTS[layout](values.to(dtype).to(device))
    mean, var = torch.zeros(
        2, len(kinds), device=device, dtype=torch.promote_types(dtype, torch.float32)
    ).unbind()
    batch_norm(x, None, None, mean, var, None, True, 1.0, 1e-5)
    expected = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.nan], dtype=mean.dtype)
    assert_bitwise("running_mean", mean[:-1].cpu(), expected)
    assert var[:-1].isnan().all() and mean[-1].isfinite() and var[-1].isfinite()


@st.composite
def calls(draw):
    """Channels of any magnitude and any distance from 0, most of them within the range."""
    dtype = draw(st.sampled_from(DTYPES))
    most = math.log10(torch.finfo(dtype).max)
    exponent = st.floats(-most, most - 1)
    spatial = draw(st.lists(st.integers(1, 9), max_size=2))
    place = (draw(st.integers(2, 60)), 0, *spatial), draw(st.sampled_from(list(LAYOUTS)[:4]))
    kinds = draw(
        st.lists(
            st.tuples(st.sampled_from([normal, uniform, alternating]), exponent, exponent),
            min_size=1,
            max_size=9,
        )
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    n = elements(place)
    x = [kind(n) * 10**spread + 10**centre for kind, spread, centre in kinds]
    size = draw(st.floats(-10, most / 2))
    dy = [normal(n) * 10**size for _ in kinds]
    weight, bias = parameters(len(kinds), dtype, "cpu")
    return place, dtype, x, dy, weight * 10 ** draw(st.floats(-5, 5)), bias


@settings(deadline=None, max_examples=150, print_blob=True)
@given(drawn=calls())
def test_any_magnitude(drawn, device):
    place, dtype, x, dy, weight, bias = drawn
    x, dy = (lay_out(channels, place, dtype, device) for channels in (x, dy))
    check(Call(x, dy, weight.to(device), bias.to(device)))
