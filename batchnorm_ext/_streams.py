"""Statistics of streams: of batches that come one after the other, or lie on several ranks."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm_ext import _library  # noqa: F401  (loads the operators)

_TINY = torch.finfo(torch.float64).tiny


class Moments(NamedTuple):
    """Per feature, in float64: number of values, mean, and sum of squared deviations from it."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def none(cls, features: int, device: torch.device) -> "Moments":
        return cls(*torch.zeros(3, features, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """Those of the channels of ``(N, C, *)``."""
        moments = cls.none(x.size(1), x.device)
        if x.numel() == 0:
            return moments
        count = moments.count + x.numel() // x.size(1)
        if x.numel() == x.size(1):  # one value has no variance
            return cls(count, x.double().flatten(), moments.m2)
        none = (None,) * 4
        # What the operator keeps for its backward: the mean and 1 / std.
        mean, invstd = torch.ops.batchnorm_ext.batch_norm(x, *none, True, _TINY)[1]
        variance = (invstd.square().reciprocal() - _TINY).clamp(min=0)
        return cls(count, mean, variance * count)

    @classmethod
    def of_known(cls, values: Tensor) -> "Moments":
        """Those of ``(samples, features)`` in float64, NaN left out."""
        moments = cls.of(values)
        if not moments.mean.isnan().any():
            return moments
        count = (~values.isnan()).sum(0).double()
        mean = values.nansum(0) / count.clamp(min=1)
        return cls(count, mean, (values - mean).square().nansum(0))

    def merged(self, other: "Moments") -> "Moments":
        """Those of both sets (Chan, Golub & LeVeque 1979, equation 2.1)."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        step = other.mean - self.mean
        return Moments(
            count,
            torch.where(other.count > 0, self.mean + step * share, self.mean),
            self.m2 + other.m2 + torch.where(count > 0, step.square() * self.count * share, 0),
        )

    def over_ranks(self, group: "dist.ProcessGroup | None") -> "Moments":
        """Those of all ranks of the group, the same on each; one message."""
        if group is None or group.size() == 1:
            return self
        local = torch.stack(self)
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local, group=group)
        total = Moments(*parts[0])
        for part in parts[1:]:
            total = total.merged(Moments(*part))
        return total

    @property
    def variance(self) -> Tensor:
        return self.m2 / self.count

    @property
    def scale(self) -> Tensor:
        """The standard deviation, or 1 for a feature that is constant up to rounding.

        The bound is the rounding of a variance from n values (Chan, Golub & LeVeque, *Algorithms
        for computing the sample variance*, 1983, table 1), as in scikit-learn.
        """
        n, variance, eps = self.count, self.variance, torch.finfo(torch.float64).eps
        constant = variance <= n * eps * variance + (n * self.mean * eps).square()
        return torch.where(constant, 1.0, variance.sqrt())


class Extremes(NamedTuple):
    """Per feature: number of values, least and largest. Of no value they are inf and -inf."""

    count: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of_known(cls, values: Tensor) -> "Extremes":
        """Those of ``(samples, features)``, NaN left out."""
        known = ~values.isnan()
        # amin of no samples is an error
        nothing = values.new_full((1, values.size(1)), torch.inf)
        low = torch.cat([values.where(known, torch.inf), nothing]).amin(0)
        high = torch.cat([values.where(known, -torch.inf), -nothing]).amax(0)
        return cls(known.sum(0), low, high)

    def merged(self, other: "Extremes") -> "Extremes":
        """Those of both sets. NaN stands for the extremes of no value as well."""
        low, high = torch.fmin(self.low, other.low), torch.fmax(self.high, other.high)
        return Extremes(self.count + other.count, low, high)

    def over_ranks(self, group: "dist.ProcessGroup | None") -> "Extremes":
        """Those of all ranks of the group, the same on each."""
        if group is None or group.size() == 1:
            return self
        count, low, high = (values.clone() for values in self)
        dist.all_reduce(count, dist.ReduceOp.SUM, group)
        dist.all_reduce(low, dist.ReduceOp.MIN, group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group)
        return Extremes(count, low, high)
