"""The halves of training through an activation: what the fused operators compute, in two steps."""

import pytest
import torch

from activations import ACTIVATIONS, INPUTS, PIECEWISE, C, bound, make_problem
from cases import DTYPES, LAYOUTS
from support import assert_bitwise, assert_within, ops

pytestmark = pytest.mark.only("cpu", reason="of the CPU kernels")

every_activation = pytest.mark.parametrize(
    "activation", [name for name in ACTIVATIONS if name != "identity"]
)


def cases(activation):
    """Whether there is a residual; the operators refuse one before a negative slope."""
    return (False,) if activation == "leaky_relu(-0.5)" else (False, True)


def run_halves(p, activation, parts=1):
    """Forward and backward on so many parts of the batch: y, stats, grad_sums, dx, dresidual."""
    affine = p.weight, p.bias
    xs, dys = p.x.chunk(parts), p.dy.chunk(parts)
    residuals = [None] * parts if p.residual is None else p.residual.chunk(parts)
    sums = sum(ops.moments(x) for x in xs)
    count = sums[-1:]
    given = zip(xs, residuals, strict=True)
    results = [ops.apply(x, *affine, sums, 1e-5, residual, activation) for x, residual in given]
    ys, (stats, *_) = zip(*results, strict=True)
    reads_output = p.residual is not None and activation in PIECEWISE
    kept = ys if reads_output else residuals
    given = list(zip(dys, xs, kept, strict=True))
    grad_sums = sum(
        ops.grad_moments(dy, x, stats, *affine, own, count, activation) for dy, x, own in given
    )
    found = [
        ops.activated_grad_apply(dy, x, *affine, own, stats, grad_sums, count, activation)
        for dy, x, own in given
    ]
    dx, dresidual = zip(*found, strict=True)
    dresidual = None if p.residual is None else joined(dresidual)
    return joined(ys), stats, grad_sums, joined(dx), dresidual


def joined(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def run_fused(p, activation):
    options = (None, None, True, 1e-5, 0, True, 1, p.residual, activation)
    y, stats = ops.batch_norm(p.x, p.weight, p.bias, *options)
    kept = y if p.residual is not None and activation in PIECEWISE else p.residual
    options = (True, [True] * 3, torch.float64, 0, activation)
    gradients = ops.batch_norm_activated_backward(
        p.dy, p.x, p.weight, p.bias, kept, stats, *options
    )
    return y, stats, *gradients


@torch.no_grad()
@every_activation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2])
def test_halves_make_a_whole(parts, dtype, activation):
    for size, layout in INPUTS:
        for has_residual in cases(activation):
            p = make_problem(size, layout, dtype, has_residual)
            y, stats, grad_sums, dx, dresidual = run_halves(p, activation, parts)
            wanted_y, wanted_stats, wanted_dx, dweight, dbias, wanted_dresidual = run_fused(
                p, activation
            )
            # the same map but for the last bits of its statistics
            for name, found, wanted in (
                ("y", y, wanted_y),
                ("dx", dx, wanted_dx),
                ("dresidual", dresidual, wanted_dresidual),
            ):
                if wanted is None:
                    assert found is None
                    continue
                assert found.dtype == dtype
                assert_within(name, found, wanted, 2 * bound(wanted.double(), dtype, 1.0))
            assert_within("stats", stats, wanted_stats, 1e-7 * (wanted_stats.abs() + 1))
            sums = torch.cat([dbias, dweight])
            assert_within("grad_sums", grad_sums, sums, 1e-5 * p.x.numel() / C)


def test_strides():
    for layout in LAYOUTS:
        p = make_problem((3, C, 7, 9), layout, torch.bfloat16, True)
        with torch.no_grad():
            y, _, _, dx, dresidual = run_halves(p, "silu")
        for value in (y, dx, dresidual):
            assert value.stride() == torch.empty_like(p.x).stride(), layout


@torch.no_grad()
@every_activation
def test_same_bits_for_any_number_of_threads(activation, set_num_threads):
    for layout in ("contiguous", "channels_last"):
        for has_residual in cases(activation):
            p = make_problem((8, C, 96, 49), layout, torch.float32, has_residual)
            results = []
            for threads in (1, 2):
                set_num_threads(threads)
                results.append(run_halves(p, activation))
            for a, b in zip(*results, strict=True):
                if a is not None:
                    assert_bitwise("result", a, b)


