"""Problems made from cases, and the checks against the oracle that several tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tolerances
from batchnorm_ext import reference
from batchnorm_ext.reference import along_channels, reduced_dims
from cases import AFFINE, LAYOUTS, Case

ops = torch.ops.batchnorm_ext
batch_norm_backward = ops.batch_norm_backward


def forward_call(
    x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
) -> tuple:
    """The operator that serves these arguments, and its own."""
    affine = x, weight, bias
    if training and running_mean is not None:
        state = running_mean, running_var, num_batches_tracked
        return ops.batch_norm_update, (*affine, *state, momentum, eps)
    return ops.batch_norm, (*affine, running_mean, running_var, training, eps)


def apply_call(
    sums, x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps
) -> tuple:
    """The same for statistics from sums."""
    if running_mean is None:
        return ops.apply, (x, weight, bias, sums, eps)
    state = running_mean, running_var, num_batches_tracked
    return ops.apply_update, (x, weight, bias, *state, sums, momentum, eps)


def batch_norm(*arguments) -> tuple[Tensor, Tensor]:
    op, its_own = forward_call(*arguments)
    return op(*its_own)


def assert_within(name: str, actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Assert that ``actual`` is within ``bound`` of ``expected``; inf and NaN must agree."""
    assert actual.shape == expected.shape, f"{name}: size {actual.shape}, expected {expected.shape}"
    actual, expected = actual.detach().double(), expected.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).abs())
    excess = torch.where(same, 0.0, error / torch.as_tensor(bound, dtype=torch.float64))
    if not (excess <= 1).all():
        worst = excess.nan_to_num(nan=torch.inf).flatten().argmax().item()
        raise AssertionError(
            f"{name}: error {error.flatten()[worst]:.3g} is {excess.flatten()[worst]:.3g} times "
            f"what is allowed, got {actual.flatten()[worst].item()} for "
            f"{expected.flatten()[worst].item()}, {(~(excess <= 1)).sum()} of {excess.numel()} "
            "elements are off"
        )


def assert_bitwise(name: str, actual: Tensor, expected: Tensor) -> None:
    """Assert that two tensors are equal bit by bit but for the payload of NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{name}: {(~same).sum()} of {same.numel()} elements differ"


@dataclass
class Problem:
    """The arguments of one call: tensors on the device under test."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float

    def clone(self) -> Problem:
        """The same call with running statistics and a counter of its own."""
        names = ["running_mean", "running_var", "num_batches_tracked"]
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{k: None if v is None else v.clone() for k, v in tensors.items()})

    def arguments(self, training: bool) -> tuple:
        """The arguments of the operator and of the oracle."""
        tracked = (self.running_mean, self.running_var, self.num_batches_tracked)
        return self.x, self.weight, self.bias, *tracked, training, self.momentum, self.eps

    def forward(self, training: bool) -> tuple[Tensor, Tensor]:
        return batch_norm(*self.arguments(training))

    def oracle(self, training: bool) -> reference.Forward:
        return reference.batch_norm(*self.arguments(training))

    @property
    def state(self) -> dict[str, Tensor]:
        """Copies of the running statistics and the counter."""
        names = ["running_mean", "running_var", "num_batches_tracked"]
        return {n: getattr(self, n).clone() for n in names if getattr(self, n) is not None}

    @property
    def bias_dtype(self) -> torch.dtype | None:
        return None if self.bias is None else self.bias.dtype

    def mean_over_std(self, stats: Tensor) -> float:
        """The largest distance of a channel from zero, in standard deviations."""
        ratio = (stats[0] * stats[1]).abs().nan_to_num(0.0)
        return ratio.max().item() if ratio.numel() else 0.0


