"""What only a GPU can show: agreement with the CPU, every plan, launches, sizes beyond 32 bits."""

import pytest
import torch

import tolerances
from batchnorm_ext import reference
from batchnorm_ext.modules import BatchNorm2d
from cases import LARGE, TRAINING_CASES, Case
from gpu_cases import LARGER, SHORT, assert_same, every_plan, kernels_of, step
from support import (
    apply_call,
    assert_within,
    batch_norm,
    batch_norm_backward,
    check_backward,
    check_forward,
    gradient_magnitudes,
    make_problem,
)

pytestmark = pytest.mark.only("cuda", reason="a test of the GPU")


@every_plan
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_plan(case, plan, device):
    """Short, for it also runs under compute-sanitizer."""
    problem = make_problem(case, device)
    _, stats = check_forward(problem, training=True)
    check_backward(problem, True, stats)


@every_plan
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_same_bits_every_time(case, plan, device):
    problem = make_problem(case, device)
    expected = step(problem.clone())
    for _ in range(5):
        assert_same(step(problem.clone()), expected)


@pytest.mark.parametrize(
    "case", [c for c in TRAINING_CASES if (c.size, c.layout, c.dtype) not in LARGE], ids=str
)
def test_agrees_with_the_cpu(case, device):
    """Both are within a bound of the oracle, and so within twice the bound of each other."""
    on_cpu, on_gpu = make_problem(case), make_problem(case, device)
    expected = on_cpu.oracle(training=True)
    ratio, (_, invstd) = on_cpu.mean_over_std(expected.stats), expected.stats
    relative = tolerances.normalized(case.dtype, ratio)
    y, stats = on_cpu.forward(training=True)
    cuda_y, cuda_stats = on_gpu.forward(training=True)
    assert_within("mean", cuda_stats[0].cpu(), stats[0], 2 * relative / invstd)
    assert_within("invstd", cuda_stats[1].cpu(), stats[1], 2 * relative * invstd)
    if y.numel() > 0:
        bound = 2 * tolerances.output(expected.y, case.dtype, ratio)
        assert_within("y", cuda_y.cpu(), y, bound)

    arguments = [True, [True] * 3]
    gradients = batch_norm_backward(on_cpu.dy, on_cpu.x, on_cpu.weight, stats, *arguments)
    cuda_gradients = batch_norm_backward(
        on_gpu.dy, on_gpu.x, on_gpu.weight, stats.to(device), *arguments
    )
    exact = reference.batch_norm_backward(on_cpu.dy, on_cpu.x, on_cpu.weight, stats, True)
    magnitudes = gradient_magnitudes(on_cpu, True, stats, exact)
    for name, ours, cuda in zip(exact._fields, gradients, cuda_gradients, strict=True):
        wanted, terms = getattr(exact, name), magnitudes[name]
        bound = 2 * tolerances.gradient(wanted, terms, case.dtype, ratio, ours.dtype)
        assert_within(name, cuda.cpu(), ours, bound)


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_halves_agree_with_the_whole_on_the_cpu(case, device):
    """Sums, and what is made of them, in launches of their own."""
    ops = torch.ops.batchnorm_ext
    whole, problem = make_problem(case), make_problem(case, device)
    y, stats, dx, dweight, dbias = step(whole)
    expected = whole.oracle(training=True)
    ratio = whole.mean_over_std(expected.stats)
    x, dy, weight, bias, *rest = problem.x, problem.dy, *problem.arguments(True)[1:]
    *state, _, momentum, eps = rest
    sums = ops.moments(x)
    op, arguments = apply_call(sums, x, weight, bias, *state, momentum, eps)
    cuda_y, cuda_stats = op(*arguments)
    bound = 2 * tolerances.output(expected.y, case.dtype, ratio)
    assert_within("y", cuda_y.cpu(), y, bound)
    for name, value in whole.state.items():
        actual = problem.state[name].cpu()
        torch.testing.assert_close(actual, value, msg=lambda m, n=name: f"{n}: {m}")

    grad_sums = ops.grad_moments(dy, x, cuda_stats)
    count = sums[-1:]
    cuda_dx = ops.grad_apply(dy, x, weight, cuda_stats, grad_sums, count)
    exact = reference.batch_norm_backward(whole.dy, whole.x, whole.weight, stats, True)
    magnitudes = gradient_magnitudes(whole, True, stats, exact)
    found = {"dx": cuda_dx, "dweight": grad_sums[x.shape[1] :], "dbias": grad_sums[: x.shape[1]]}
    for name, ours in [("dx", dx), ("dweight", dweight), ("dbias", dbias)]:
        wanted, terms = getattr(exact, name), magnitudes[name]
        bound = 2 * tolerances.gradient(wanted, terms, case.dtype, ratio, ours.dtype)
        assert_within(name, found[name].cpu(), ours, bound)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_elements_than_32_bits_count(layout, device):
    """One pattern over and over: its statistics and its results are those of the whole."""
    batch, one = 22000, (1, 3, 128, 256)
    if torch.cuda.mem_get_info(device)[0] < 30e9:
        pytest.skip("takes 30 GB")
    pattern = make_problem(Case(one, layout, torch.bfloat16), device)
    size = (batch, *one[1:])
    whole = make_problem(Case((2, 3), dtype=torch.bfloat16), device)
    whole.weight, whole.bias = pattern.weight, pattern.bias
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    whole.x, whole.dy = (
        t.expand(size).contiguous(memory_format=memory_format) for t in (pattern.x, pattern.dy)
    )
    assert whole.x.numel() > 2**31
    y, stats, dx, dweight, dbias = step(whole)
    expected = pattern.oracle(training=True)
    relative = tolerances.normalized(torch.bfloat16, pattern.mean_over_std(expected.stats))
    # A thread adds up some 7,000 squares in float32, and every thread the same ones: nothing
    # averages out: half a rounding for each addition, as they come, in a random walk.
    relative += 7000**0.5 * torch.finfo(torch.float32).eps / 2
    assert_within("mean", stats[0], expected.stats[0], relative / expected.stats[1])
    assert_within("invstd", stats[1], expected.stats[1], relative * expected.stats[1])
    exact = reference.batch_norm_backward(
        pattern.dy, pattern.x, pattern.weight, expected.stats, True
    )
    magnitudes = gradient_magnitudes(pattern, True, expected.stats, exact)
    for name, whole_sum in [("dweight", dweight), ("dbias", dbias)]:
        wanted, terms = getattr(exact, name), magnitudes[name]
        bound = tolerances.gradient(wanted, terms, torch.bfloat16, 1.0, dweight.dtype)
        assert_within(name, whole_sum.double() / batch, wanted, bound)
    for i in (0, 1, batch // 2, batch - 1):
        bound = tolerances.output(expected.y, torch.bfloat16, 1.0)
        assert_within(f"y[{i}]", y[i : i + 1], expected.y, bound)
        bound = tolerances.gradient(exact.dx, magnitudes["dx"], torch.bfloat16, 1.0, torch.bfloat16)
        assert_within(f"dx[{i}]", dx[i : i + 1], exact.dx, bound)


def test_batch_beyond_the_limit_of_a_grid_dimension(device):
    problem = make_problem(Case((70000, 5, 3, 1)), device)
    _, stats = check_forward(problem, training=True)
    check_backward(problem, True, stats)


@pytest.mark.parametrize("plan, launches", [("", 1), ("policy=split", 2)], indirect=["plan"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_number_of_launches(layout, plan, launches, device):
    """One for a tensor that fits, which also counts the batch; two where the plan says so."""
    problem = make_problem(Case((16, 64, 28, 28), layout, torch.bfloat16, momentum=None), device)
    _, stats = problem.forward(training=True)
    kernels = kernels_of(lambda: problem.forward(training=True))
    assert len(kernels) == launches and all("norm_kernel" in name for name in kernels), kernels
    arguments = problem.dy, problem.x, problem.weight, stats, True, [True] * 3
    kernels = kernels_of(lambda: batch_norm_backward(*arguments))
    assert len(kernels) == launches and all("norm_kernel" in name for name in kernels), kernels


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_no_host_synchronization(case, device):
    problem = make_problem(case, device)
    step(problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_device_that_is_not_the_current_one():
    first, second = (torch.device("cuda", i) for i in range(2))
    for case in SHORT:
        with torch.cuda.device(first):
            expected = step(make_problem(case, first))
            actual = step(make_problem(case, second))
            assert torch.cuda.current_device() == 0
        assert all(output.device == second for output in actual)
        assert_same([output.to(first) for output in actual], expected)


def test_nothing_is_left_to_native(device):
    """What would otherwise go unnoticed: the tests of the layers pass on native kernels, too."""
    x = torch.randn(4, 3, 5, 5, device=device)
    module = BatchNorm2d(3, device=device)
    assert any("norm_kernel" in name for name in kernels_of(lambda: module(x)))
    y, _ = batch_norm(x, None, None, None, None, None, True, 0.1, 1e-5)
    assert y.device == x.device


@pytest.mark.parametrize("what", ["channels", "every other column", "expanded", "strided weight"])
def test_slice_runs_on_thekernels_of(what, device):
    """Tensors that are not dense once passed for ones that overlap the running statistics."""
    wide = torch.randn(4, 6, 5, 10, device=device)
    x = {
        "channels": wide[:, :3],
        "every other column": wide[:, ::2, :, ::2],
        "expanded": wide[:1, :3].expand(4, -1, -1, -1),
        "strided weight": wide[:, :3].contiguous(),
    }[what]
    module = BatchNorm2d(3, device=device)
    if what == "strided weight":
        module.weight = torch.nn.Parameter(torch.ones(6, device=device)[::2])
    assert any("norm_kernel" in name for name in kernels_of(lambda: module(x)))
