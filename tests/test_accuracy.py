"""Hard statistics: errors against those of native PyTorch, and inputs that break simpler sums."""

import pytest
import torch
import torch.nn.functional as F

import tolerances
from batchnorm_ext import reference
from cases import LAYOUTS, Case
from support import (
    Problem,
    assert_bitwise,
    assert_within,
    batch_norm,
    batch_norm_backward,
    check_backward,
    check_forward,
    make_problem,
)

FORMATS = ["contiguous", "channels_last"]
both_formats = pytest.mark.parametrize("layout", FORMATS)


def _sizes_and_formats(*sizes):
    """The sizes in both memory formats where they have two."""
    pairs = [(size, f) for size in sizes for f in (FORMATS if len(size) > 2 else FORMATS[:1])]
    return pytest.mark.parametrize("size, layout", pairs, ids=str)


def _plain(x, dy=None, eps=1e-5):
    """A problem without weight and bias; its running statistics become those of the batch."""
    channels = x.shape[1]
    mean, var = torch.zeros(channels, device=x.device), torch.ones(channels, device=x.device)
    dy = torch.randn_like(x) if dy is None else dy
    return Problem(x, dy, None, None, mean, var, torch.tensor(0, device=x.device), 1.0, eps)


def _native(problem):
    """Output, running variance and gradients of native PyTorch on the contiguous input."""
    x = problem.x.detach().contiguous().requires_grad_()
    weight, bias = (
        torch.ones(2, x.shape[1], dtype=x.dtype, device=x.device).requires_grad_().unbind()
    )
    mean, var = (t.to(x.dtype) for t in (problem.running_mean, problem.running_var))
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, problem.eps)
    dx, dweight, dbias = torch.autograd.grad(y, [x, weight, bias], problem.dy.contiguous())
    return {"y": y, "running_var": var, "dx": dx, "dweight": dweight, "dbias": dbias}


