"""The halves of training, with sums between them that may be of several batches."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tolerances
from cases import LAYOUTS, TRAINING_CASES, Case
from support import apply_call, assert_bitwise, assert_within, check_gradients, make_problem
from test_operators import CASES

ops = torch.ops.batchnorm_ext
EPS = torch.finfo(torch.float64).eps


def _apply(problem, sums, x=None):
    op, arguments = _apply_call(problem, sums, x)
    return op(*arguments)


def _apply_call(problem, sums, x=None):
    x, *rest, training, momentum, eps = replace(problem, x=problem.x if x is None else x).arguments(
        True
    )
    return apply_call(sums, x, *rest, momentum, eps)


def _backward(problem, stats, count):
    sums = ops.grad_moments(problem.dy, problem.x, stats)
    return sums, ops.grad_apply(problem.dy, problem.x, problem.weight, stats, sums, count)


@pytest.mark.parametrize("case", TRAINING_CASES, ids=str)
def test_halves_make_a_whole(case, device):
    problem = make_problem(case, device)
    x, before = problem.x, problem.state
    count = x.numel() // max(x.shape[1], 1)
    expected = problem.oracle(True)
    sums = ops.moments(x)
    y, stats = _apply(problem, sums)
    assert sums[-1] == count
    assert y.stride() == torch.empty_like(x).stride(), "memory format of y"
    if count == 0:
        assert (sums == 0).all() and stats.isnan().all()
        for name, value in problem.state.items():
            assert_bitwise(name, value, before[name])
        return
    ratio = problem.mean_over_std(expected.stats)
    # sums about zero: the squares of the means, a rounding of which each merge costs
    about_zero = 16 * EPS * (1 + ratio**2)
    relative = tolerances.normalized(x.dtype, ratio) + about_zero
    mean, invstd = expected.stats
    assert_within("mean", stats[0], mean, relative / invstd)
    assert_within("invstd", stats[1], invstd, relative * invstd)
    scale = max(1.0, expected.y.abs().max().item())
    bound = tolerances.output(expected.y, x.dtype, ratio) + about_zero * scale
    assert_within("y", y, expected.y, bound)
    _, fused_stats = (twin := make_problem(case, device)).forward(True)
    for name, value in problem.state.items():
        # twice a rounding apart, where that of the fused operator is right
        same = twin.state[name].double()
        bound = 2 * tolerances.half_ulp(same, value.dtype) if value.is_floating_point() else 1e-9
        spread = about_zero * (1 / fused_stats[1].square().min().item() + 1)
        assert_within(name, value, same, bound + spread)

    sums, dx = _backward(problem, fused_stats, sums[-1:])
    assert dx.stride() == torch.empty_like(x).stride(), "memory format of dx"
    dbias, dweight = sums.chunk(2)
    check_gradients(problem, True, dx, dweight, dbias)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [(3, 5), (1, 0, 4), (0, 0, 2)], ids=str)
def test_parts_of_a_batch(sizes, layout, device):
    """Each part, the empty ones among them, as if it were normalized with the others."""
    whole = make_problem(Case((sum(sizes), 17, 7, 9), layout), device)
    y, stats = whole.clone().forward(True)
    parts, grads = whole.x.split(sizes), whole.dy.split(sizes)
    sums = sum(ops.moments(part) for part in parts)
    _, dx = _backward(whole, stats, sums[-1:])
    grad_sums = sum(ops.grad_moments(dy, x, stats) for dy, x in zip(grads, parts, strict=True))
    for part, dy, wanted, wanted_dx in zip(
        parts, grads, y.split(sizes), dx.split(sizes), strict=True
    ):
        problem = whole.clone()
        actual, _ = _apply(problem, sums, part)
        # the same map but for the last bits of its float64 statistics
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
        actual = ops.grad_apply(dy, part, whole.weight, stats, grad_sums, sums[-1:])
        torch.testing.assert_close(actual, wanted_dx, rtol=1e-6, atol=1e-6)
        twin = whole.clone()
        twin.forward(True)
        for name, value in twin.state.items():
            torch.testing.assert_close(problem.state[name], value, rtol=1e-6, atol=1e-7)


def test_one_element_has_no_unbiased_variance(device):
    problem = make_problem(Case((1, 3)), device)
    before = problem.state
    y, _ = _apply(problem, ops.moments(problem.x))
    assert_bitwise("y", y, problem.bias.expand_as(y))
    assert_bitwise("running_var", problem.running_var, before["running_var"])
    wanted = 0.9 * before["running_mean"] + 0.1 * problem.x[0]
    torch.testing.assert_close(problem.running_mean, wanted)
    assert problem.num_batches_tracked == before["num_batches_tracked"] + 1


def test_variance_is_not_negative(device):
    """Of a constant far from zero, whose sums cancel."""
    problem = make_problem(Case((64, 3), dtype=torch.float64, param_dtype=None), device)
    problem.x.fill_(1 / 3 * 1e6)
    sums = sum(ops.moments(part) for part in problem.x.split(1))
    _, stats = _apply(problem, sums)
    assert (stats[1] <= problem.eps**-0.5).all() and (problem.running_var >= 0).all()


@pytest.mark.parametrize(
    "size, layout",
    [
        ((40, 96, 31, 33), "contiguous"),
        ((9, 640), "contiguous"),
        ((40, 96, 31, 33), "channels_last"),
    ],
    ids=str,
)
def test_number_of_threads_changes_nothing(size, layout, set_num_threads, device):
    problem = make_problem(Case(size, layout), device)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        sums = ops.moments(problem.x)
        y, stats = _apply(problem.clone(), sums)
        results.append((sums, y, *_backward(problem, stats, sums[-1:])))
    for other in results[1:]:
        for name, a, b in zip(["sums", "y", "grad_sums", "dx"], results[0], other, strict=True):
            assert_bitwise(name, b, a)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators(case, device):
    problem = make_problem(case, device)
    sums = ops.moments(problem.x)
    _, stats = _apply(problem.clone(), sums)
    grad_sums, _ = _backward(problem, stats, sums[-1:])
    check = torch.library.opcheck
    check(ops.moments, (problem.x,))
    check(*_apply_call(problem, sums))
    check(ops.grad_moments, (problem.dy, problem.x, stats))
    arguments = problem.dy, problem.x, problem.weight, stats, grad_sums, sums[-1:]
    check(ops.grad_apply, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_have_the_sizes_and_strides_of_real_ones(layout, device):
    problem = make_problem(Case((3, 17, 7, 9), layout, torch.bfloat16), device)

    def run(problem):
        sums = ops.moments(problem.x)
        y, stats = _apply(problem, sums)
        return sums, y, stats, *_backward(problem, stats, sums[-1:])

    real = run(problem.clone())
    with FakeTensorMode() as mode:
        for name, value in vars(problem).items():
            if torch.is_tensor(value):
                setattr(problem, name, mode.from_tensor(value))
        faked = run(problem)
    for a, b in zip(faked, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize(
    "sums", [torch.zeros(6, dtype=torch.float64), torch.zeros(7), torch.zeros(7, 1).double()]
)
def test_sums_of_another_kind(sums, device):
    problem = make_problem(Case((4, 3)), device)
    before = problem.state
    sums = sums.to(device)
    with pytest.raises(RuntimeError, match="expected sums to be 7 contiguous float64 values"):
        _apply(problem, sums)
    for name, value in problem.state.items():
        assert_bitwise(name, value, before[name])
    stats = torch.ones(2, 3, dtype=torch.float64, device=device)
    arguments = problem.dy, problem.x, None, stats
    with pytest.raises(RuntimeError, match="expected grad_sums to be 6 contiguous float64"):
        ops.grad_apply(*arguments, sums[:5], sums[:1])
    good = torch.zeros(6, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="expected count to be 1 contiguous float64"):
        ops.grad_apply(*arguments, good, good[:2])
