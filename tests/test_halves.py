"""The halves of training, with sums between them that may be of several batches."""

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
    own, *rest, _, momentum, eps = problem.arguments(training=True)
    return apply_call(sums, own if x is None else x, *rest, momentum, eps)


def _statistics(x, sums, eps):
    return ops.apply(x, None, None, sums, eps)[1]


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
    relative = tolerances.normalized(x.dtype, ratio)
    mean, invstd = expected.stats
    assert_within("mean", stats[0], mean, relative / invstd)
    assert_within("invstd", stats[1], invstd, relative * invstd)
    assert_within("y", y, expected.y, tolerances.output(expected.y, x.dtype, ratio))
    _, fused_stats = (twin := make_problem(case, device)).forward(True)
    # On a GPU the two plans sum in different orders: each is within its own bound, of which the
    # running statistics take the share of a batch.
    share = 1 / problem.state["num_batches_tracked"].item() if case.momentum is None else 0.1
    apart = {"running_mean": 2 * relative / invstd, "running_var": 4 * relative / invstd**2}
    for name, value in problem.state.items():
        # twice a rounding apart, where that of the fused operator is right
        same = twin.state[name].double()
        bound = 2 * tolerances.half_ulp(same, value.dtype) if value.is_floating_point() else 0
        if device.type == "cuda" and name in apart:
            bound = bound + share * apart[name]
        assert_within(name, value, same, bound)

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


@pytest.mark.parametrize("sizes", [(64,), [1] * 31, (1, 63, 7, 200, 4096)], ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_constant_channel_has_no_variance(dtype, sizes, device):
    """Sums about zero cancel: 1000.1 had a variance of 1e-10, and 1e9 + 0.3 one of 257."""
    values = [1000.1, 1e9 + 0.3, -1e6 / 3, 0.0, 1e30]
    # whose sum over 4367 elements does not divide to it; whose square is not a normal number
    values += [0.9582438301443988, 8.744224836861123e-155]
    case = Case((sum(sizes), len(values)), dtype=dtype, param_dtype=torch.float32)
    problem = make_problem(case, device)
    problem.x.copy_(torch.tensor(values, dtype=torch.float64).expand_as(problem.x))
    before = problem.state
    sums = sum(ops.moments(part) for part in problem.x.split(sizes))
    y, stats = _apply(problem, sums)
    assert_bitwise("mean", stats[0], problem.x[0].double())
    eps = 5e-324  # the least there is
    invstd = _statistics(problem.x, sums, eps)[1]
    assert_bitwise("invstd", invstd, torch.full_like(invstd, eps).rsqrt())
    assert_bitwise("y", y, problem.bias.expand_as(y).to(dtype))
    wanted = 0.9 * before["running_var"].double()
    assert_bitwise("running_var", problem.running_var, wanted.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(40,), [1] * 40, (1, 32, 2, 5)], ids=len)
@pytest.mark.parametrize("mean_over_std", [0.0, 1.0, 1e3, 1e5, 1e6, 1e7])
def test_variance_of_parts_far_from_zero(mean_over_std, sizes, dtype, device):
    """The distance from zero of a channel costs what it costs the batch as one, and no more."""
    std = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64, device=device).reshape(-1, 1, 1)
    centre = mean_over_std * std
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(sum(sizes), 3, 9, 7, generator=generator, dtype=torch.float64).to(device)
    x = (noise * std + centre).to(dtype)
    sums = sum(ops.moments(part) for part in x.split(sizes))
    mean, invstd = _statistics(x, sums, 1e-30)
    about_centre = x.double() - centre  # to a rounding of the small difference
    wanted = about_centre.var([0, 2, 3], unbiased=False)
    # The means of the parts, which the local layer rounds just as well, and the last bits of the
    # sums. In float32 the kernel's own sums are far coarser, and see the same deviations.
    rounding = EPS * (16 + 4 * mean_over_std) + 2**-78 * mean_over_std**2
    relative = rounding if dtype is torch.float64 else max(rounding, 4e-7)
    assert_within("variance", invstd.pow(-2), wanted, relative * wanted)
    deviation = about_centre.mean([0, 2, 3]) - (mean - centre.flatten())
    assert_within("mean", deviation, torch.zeros_like(deviation), relative * wanted.sqrt())


def test_sums_that_overflow_are_infinite(device):
    """As the single doubles were, whose difference to infinity is NaN."""
    x = torch.full((100, 1), 1e308, dtype=torch.float64, device=device)
    inf = float("inf")
    sums = ops.moments(x)
    assert sums.tolist() == [inf, 0.0, inf, 0.0, 100.0]
    assert _statistics(x, sums, 1e-5).tolist() == [[inf], [0.0]]


@pytest.mark.parametrize("values", [[float("inf")], [float("nan")], [float("inf"), -float("inf")]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_part_that_is_not_finite(dtype, values, device):
    """Makes of the whole what the local layer makes of it, and nothing of other channels."""
    whole = make_problem(Case((8, 3), dtype=dtype), device)
    whole.x[: len(values), 1] = torch.tensor(values, dtype=dtype, device=device)
    whole.forward(training=True)
    problem = make_problem(Case((8, 3), dtype=dtype), device)
    problem.x.copy_(whole.x)
    sums = sum(ops.moments(part) for part in whole.x.split([1, 4, 3]))
    y, _ = _apply(problem, sums)
    assert y[:, 1].isnan().all() and y[:, ::2].isfinite().all()
    for name, value in whole.state.items():
        torch.testing.assert_close(problem.state[name], value, equal_nan=True)


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
    "sums", [torch.zeros(12, dtype=torch.float64), torch.zeros(13), torch.zeros(13, 1).double()]
)
def test_sums_of_another_kind(sums, device):
    problem = make_problem(Case((4, 3)), device)
    before = problem.state
    sums = sums.to(device)
    with pytest.raises(RuntimeError, match="expected sums to be 13 contiguous float64 values"):
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