@pytest.mark.parametrize("mean", [0, 1, 100, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@_sizes_and_formats((16, 8, 56, 56), (64, 2, 32, 32), (2000, 9, 1, 1))
def test_error_is_at_most_that_of_native_contiguous(layout, size, dtype, mean, device):
    x = LAYOUTS[layout](torch.randn(size, dtype=dtype, device=device) + mean)
    problem = _plain(x)
    native = _native(problem)
    oracle = problem.oracle(training=True)
    y, stats = problem.clone().forward(training=True)
    gradients = batch_norm_backward(problem.dy, x, None, stats, True, [True] * 3)
    ours = {"y": y, **dict(zip(["dx", "dweight", "dbias"], gradients, strict=True))}
    expected = reference.batch_norm_backward(problem.dy, x, None, oracle.stats, True)._asdict()
    expected["y"] = oracle.y
    for name, wanted in expected.items():
        scale = wanted.abs().max().item()
        if name in ("dweight", "dbias"):  # sums that cancel: relative to their terms, of order 1
            scale = x.numel() / x.shape[1]
        errors = [
            (t.detach() - wanted).abs().max().item() / scale for t in (ours[name], native[name])
        ]
        on_gpu = device.type == "cuda" and dtype is torch.float64
        luck = tolerances.LUCK_OF_FLOAT64_ON_A_GPU if on_gpu else tolerances.LUCK
        luck *= torch.finfo(dtype).eps
        assert errors[0] <= errors[1] + luck, f"{name}: {errors[0]:.3g}, native {errors[1]:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4, 1e5, 1e6])
@_sizes_and_formats((16, 4, 28, 28), (4096, 3), (3, 5, 7, 5))
def test_mean_far_from_zero(layout, size, ratio, dtype, device):
    case = Case(size, layout, dtype, momentum=1.0)
    problem = make_problem(case, device)
    sign = torch.where(torch.arange(size[1], device=device) % 2 == 0, 1.0, -1.0)
    problem.x = problem.x + ratio * sign.to(dtype).view(1, -1, *[1] * (len(size) - 2))
    oracle = problem.oracle(training=True)
    _, stats = check_forward(problem, training=True)
    check_backward(problem, True, stats)
    # what is asked for, whatever the bounds of the table: 1e-5 at mean/std 1e4
    error = (problem.running_var / oracle.running_var - 1).abs().max()
    assert error <= 1e-5 or ratio > 1e4


@pytest.mark.parametrize("first, rest", [(0.0, 1e4), (1e6, 0.0), (-1e8, 0.0)])
@_sizes_and_formats((16, 4, 28, 28), (4096, 3), (3, 5, 7, 5))
def test_first_element_is_an_outlier(layout, size, first, rest, device):
    """A sum of squares about the first element loses all digits here."""
    x = torch.randn(size, device=device) + rest
    x[(0, slice(None), *[0] * (len(size) - 2))] = first
    problem = _plain(LAYOUTS[layout](x))
    expected = problem.oracle(training=True)
    y, stats = problem.forward(training=True)
    scale = expected.y.abs().max().item()
    assert_within("y", y, expected.y, tolerances.OUTLIER[device.type] * scale)
    assert_within(
        "running_var", problem.running_var, expected.running_var, 1e-5 * expected.running_var
    )
    gradients = reference.batch_norm_backward(problem.dy, problem.x, None, expected.stats, True)
    dx = batch_norm_backward(problem.dy, problem.x, None, stats, True, [True, False, False])[0]
    assert_within(
        "dx", dx, gradients.dx, tolerances.OUTLIER[device.type] * scale * expected.stats[1].max()
    )


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 9, 10, 16, 17, 33, 64])
def test_few_elements_per_channel(count, device):
    """With few elements the centre of the moments matters: the first element is a poor one."""
    case = Case((count, 2000), affine="none")
    problem = make_problem(case, device)
    _, stats = check_forward(problem, training=True)
    check_backward(problem, True, stats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@_sizes_and_formats((8, 6, 13, 13), (700, 6), (2, 6, 3, 3))
def test_constant_channels(layout, size, dtype, device):
    """No rounding gives them a variance: it is zero, and the output is the bias."""
    values = torch.tensor([0.0, 0.1, -1e4 / 3, 6e4, 1e-7, -1.0], dtype=dtype, device=device)
    shape = [1, -1, *[1] * (len(size) - 2)]
    x = values.view(shape).expand(size)
    problem = _plain(LAYOUTS[layout](x))
    problem.weight, problem.bias = torch.randn(2, 6, device=device).unbind()
    y, stats = problem.forward(training=True)
    assert_bitwise("y", y, problem.bias.to(dtype).view(shape).expand(size))
    assert_bitwise("mean", stats[0], values.double())
    # the root of a GPU may be a bit off
    invstd = torch.full((6,), 1e-5, dtype=torch.float64).rsqrt().to(device)
    assert_bitwise("invstd", stats[1], invstd)
    assert problem.running_var.tolist() == [0.0] * 6
    check_backward(problem, True, stats)


@both_formats
def test_scale_1e30(layout, device):
    """The squares overflow float32, the result must not: native PyTorch gives zeros."""
    problem = make_problem(Case((4, 5, 9, 9), layout, track=True), device)
    problem.x = problem.x * 1e30
    y, stats = check_forward(problem, training=True)
    assert y.std() > 0.5
    assert problem.running_var.isinf().all() and problem.running_mean.isfinite().all()
    check_backward(problem, True, stats)


@pytest.mark.parametrize("eps", [1e-5, 1e-70])
@both_formats
def test_scale_1e_minus_30(layout, eps, device):
    """Below eps the output is ``x / sqrt(eps)``; above a tiny eps it is normalized as ever."""
    x = LAYOUTS[layout](1e-30 * torch.randn(4, 5, 9, 9, device=device))
    problem = _plain(x, eps=eps)
    expected = problem.oracle(training=True)
    y, stats = problem.forward(training=True)
    bound = tolerances.normalized(x.dtype, 0) * expected.y.abs().max()
    assert_within("y", y, expected.y, bound)
    assert_within("mean", stats[0], expected.stats[0], tolerances.normalized(x.dtype, 0) * 1e-30)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@_sizes_and_formats((4, 17, 9, 9), (64, 130), (2, 5, 40, 40))
def test_a_channel_that_is_not_finite_leaves_the_others_alone(layout, size, dtype, bad, device):
    case = Case(size, layout, dtype)
    clean, spoilt = make_problem(case, device), make_problem(case, device)
    spoilt.x[1, 2] = bad
    others = [c for c in range(size[1]) if c != 2]

    def results(problem):
        y, stats = problem.forward(training=True)
        dx, dweight, dbias = batch_norm_backward(
            problem.dy, problem.x, problem.weight, stats, True, [True] * 3
        )
        per_channel = [stats[0], stats[1], problem.running_mean, problem.running_var, dweight]
        return [y.transpose(0, 1), dx.transpose(0, 1), *per_channel], dbias

    (expected, expected_dbias), (actual, dbias) = results(clean), results(spoilt)
    names = ["y", "dx", "mean", "invstd", "running_mean", "running_var", "dweight"]
    for name, a, b in zip(names, actual, expected, strict=True):
        assert_bitwise(name, a[others], b[others])
        assert a[2].isnan().any() or a[2].isinf().any(), (
            f"{name} hides that its channel is not finite"
        )
    assert_bitwise("dbias", dbias, expected_dbias)
    assert spoilt.num_batches_tracked.item() == 4


def test_extreme_values_of_half_precision(device):
    """The squares of the largest float16 and bfloat16 numbers do not fit in their own dtype."""
    for dtype in (torch.float16, torch.bfloat16):
        largest = torch.finfo(dtype).max
        x = torch.tensor([[largest], [-largest], [largest], [-largest]], dtype=dtype, device=device)
        y, _ = batch_norm(x, None, None, None, None, None, True, 0.1, 1e-5)
        assert y.flatten().tolist() == [1, -1, 1, -1]


def test_subnormal_results_of_bfloat16_may_be_zero(device):
    """And nothing else: the processor's instruction to narrow takes subnormal numbers for zero."""
    least = torch.finfo(torch.bfloat16).smallest_normal
    x = torch.randn(8, 64, 6, 6, device=device).bfloat16()
    weight = torch.full((64,), least, device=device)
    y, _ = batch_norm(x, weight, None, None, None, None, True, 0.1, 1e-5)
    double = x.double()
    mean, var = double.mean((0, 2, 3), True), double.var((0, 2, 3), correction=0, keepdim=True)
    expected = (double - mean) / (var + 1e-5).sqrt() * least
    normal = expected.abs() > 1.01 * least
    assert normal.any() and not normal.all()
    # beyond the smallest normal number: half of the last of 8 bits, twice for what float32 rounds
    error = (y.double() - expected).abs()
    assert (error[normal] <= 2**-8 * expected[normal].abs()).all()
    assert (error[~normal] <= 1.01 * least).all()
