"""What only a GPU can show: agreement with the CPU, every plan, launches, sizes beyond 32 bits."""

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import batchnorm_ext
import tolerances
from batchnorm_ext import reference
from batchnorm_ext.modules import BatchNorm2d
from cases import LARGE, TRAINING_CASES, Case
from gpu_cases import LARGER, SHORT, assert_same, every_plan, step
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


def _kernels(call):
    """The names of the kernels that a call launches."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    is_kernel = torch.autograd.DeviceType.CUDA
    return [event.name for event in profiler.events() if event.device_type == is_kernel]


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
    kernels = _kernels(lambda: problem.forward(training=True))
    assert len(kernels) == launches and all("norm_kernel" in name for name in kernels), kernels
    arguments = problem.dy, problem.x, problem.weight, stats, True, [True] * 3
    kernels = _kernels(lambda: batch_norm_backward(*arguments))
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
    assert any("norm_kernel" in name for name in _kernels(lambda: module(x)))
    y, _ = batch_norm(x, None, None, None, None, None, True, 0.1, 1e-5)
    assert y.device == x.device


@pytest.mark.parametrize("what", ["channels", "every other column", "expanded", "strided weight"])
def test_slice_runs_on_the_kernels(what, device):
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
    assert any("norm_kernel" in name for name in _kernels(lambda: module(x)))


SAMPLES = {
    "instance": lambda package: package.InstanceNorm2d(24, affine=True, track_running_stats=True),
    "group": lambda package: package.GroupNorm(4, 24),
    "one group": lambda package: package.GroupNorm(1, 24),
    "groups of one channel": lambda package: package.GroupNorm(24, 24),
}
every_norm_of_samples = pytest.mark.parametrize("norm", SAMPLES)


@every_plan
@every_norm_of_samples
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_of_samples(norm, layout, dtype, plan, device):
    """Against the native layers in float64 on the CPU."""
    native, ours = SAMPLES[norm](nn), SAMPLES[norm](batchnorm_ext)
    for parameter in native.parameters():
        nn.init.uniform_(parameter, -2, 2)
    ours.load_state_dict(native.state_dict())
    native.double(), ours.to(device)
    x, dy = (torch.randn(5, 24, 19, 17).to(dtype).to(memory_format=layout) for _ in range(2))
    inputs = [x.double(), x.to(device)]
    ys, gradients = [], []
    for layer, value in zip((native, ours), inputs, strict=True):
        value.requires_grad_()
        y = layer(value)
        ys.append(y)
        gradients.append(torch.autograd.grad(y, [value, *layer.parameters()], dy.to(y)))
    assert ys[1].dtype == dtype and ys[1].stride() == x.stride()
    pairs = zip((ys[1], *gradients[1]), (ys[0], *gradients[0]), strict=True)
    for name, (actual, exact) in zip(("y", "dx", "dweight", "dbias"), pairs, strict=True):
        # as on the CPU: sums in float32 of terms of both signs, relative to the largest result,
        # and the rounding of the result
        arithmetic = 64 * torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
        bound = exact.abs().max() * arithmetic + tolerances.half_ulp(exact, actual.dtype)
        assert_within(name, actual.cpu(), exact, bound)
    for name, buffer in ours.named_buffers():
        assert_within(name, buffer.cpu(), dict(native.named_buffers())[name], 1e-6)
    assert any("norm_kernel" in name for name in _kernels(lambda: ours(inputs[1])))


@every_norm_of_samples
def test_same_bits_of_samples_every_time(norm, device):
    layer = SAMPLES[norm](batchnorm_ext).to(device)
    x = torch.randn(8, 24, 56, 56, device=device)
    expected = copy.deepcopy(layer)(x)
    for _ in range(5):
        assert torch.equal(copy.deepcopy(layer)(x), expected)


@every_norm_of_samples
def test_dtype_of_samples_under_autocast(norm, device):
    x = torch.randn(2, 24, 8, 8, device=device).bfloat16()
    native, ours = SAMPLES[norm](nn).to(device), SAMPLES[norm](batchnorm_ext).to(device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert ours(x).dtype == native(x).dtype
