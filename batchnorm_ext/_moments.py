"""Moments of streams of data: of batches that come one after the other, or lie on several ranks."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm_ext import _ops  # noqa: F401  (loads the operators)

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
