"""The CUDA side of the operators, tensors in and pointers out, on the host and the emulator.

It is registered for CUDA and called with tensors of the CPU, past the dispatcher's choice.
"""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

import support
import tolerances
from batchnorm_ext import _build, reference
from cases import DTYPES, EVAL_CASES, TRAINING_CASES
from emulator.harness import HERE, build
from programs import CSRC
from support import assert_bitwise, assert_within, check_backward, check_forward, make_problem

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
MOST_ELEMENTS = 20_000  # the emulator takes a second for some of these
EPS = 1e-5
PLANS = ["", "policy=grid,ranks=2", "policy=split,ranks=3,width=16"]

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


class Ops:
    """The operators of this library, as on CUDA."""

    def __getattr__(self, name: str) -> partial:
        return partial(getattr(torch.ops.batchnorm_ext, name).default.redispatch, CUDA)


ops = Ops()


@pytest.fixture(scope="module", autouse=True)
def _library(tmp_path_factory: pytest.TempPathFactory) -> None:
    if _build.CUDA is not None:
        pytest.skip("a library that has the CUDA kernels registers the operators itself")
    library = build(
        HERE / "glue.cpp",
        "plain",
        defines=["BATCHNORM_EXT_CUDA_THREADS=64"],
        include=[HERE / "stubs", CSRC],
        flags=[
            *("-shared", "-fPIC", "-fvisibility=hidden"),
            *(f"-isystem{path}" for path in include_paths()),
            *(f"-L{path}" for path in library_paths()),
            *("-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"),
        ],
        directory=tmp_path_factory.mktemp("glue"),
    )
    torch.ops.load_library(library)


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    """What is not written is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _support_calls_cuda(monkeypatch):
    monkeypatch.setattr(support, "ops", ops)
    monkeypatch.setattr(support, "batch_norm_backward", ops.batch_norm_backward)


def small(cases: list) -> list:
    return [case for case in cases if torch.Size(case.size).numel() <= MOST_ELEMENTS]


@pytest.mark.usefixtures("_support_calls_cuda")
@pytest.mark.parametrize("case", small(TRAINING_CASES), ids=str)
def test_batch_norm_in_training(case):
    problem = make_problem(case)
    _, stats = check_forward(problem, training=True)
    check_backward(problem, True, stats)


@pytest.mark.usefixtures("_support_calls_cuda")
@pytest.mark.parametrize("case", small(EVAL_CASES), ids=str)
def test_batch_norm_in_evaluation(case):
    problem = make_problem(case)
    _, stats = check_forward(problem, training=False)
    check_backward(problem, False, stats)


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
AFFINE = {
    "parameters of the input's dtype": lambda c, dtype: torch.randn(2, c).to(dtype),
    "float32 parameters": lambda c, dtype: (torch.randn(c), torch.randn(2 * c)[::2]),
    "zero weights": lambda c, dtype: (torch.randn(c) * (torch.arange(c) % 3 > 0), None),
    "only zero weights": lambda c, dtype: (torch.zeros(c), torch.randn(c)),
    "no parameters": lambda c, dtype: (None, None),
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


def assert_gradients(actual: tuple, x: Tensor, dy: Tensor, weight, bias, groups: int) -> None:
    """Those that are there, within the bounds of batch normalization, relative to the largest."""
    expected = oracle(x, dy, weight, bias, groups)[2:]
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
    """Squares of these overflow in float64."""
    x = LAYOUTS[layout](torch.randn(2, 4, 5, 3, dtype=torch.float64))
    y, _ = ops.batch_norm(x * 1e200, None, None, None, None, True, EPS, groups)
    exact = oracle(x, x, None, None, groups, eps=0.0)[0]
    assert_within("y", y, exact, tolerances.output(exact, torch.float64, 4))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_constant_has_no_variance(layout, groups):
    for value in (1000.1, -3e30, 1e-20):
        x = LAYOUTS[layout](torch.full((2, 4, 5, 3), value))
        y, stats = ops.batch_norm(x, None, None, None, None, True, EPS, groups)
        assert_bitwise("y", y, torch.zeros_like(x))
        assert_within("invstd", stats[1], torch.full_like(stats[1], EPS**-0.5), 1e-12)


CHANNELS = {  # (N, positions, channels)
    "whole packs": (3, 64, 12),
    "odd": (2, 35, 70),
    "many positions": (1, 700, 6),
    "one channel": (2, 40, 1),
    "more strips than parts of the gradients": (1030, 3, 2),
}
ORDERS = {
    "contiguous": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels last": Tensor.contiguous,
    "sliced": lambda x: torch.cat([x, x], 2)[:, :, ::2],
}


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("order", ORDERS)
@every_dtype
def test_layer_norm_of_channels(name, order, dtype):
    size = CHANNELS[name]
    draw = random.Random(f"{name} {order} {dtype}").choice
    weight, bias = AFFINE[draw(list(AFFINE))](size[2], dtype)
    x, dy = torch.randn(size) * 2 + torch.randn(*size[:2], 1) * 10, torch.randn(size)
    x, dy = (ORDERS[order](v.to(dtype)) for v in (x, dy))
    domain = (size[1], True, 2)
    if size[2] == 1:
        with pytest.raises(NotImplementedError, match="more than 1 element per statistic"):
            ops.batch_norm(x, weight, bias, None, None, True, EPS, *domain)
        return
    y, stats = ops.batch_norm(x, weight, bias, None, None, True, EPS, *domain)
    rows = (1, -1, size[2])
    normalized = reference.batch_norm(x.double().reshape(rows), training=True, eps=EPS)
    xhat, w = normalized.y.reshape(size), 1 if weight is None else weight.double()
    exact = xhat * w + (0 if bias is None else bias.double())
    assert_within("y", y, exact, tolerances.output(exact, dtype, 10))
    assert y.stride() == torch.empty_like(x).stride()
    relative = tolerances.normalized(dtype, 10)
    assert_within("mean", stats[0], normalized.stats[0], relative / normalized.stats[1])
    assert_within("invstd", stats[1], normalized.stats[1], relative * normalized.stats[1])

    scaled = (dy.double() * w).reshape(rows)
    exact = reference.batch_norm_backward(scaled, x.reshape(rows), None, normalized.stats, True)
    expected = (
        exact.dx.reshape(size),
        (dy.double() * xhat).sum((0, 1)),
        dy.double().sum((0, 1)),
    )
    terms = dy.double().abs().sum((0, 1))
    magnitudes = (4 * expected[0].abs().max() + 1e-3, 4 * terms, terms)
    mask = [draw([True, False]) for _ in range(3)]
    bias_dtype = None if bias is None else bias.dtype
    for wanted in (mask, [True] * 3):
        gradients = ops.batch_norm_backward(dy, x, weight, stats, True, wanted, bias_dtype, *domain)
        assert [g is not None for g in gradients] == wanted
        for what, value, exact, size_of_terms in zip(
            ("dx", "dweight", "dbias"), gradients, expected, magnitudes, strict=True
        ):
            if value is not None:
                bound = tolerances.gradient(exact, size_of_terms, dtype, 10, value.dtype)
                assert_within(what, value, exact, bound)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e37])
def test_range_of_layer_norm_of_channels(scale):
    """Squares of these leave the range of float32."""
    x = ORDERS["contiguous"](torch.randn(2, 33, 40) * scale)
    eps = 1e-42 if scale < 1 else 1e-5
    y, _ = ops.batch_norm(x, None, None, None, None, True, eps, 33, True, 2)
    exact = reference.batch_norm(x.double().reshape(1, 66, 40), training=True, eps=eps).y
    assert_within(
        "y", y, exact.reshape(x.shape), tolerances.output(exact.reshape(x.shape), x.dtype, 4)
    )


def test_empty():
    x = torch.empty(2, 4, 0, 3)
    y, stats = ops.batch_norm(x, None, None, None, None, True, EPS, 2)
    assert y.shape == x.shape and stats.isnan().all()
    dx, dweight, dbias = ops.batch_norm_backward(x, x, None, stats, True, [True] * 3, None, 2)
    assert dx.shape == x.shape
    for name, value in [("dweight", dweight), ("dbias", dbias)]:
        assert_bitwise(name, value, torch.zeros(4))


def test_root_mean_squares_are_refused():
    x = torch.randn(2, 4, 5)
    with pytest.raises(NotImplementedError, match="refused by batchnorm_ext"):
        ops.batch_norm(x, None, None, None, None, True, EPS, 4, False)