@torch.no_grad()
def test_channels_at_the_end_of_the_range():
    """x - mean overflows where the result does not: z has the same bits forward and backward."""
    p = make_problem((4, C, 6), "contiguous", torch.float32, False)
    x = torch.where(p.x > 0, 3e38, -3e38)
    x[0, :, :2] = torch.tensor([3e38, -3e38])
    p.x = x
    p.weight, p.bias = torch.ones(C), torch.zeros(C)
    y, stats, grad_sums, dx, _ = run_halves(p, "relu")
    dy = torch.where(y > 0, p.dy, 0)
    wanted = ops.grad_moments(dy, x, stats)
    assert_within("grad_sums", grad_sums, wanted, 1e-5 * wanted.abs() + 1e-5)
    assert y.isfinite().all() and dx.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_operators(activation, has_residual, dtype):
    p = make_problem((2, C, 5, 3), "channels_last", dtype, has_residual)
    check = torch.library.opcheck
    with torch.no_grad():
        sums = ops.moments(p.x)
        affine, rest = (p.x.detach(), p.weight.detach(), p.bias.detach()), (p.residual, activation)
        _, stats = ops.apply(*affine, sums, 1e-5, *rest)
        check(ops.apply, (*affine, sums, 1e-5, *rest))
        state = p.mean, p.var, torch.tensor(3)
        check(ops.apply_update, (*affine, *state, sums, 0.1, 1e-5, *rest))
        count, grad_sums = sums[-1:], torch.randn(2 * C, dtype=torch.float64)
        x, weight, bias = affine
        check(ops.grad_moments, (p.dy, x, stats, weight, bias, p.residual, count, activation))
        arguments = (p.dy, x, weight, bias, p.residual, stats, grad_sums, count, activation)
        check(ops.activated_grad_apply, arguments)


@torch.no_grad()
def test_empty_batch():
    p = make_problem((0, C, 3), "contiguous", torch.float32, True)
    whole = make_problem((4, C, 3), "contiguous", torch.float32, True)
    sums = ops.moments(whole.x)
    y, stats = ops.apply(p.x, p.weight, p.bias, sums, 1e-5, p.residual, "silu")
    assert y.shape == p.x.shape and stats.isfinite().all()
    options = (p.residual, sums[-1:], "silu")
    grad_sums = ops.grad_moments(p.dy, p.x, stats, p.weight, p.bias, *options)
    assert not grad_sums.any() and grad_sums.shape == (2 * C,)
    arguments = (p.dy, p.x, p.weight, p.bias, p.residual, stats, grad_sums, sums[-1:], "silu")
    for value in ops.activated_grad_apply(*arguments):
        assert value.shape == p.x.shape


@torch.no_grad()
def test_errors():
    p = make_problem((4, C, 3), "contiguous", torch.float32, True)
    sums = ops.moments(p.x)
    affine = p.x, p.weight, p.bias
    before = p.mean.clone()
    state = p.mean, p.var, None
    with pytest.raises(ValueError, match="expected activation to be one of relu.*, got 'swish'"):
        ops.apply_update(*affine, *state, sums, 0.1, 1e-5, None, "swish")
    with pytest.raises(RuntimeError, match="expected residual like input"):
        ops.apply_update(*affine, *state, sums, 0.1, 1e-5, p.residual[1:], "relu")
    with pytest.raises(NotImplementedError, match="no residual before .* negative slope"):
        ops.apply_update(*affine, *state, sums, 0.1, 1e-5, p.residual, "leaky_relu(-0.5)")
    assert_bitwise("running_mean", p.mean, before)
    stats = torch.stack([p.mean, p.var]).double()
    with pytest.raises(RuntimeError, match="expected residual like input"):
        ops.grad_moments(p.dy, p.x, stats, residual=p.residual[1:], activation="relu")
    with pytest.raises(RuntimeError, match="expected count to be 1 contiguous float64"):
        ops.grad_moments(p.dy, p.x, stats, count=sums[-2:], activation="relu")
    with pytest.raises(RuntimeError, match="expected no residual without an activation"):
        ops.activated_grad_apply(p.dy, *affine, p.residual, stats, sums[: 2 * C], sums[-1:], "")
    arguments = (p.dy, *affine, None, stats, sums[: 2 * C], sums[-1:])
    with pytest.raises(ValueError, match="expected activation to be one of relu"):
        ops.activated_grad_apply(*arguments, "relu(1)")
