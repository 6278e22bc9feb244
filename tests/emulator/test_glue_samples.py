"""Statistics of samples in the CUDA side of the operators: instance and group normalization."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import tolerances
from batchnorm_ext import reference
from emulator.glue_cases import AFFINE, EPS, every_dtype, needs_glue, ops
from support import assert_bitwise, assert_within

PLANS = ["", "policy=grid,ranks=2", "policy=split,ranks=3,width=16"]

pytestmark = needs_glue

# (N, C, *), and groups: as many as channels are instances
SAMPLES = {
    "instances": ((3, 12, 5, 3), 12),
    "instances of two dimensions": ((5, 12, 7), 12),
    "instances of three dimensions": ((2, 12, 3, 5, 8), 12),
    "long instances": ((2, 3, 40, 41), 3),
    "one sample of instances": ((1, 12, 9, 9), 12),
    "groups of three channels": ((3, 12, 5, 3), 4),
    "groups of ten channels": ((2, 40, 7, 7), 4),
    "one group": ((2, 40, 6, 9), 1),
    "one group of one sample": ((1, 70, 8), 1),
    "long groups": ((2, 6, 24, 25), 2),
    "groups of rows": ((37, 24), 3),
}
LAYOUTS = {
    "contiguous": Tensor.contiguous,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "samples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.size(1)],
}
every_sample = pytest.mark.parametrize("name", SAMPLES)


def oracle(x: Tensor, dy: Tensor, weight, bias, groups: int, eps=EPS) -> tuple[Tensor, ...]:
    """y, stats, and the gradients dx, dweight, dbias, each in float64."""
    x, dy = x.double(), dy.double()
    rows = (1, x.size(0) * groups, -1)
    each = [1, -1, *[1] * (x.dim() - 2)]
    dims = reference.reduced_dims(x)
    normalized = reference.batch_norm(x.reshape(rows), training=True, eps=eps)
    xhat = normalized.y.reshape(x.shape)
    w = 1 if weight is None else weight.double().reshape(each)
    y = xhat * w + (0 if bias is None else bias.double().reshape(each))
    scaled = (dy * w).reshape(rows)
    stats = normalized.stats
    dx = reference.batch_norm_backward(scaled, x.reshape(rows), None, stats, True).dx
    return y, stats, dx.reshape(x.shape), (dy * xhat).sum(dims), dy.sum(dims)


def problem(name: str, layout: str, affine: str, dtype: torch.dtype) -> tuple:
    """x, dy, weight, bias and groups: each channel of each sample has its own mean and scale."""
    size, groups = SAMPLES[name]
    cell = (*size[:2], *[1] * (len(size) - 2))
    x = torch.randn(size) * (torch.rand(cell) + 0.5) + torch.randn(cell)
    x, dy = (LAYOUTS[layout](v).to(dtype) for v in (x, torch.randn(size)))
    return x, dy, *AFFINE[affine](size[1], dtype), groups


def assert_gradients(actual, x, dy, weight, bias, groups, eps=EPS) -> None:
    """Those that are there, within the bounds of batch normalization, relative to the largest."""
    expected = oracle(x, dy, weight, bias, groups, eps)[2:]
    dims = reference.reduced_dims(x)
    terms = (None, 3 * dy.double().abs().sum(dims), dy.double().abs().sum(dims))
    for name, value, exact, sums in zip(
        ("dx", "dweight", "dbias"), actual, expected, terms, strict=True
    ):
        if value is None:
            continue
        magnitudes = 4 * exact.abs().max() if sums is None else sums
        assert_within(
            name, value, exact, tolerances.gradient(exact, magnitudes, x.dtype, 4, value.dtype)
        )


@pytest.mark.parametrize("plan", PLANS, indirect=True)
@every_sample
@pytest.mark.parametrize("layout", LAYOUTS)
@every_dtype
def test_statistics_of_samples(name, layout, dtype, plan):
    affine = random.Random(f"{name} {layout} {dtype} {plan}").choice(list(AFFINE))
    x, dy, weight, bias, groups = problem(name, layout, affine, dtype)
    y, stats = ops.batch_norm(x, weight, bias, None, None, True, EPS, groups)
    exact, exact_stats, *_ = oracle(x, dy, weight, bias, groups)
    assert y.dtype == dtype
    assert_within("y", y, exact, tolerances.output(exact, dtype, 4))
    relative = tolerances.normalized(dtype, 4)
    assert_within("mean", stats[0], exact_stats[0], relative / exact_stats[1])
    assert_within("invstd", stats[1], exact_stats[1], relative * exact_stats[1])

    dtypes = None if bias is None else bias.dtype
    arguments = (dy, x, weight, stats, True, [True] * 3, dtypes, groups)
    gradients = ops.batch_norm_backward(*arguments)
    if layout in ("contiguous", "channels last"):
        assert y.stride() == gradients[0].stride() == x.stride()
    assert_gradients(gradients, x, dy, weight, bias, groups)


@every_sample
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("mask", range(8))
def test_only_gradients_that_are_wanted(name, layout, mask):
    x, dy, weight, bias, groups = problem(name, layout, "float32 parameters", torch.float32)
    _, stats = ops.batch_norm(x, weight, bias, None, None, True, EPS, groups)
    wanted = [bool(mask >> i & 1) for i in range(3)]
    gradients = ops.batch_norm_backward(dy, x, weight, stats, True, wanted, None, groups)
    assert [g is not None for g in gradients] == wanted
    assert_gradients(gradients, x, dy, weight, bias, groups)


@pytest.mark.parametrize("name", [name for name in SAMPLES if "instances" in name])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("momentum", [0.1, None])
@every_dtype
def test_running_statistics_move_to_the_average_of_the_samples(name, layout, dtype, momentum):
    x, dy, weight, bias, groups = problem(name, layout, "float32 parameters", dtype)
    running = torch.randn(groups).to(dtype), torch.rand(2 * groups)[::2] + 0.5
    before = [value.double().clone() for value in running]
    batches = torch.tensor(3)
    y, _ = ops.batch_norm_update(x, weight, bias, *running, batches, momentum, EPS, groups)
    factor = 0.25 if momentum is None else momentum
    assert batches == 4
    exact, stats, *_ = oracle(x, dy, weight, bias, groups)
    assert_within("y", y, exact, tolerances.output(exact, dtype, 4))
    n = x.numel() // (x.size(0) * groups)
    averages = [
        value.reshape(-1, groups).mean(0)
        for value in (stats[0], (stats[1] ** -2 - EPS) * (n / (n - 1)))
    ]
    for what, value, old, to in zip(("mean", "var"), running, before, averages, strict=True):
        wanted = (1 - factor) * old + factor * to
        bound = tolerances.normalized(dtype, 4) * 4 + tolerances.half_ulp(wanted, value.dtype)
        assert_within(f"running_{what}", value, wanted, bound)


def test_samples_add_up_in_float64():
    """The parts of the samples in a gradient of a parameter are added up in float64."""
    x, dy = torch.randn(2, 2, 3, 3), torch.ones(2, 2, 3, 3)
    dy[0] *= 2.0**30
    dy[1] *= -(2.0**30)
    dy[1, :, 0, 0] += 128.0
    _, stats = ops.batch_norm(x, None, None, None, None, True, EPS, 2)
    _, _, dbias = ops.batch_norm_backward(dy, x, None, stats, True, [True] * 3, None, 2)
    assert_bitwise("dbias", dbias, torch.full((2,), 128.0))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_squares_that_overflow_float64(layout, groups):
    """Squares of these overflow in float64, and so do products with the gradients."""
    x, dy = (LAYOUTS[layout](torch.randn(2, 4, 5, 3, dtype=torch.float64)) for _ in range(2))
    y, stats = ops.batch_norm(x * 1e200, None, None, None, None, True, EPS, groups)
    exact = oracle(x, dy, None, None, groups, eps=0.0)
    assert_within("y", y, exact[0], tolerances.output(exact[0], torch.float64, 4))
    arguments = (dy * 1e200, x * 1e200, None, stats, True, [True] * 3, None, groups)
    dx, *sums = ops.batch_norm_backward(*arguments)
    assert_gradients((dx, *(v / 1e200 for v in sums)), x, dy, None, None, groups, 0.0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_constant_has_no_variance(layout, groups):
    for value in (1000.1, -3e30, 1e-20):
        x = LAYOUTS[layout](torch.full((2, 4, 5, 3), value))
        y, stats = ops.batch_norm(x, None, None, None, None, True, EPS, groups)
        assert_bitwise("y", y, torch.zeros_like(x))
        assert_within("invstd", stats[1], torch.full_like(stats[1], EPS**-0.5), 1e-12)
