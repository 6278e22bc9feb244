"""Values up to the ends of their dtype's range: as right as any others, and finite where they are.

The oracle is that of the other tests on a problem scaled by a power of two, which is the same
problem: ``y``, ``dweight`` and ``dbias`` do not change, the statistics and ``dx`` scale along.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tolerances
from batchnorm_ext import reference
from batchnorm_ext.reference import along_channels, reduced_dims
from cases import LAYOUTS
from support import assert_bitwise, assert_within, batch_norm, batch_norm_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LEAST = 2.0**-1074  # of float64, in which bounds, too, vanish
# Of few elements, of several chunks in rows and in columns, of folded rows and of odd runs.
SIZES = [(3,), (20000,), (2, 3, 3), (5, 70, 90), (40, 13, 9)]
PLACES = [
    ((*size[:1], 0, *size[1:]), layout)
    for size in SIZES
    for layout in (["contiguous", "channels_last"] if len(size) > 1 else ["contiguous"])
]
at_all_places = pytest.mark.parametrize("place", PLACES, ids=str)


def _normal(n: int) -> Tensor:
    return torch.randn(n, dtype=torch.float64)


def _uniform(n: int) -> Tensor:
    return torch.rand(n, dtype=torch.float64) * 2 - 1


def _alternating(n: int) -> Tensor:
    return 1 - 2.0 * (torch.arange(n, dtype=torch.float64) % 2)


def _with_first(values: Tensor, first: float) -> Tensor:
    values[0] = first
    return values


# n values of a channel; `largest` is that of the dtype.
CHANNELS: dict[str, Callable[[int, float], Tensor]] = {
    "ordinary": lambda n, largest: _normal(n),
    "squares overflow": lambda n, largest: _normal(n) * 4 * largest**0.5,
    "far beyond": lambda n, largest: _normal(n) * largest**0.8,
    "sums overflow": lambda n, largest: _normal(n).clamp(-4, 4) * (largest / 16),
    "all there is": lambda n, largest: _uniform(n) * largest,
    "largest, both signs": lambda n, largest: _alternating(n) * largest,
    "large mean": lambda n, largest: (0.9 + 0.02 * _uniform(n)) * -largest,
    "one outlier": lambda n, largest: _with_first((0.9 + 0.02 * _uniform(n)) * largest, -largest),
    "one is not 0": lambda n, largest: _with_first(torch.zeros(n, dtype=torch.float64), largest),
    "constant": lambda n, largest: torch.full((n,), largest, dtype=torch.float64),
    "large and tiny": lambda n, largest: (
        torch.where(_alternating(n) > 0, _uniform(n), 1e-40) * largest
    ),
    "smallest normal": lambda n, largest: _normal(n) / largest,
    "subnormal": lambda n, largest: _normal(n) / largest / 16,
}


def _lay_out(channels: list[Tensor], place, dtype, device) -> Tensor:
    """The values of each channel as one tensor of that size and layout."""
    size, layout = place
    rows = torch.stack(channels)
    values = rows.view(len(channels), size[0], *size[2:]).transpose(0, 1)
    largest = torch.finfo(dtype).max
    return LAYOUTS[layout](values.clamp(-largest, largest).to(dtype).to(device))


def _elements(place) -> int:
    size, _ = place
    return math.prod(size[:1] + size[2:])


@dataclass
class Call:
    """The arguments of a call; ``statistics`` are the running ones of an evaluation."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    statistics: tuple[Tensor, Tensor] | None = None
    eps: float = 1e-5

    @property
    def training(self) -> bool:
        return self.statistics is None

    @property
    def count(self) -> int:
        return self.x.numel() // self.x.shape[1]

    def oracle(self) -> dict[str, Tensor]:
        x = self.x.double()
        scale = torch.full((x.shape[1],), 2.0**-32, dtype=torch.float64, device=x.device)
        if self.training:  # not next to an eps that would vanish
            deviations = x / 2 - along_channels(x.transpose(0, 1).flatten(1)[:, 0] / 2, x)
            scale = torch.where(_largest(deviations) > 1e100, 2.0**-600, scale)
        scaled, eps = x * along_channels(scale, x), self.eps * scale**2
        mean, var = (s.double() for s in self.statistics) if self.statistics else (scale, scale)
        y, stats, *_ = reference.batch_norm(
            *(scaled, self.weight, self.bias, mean * scale, var * scale**2, None),
            *(self.training, 0.0, eps),
        )
        dx, dweight, dbias = reference.batch_norm_backward(
            self.dy, scaled, self.weight, stats, self.training
        )
        deviations = scaled - along_channels(stats[0], x)
        var = deviations.square().sum(reduced_dims(x)) / max(self.count - 1, 1)
        return {
            "y": y,
            "mean": stats[0] / scale,
            "invstd": stats[1] * scale,
            "var": var / scale / scale,
            "xhat": deviations * along_channels(stats[1], x),
            "dx": dx * along_channels(scale, x),
            "dweight": dweight,
            "dbias": dbias,
        }


def _largest(values: Tensor) -> Tensor:
    """Of each channel."""
    return values.double().abs().amax(reduced_dims(values))


