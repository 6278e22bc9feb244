"""A call on values of any magnitude, and all that it gives against the oracle.

The oracle is that of the other tests on a problem scaled by a power of two, which is the same
problem: ``y``, ``dweight`` and ``dbias`` do not change, the statistics and ``dx`` scale along.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import tolerances
from batchnorm_ext import reference
from batchnorm_ext.reference import along_channels, reduced_dims
from cases import LAYOUTS
from support import assert_within, batch_norm, batch_norm_backward

LEAST = 2.0**-1074  # of float64, in which bounds, too, vanish


def normal(n: int) -> Tensor:
    return torch.randn(n, dtype=torch.float64)


def uniform(n: int) -> Tensor:
    return torch.rand(n, dtype=torch.float64) * 2 - 1


def alternating(n: int) -> Tensor:
    return 1 - 2.0 * (torch.arange(n, dtype=torch.float64) % 2)


def lay_out(channels: list[Tensor], place, dtype, device) -> Tensor:
    """The values of each channel as one tensor of that size and layout."""
    size, layout = place
    rows = torch.stack(channels)
    values = rows.view(len(channels), size[0], *size[2:]).transpose(0, 1)
    largest = torch.finfo(dtype).max
    return LAYOUTS[layout](values.clamp(-largest, largest).to(dtype).to(device))


def elements(place) -> int:
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


def check(call: Call) -> None:
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


def parameters(channels: int, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(dtype, torch.float32)
    weight = torch.rand(channels, dtype=dtype, device=device) + 0.5
    return weight, torch.randn(channels, dtype=dtype, device=device)