def make_problem(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Problem:
    """Random arguments for a case: every channel has its own mean, scale, weight and bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    channels = case.size[1]
    per_channel = [1, channels, *[1] * (len(case.size) - 2)]
    spread, centre = (
        (normal(channels).abs() + 0.5).view(per_channel),
        normal(channels).view(per_channel),
    )
    param_dtype = case.param_dtype or case.dtype

    def lay_out(values: Tensor) -> Tensor:
        return LAYOUTS[case.layout](values.to(case.dtype).to(device))

    def parameter(values: Tensor) -> Tensor:
        return values.to(param_dtype).to(device)

    has_weight, has_bias = AFFINE[case.affine]
    tracked = [normal(channels), normal(channels).abs() + 0.5]
    return Problem(
        x=lay_out(normal(*case.size) * spread + centre),
        dy=lay_out(normal(*case.size)),
        weight=parameter(normal(channels) + 0.5) if has_weight else None,
        bias=parameter(normal(channels)) if has_bias else None,
        running_mean=parameter(tracked[0]) if case.track else None,
        running_var=parameter(tracked[1]) if case.track else None,
        num_batches_tracked=torch.tensor(3, device=device) if case.track else None,
        momentum=case.momentum,
        eps=case.eps,
    )


def check_forward(problem: Problem, training: bool) -> tuple[Tensor, Tensor]:
    """Run the forward and assert output, statistics and running statistics against the oracle."""
    x, before = problem.x, problem.state
    expected = problem.oracle(training)
    y, stats = problem.forward(training)

    assert y.dtype == x.dtype and y.device == x.device
    assert y.stride() == torch.empty_like(x).stride(), "memory format of y"
    assert stats.dtype == torch.float64 and stats.shape == (2, x.shape[1])
    ratio = problem.mean_over_std(expected.stats)
    relative = tolerances.normalized(x.dtype, ratio)
    mean, invstd = expected.stats
    assert_within("mean", stats[0], mean, relative / invstd)
    assert_within("invstd", stats[1], invstd, relative * invstd)
    if x.numel() > 0:
        assert_within("y", y, expected.y, tolerances.output(expected.y, x.dtype, ratio))
    else:
        assert y.shape == x.shape

    updated = training and x.numel() > 0
    for name, value in problem.state.items():
        wanted = getattr(expected, name)
        if not updated or name == "num_batches_tracked":
            assert_bitwise(name, value, wanted.to(value.dtype))
            continue
        factor = problem.momentum
        if factor is None:
            factor = 1 / expected.num_batches_tracked.item()
        scale = 1 / invstd if name == "running_mean" else invstd**-2
        wanted = torch.where(wanted.to(value.dtype).isinf(), torch.inf, wanted)
        # the part of the batch has the error of its statistics (twice that for the square), and the
        # result is rounded once
        bound = 2 * factor * relative * scale + tolerances.half_ulp(wanted, value.dtype)
        # the products and the sum are rounded to float64, here and in the oracle
        terms = before[name].double().abs() + factor * scale + wanted.abs()
        assert_within(name, value, wanted, bound + 4 * torch.finfo(torch.float64).eps * terms)
    return y, stats


def check_gradients(
    problem: Problem,
    training: bool,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Assert gradients, those that are given, against the oracle on its own statistics."""
    x, dy = problem.x, problem.dy
    stats = problem.oracle(training).stats
    expected = reference.batch_norm_backward(dy, x, problem.weight, stats, training)
    bounds = gradient_magnitudes(problem, training, stats, expected)
    for name, actual, wanted in zip(expected._fields, (dx, dweight, dbias), expected, strict=True):
        if actual is None:
            continue
        bound = tolerances.gradient(
            wanted, bounds[name], x.dtype, problem.mean_over_std(stats), actual.dtype
        )
        assert_within(name, actual, wanted, bound)


def gradient_magnitudes(
    problem: Problem, training: bool, stats: Tensor, gradients: reference.Backward
) -> dict[str, Tensor]:
    """The sums of the magnitudes of the terms that each gradient adds up."""
    x, dy = problem.x, problem.dy.double().abs()
    count = x.numel() // max(x.shape[1], 1)
    mean, invstd = (along_channels(s, x) for s in stats)
    xhat = ((x.double() - mean) * invstd).abs()
    terms = dy
    if training and count > 0:
        dweight, dbias = (along_channels(s.abs() / count, x) for s in gradients[1:])
        terms = dy + dbias + xhat * dweight
    scale = invstd.abs()
    if problem.weight is not None:
        scale = scale * along_channels(problem.weight.double().abs(), x)
    # for dx the largest one of each channel, since the averages in it are over the channel
    largest = terms * scale
    if count > 0:
        largest = largest.amax(reduced_dims(x), keepdim=True)
    return {
        "dx": largest,
        "dweight": (dy * (xhat + 1)).sum(reduced_dims(x)),
        "dbias": dy.sum(reduced_dims(x)),
    }


def check_backward(problem: Problem, training: bool, stats: Tensor) -> None:
    """Run the backward and assert all gradients against the oracle."""
    x = problem.x
    dx, dweight, dbias = batch_norm_backward(
        problem.dy, x, problem.weight, stats, training, [True] * 3, problem.bias_dtype
    )
    assert dx.dtype == x.dtype
    assert dx.stride() == torch.empty_like(x).stride(), "memory format of dx"
    if problem.weight is not None:
        assert dweight.dtype == problem.weight.dtype
    if problem.bias is not None:
        assert dbias.dtype == problem.bias.dtype
    check_gradients(problem, training, dx, dweight, dbias)