def _check(call: Call) -> None:
    """Assert all that forward and backward give, each channel on its own scale."""
    x, dtype, device = call.x, call.x.dtype, call.x.device
    expected = call.oracle()
    mean, invstd, xhat = (expected[name] for name in ("mean", "invstd", "xhat"))
    ratio = (mean / 2 * invstd * 2).abs()
    bounds = [tolerances.normalized(dtype, r) for r in ratio.tolist()]
    relative = torch.tensor(bounds, dtype=torch.float64, device=device)
    reach = call.count**0.5 / invstd if call.training else torch.full_like(mean, torch.inf)
    weight, n = call.weight.double().abs(), call.count

    def lost(factor: Tensor) -> Tensor:
        return tolerances.large_values(dtype, _largest(x), mean, reach, factor)

    running = call.statistics or (torch.zeros_like(call.weight), torch.ones_like(call.weight))
    batches = torch.tensor(0, device=device)
    y, stats = batch_norm(
        x, call.weight, call.bias, *running, batches, call.training, 1.0, call.eps
    )
    assert_within("mean", stats[0], mean, relative / invstd + LEAST)
    assert_within("invstd", stats[1], invstd, relative * invstd + LEAST)
    scale = torch.maximum(_largest(expected["y"]), weight).clamp(min=1)
    bound = relative * scale + lost(weight * invstd)
    _assert_rounded("y", y, expected["y"], along_channels(bound, x))
    if call.training:
        _assert_rounded("running_mean", running[0], mean, relative / invstd)
        _assert_rounded("running_var", running[1], expected["var"], 2 * relative / invstd**2)

    dx, dweight, dbias = batch_norm_backward(
        call.dy, x, call.weight, stats, call.training, [True] * 3
    )
    dy = call.dy.double().abs()
    dweight_terms, dbias_terms = (t.sum(reduced_dims(x)) for t in (dy * (xhat.abs() + 1), dy))
    _assert_rounded("dweight", dweight, expected["dweight"], relative * dweight_terms)
    _assert_rounded("dbias", dbias, expected["dbias"], relative * dbias_terms)
    factor, bracket, bound = weight * invstd, _largest(dy), relative * _largest(dy)
    if call.training:
        slope = expected["dweight"].abs() / n
        bracket = bracket + expected["dbias"].abs() / n + _largest(xhat) * slope
        bound = relative * bracket + lost(invstd * slope)
    info = torch.finfo(torch.promote_types(dtype, torch.float32))
    bound = factor * bound + info.tiny * info.eps * bracket / 2
    _assert_rounded("dx", dx, expected["dx"], along_channels(bound, x))


def _assert_rounded(name: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """The same as ``assert_within``, of what is rounded once more to the dtype of the result."""
    rounded = expected.to(actual.dtype).double()
    wanted = torch.where(rounded.isinf(), rounded, expected)
    bound = bound + tolerances.half_ulp(expected, actual.dtype) + LEAST
    if actual.dtype is torch.bfloat16:  # whose subnormal numbers an instruction takes for zero
        least = torch.finfo(torch.bfloat16).smallest_normal
        bound = torch.where(expected.abs() < least, bound.clamp(min=least), bound)
    assert_within(name, actual, wanted, bound)


def _parameters(channels: int, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(dtype, torch.float32)
    weight = torch.rand(channels, dtype=dtype, device=device) + 0.5
    return weight, torch.randn(channels, dtype=dtype, device=device)


def _call(place, dtype, device, gradient: Callable[[int, float], Tensor] | None = None) -> Call:
    """One channel of each kind."""
    n, largest = _elements(place), torch.finfo(dtype).max
    gradient = gradient or (lambda n, _: _normal(n))
    x = _lay_out([values(n, largest) for values in CHANNELS.values()], place, dtype, device)
    dy = _lay_out([gradient(n, largest) for _ in CHANNELS], place, dtype, device)
    return Call(x, dy, *_parameters(len(CHANNELS), dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@at_all_places
def test_training(place, dtype, device):
    _check(_call(place, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.8, -1.0])
@at_all_places
def test_evaluation_with_a_mean_that_x_minus_overflows(place, mean, dtype, device):
    call, largest = _call(place, dtype, device), torch.finfo(dtype).max
    means = torch.full_like(call.weight, mean * largest)
    call.statistics = means, torch.full_like(means, largest**0.1)
    call.weight = call.weight / largest**0.2
    _check(call)


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
    _check(_call(place, dtype, device, lambda n, m: _normal(n).clamp(-4, 4) / 16 * m**power))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@at_all_places
def test_products_that_vanish_next_to_a_tiny_eps(place, dtype, device):
    """Squares of 1e-30, and its products with such a gradient, are 0 in float32."""
    n = _elements(place)
    kinds = [_normal(n), _alternating(n)]
    x = _lay_out([1e-30 * values for values in kinds], place, dtype, device)
    dy = _lay_out([1e-25 * _normal(n) for _ in kinds], place, dtype, device)
    _check(Call(x, dy, *_parameters(len(kinds), dtype, device), eps=1e-70))


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
    n = _elements(place)
    kinds = [[torch.inf], [-torch.inf], [torch.inf, -torch.inf], [torch.nan], [1.0]]
    channels = [_normal(n) for _ in kinds]
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
            st.tuples(st.sampled_from([_normal, _uniform, _alternating]), exponent, exponent),
            min_size=1,
            max_size=9,
        )
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    n = _elements(place)
    x = [kind(n) * 10**spread + 10**centre for kind, spread, centre in kinds]
    size = draw(st.floats(-10, most / 2))
    dy = [_normal(n) * 10**size for _ in kinds]
    weight, bias = _parameters(len(kinds), dtype, "cpu")
    return place, dtype, x, dy, weight * 10 ** draw(st.floats(-5, 5)), bias


@settings(deadline=None, max_examples=150, print_blob=True)
@given(drawn=calls())
def test_any_magnitude(drawn, device):
    place, dtype, x, dy, weight, bias = drawn
    x, dy = (_lay_out(channels, place, dtype, device) for channels in (x, dy))
    _check(Call(x, dy, weight.to(device), bias.to(device)))
