"""Several ranks compute what one process computes from their batches put together."""

import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

import batchnorm_ext
import tolerances
from batchnorm_ext import reference
from cases import LAYOUTS
from support import assert_bitwise, assert_within

CHANNELS = 5
SPREAD = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64)  # the std of each channel


def _precision(dtype, mean_over_std=1.0):
    """The error of what a layer computes, on its scale, however far from zero the channels are.

    float32: some ten roundings. float64: four times those of a normalized value, for gradients are
    made of several and steps of training add up.
    """
    if dtype is torch.float64:
        return 4 * tolerances.normalized(dtype, mean_over_std)
    return 3e-6


SPLITS = [
    (4,),
    (2, 2),
    (3, 1),
    (0, 3),
    (2, 2, 2),
    (1, 4, 2),
    (3, 0, 2),
    (2, 2, 2, 2),
    (1, 3, 0, 2),
]
INPUTS = [
    ((), "contiguous"),
    ((7,), "contiguous"),
    ((7,), "channels_last"),
    ((4, 3), "contiguous"),
    ((4, 3), "channels_last"),
    ((2, 3, 2), "contiguous"),
    ((2, 3, 2), "channels_last"),
]


def _parameters(layer, seed=1):
    """Weights and biases that every rank has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(CHANNELS, generator=generator, dtype=torch.float64))
    return layer


def _batches(split, size, mean_over_std, step, dtype=torch.float64, layout="contiguous"):
    """The batch and the gradient of each rank, the same wherever this is called."""
    generator = torch.Generator().manual_seed(step)
    for n in split:
        x, dy = torch.randn(2, n, CHANNELS, *size, generator=generator, dtype=torch.float64)
        x = (x + mean_over_std) * SPREAD.reshape(-1, *[1] * len(size))
        yield LAYOUTS[layout](x.to(dtype)), LAYOUTS[layout](dy.to(dtype))


def _oracle(whole, whole_dy, layer, state, centre):
    """The layer in one process. Nothing but the mean changes if the input moves by ``centre``,
    about which float64 computes a channel far from zero to its full precision."""
    state = dict(state)
    if "running_mean" in state:
        state["running_mean"] = state["running_mean"] - centre
    moved = whole.double() - centre.reshape(-1, *[1] * (whole.dim() - 2))
    wanted = reference.batch_norm(
        moved,
        layer.weight,
        layer.bias,
        **state,
        training=True,
        momentum=layer.momentum,
        eps=layer.eps,
    )
    gradients = reference.batch_norm_backward(whole_dy, moved, layer.weight, wanted.stats, True)
    if wanted.running_mean is not None:
        wanted = wanted._replace(running_mean=wanted.running_mean + centre)
    return wanted, gradients


def _close(name, actual, expected, precision, scale=None, roundings=1):
    """On the scale of the whole, and to the rounding of the dtype of the result."""
    if scale is None:
        scale = expected.abs().max().clamp(min=1).item() if expected.numel() else 1
    rounding = roundings * tolerances.half_ulp(expected, actual.dtype)
    assert_within(name, actual, expected, precision * scale + rounding)


def compare(split, size, layout, dtype, mean_over_std=1.0, group=None, **options):
    """Three steps of training on this rank against those of one process on all batches."""
    rank = dist.get_rank(group)
    precision = _precision(dtype, mean_over_std)
    param_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    layer = batchnorm_ext.SyncBatchNorm(CHANNELS, dtype=param_dtype, process_group=group, **options)
    _parameters(layer)
    state = {name: b.double().clone() for name, b in layer.named_buffers()}
    for step in range(3):
        batches = list(_batches(split, size, mean_over_std, step, dtype, layout))
        x, dy = batches[rank]
        x = x.requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)

        whole, whole_dy = (torch.cat(t) for t in zip(*batches, strict=True))
        wanted, gradients = _oracle(whole, whole_dy, layer, state, mean_over_std * SPREAD)
        assert y.dtype == dtype and x.grad.dtype == dtype
        assert y.stride() == torch.empty_like(x).stride(), "memory format of y"
        _close("y", y, wanted.y.split(split)[rank], precision)
        _close("dx", x.grad, gradients.dx.split(split)[rank], precision)
        if layer.track_running_stats:
            state = {name: getattr(wanted, name) for name in state}
            assert layer.num_batches_tracked == state["num_batches_tracked"]
            mean, var = state["running_mean"], state["running_var"]
            # each step rounds what is stored
            _close("running_mean", layer.running_mean, mean, precision, SPREAD.max(), step + 1)
            _close("running_var", layer.running_var, var, precision, roundings=step + 1)
        for name, parameter in layer.named_parameters():
            mean = parameter.grad.double()  # as DistributedDataParallel would make it
            dist.all_reduce(mean, group=group)
            expected = getattr(gradients, f"d{name}")
            _close(f"d{name}", mean / len(split), expected / len(split), precision)


@contextmanager
def naming(*case):
    """Puts the case in front of what is wrong with it."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from None


def compare_inputs(split, dtype):
    for size, layout in INPUTS:
        with naming(size, layout):
            compare(split, size, layout, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_ranks_are_one_batch(split, dtype, ranks):
    ranks(len(split)).run(compare_inputs, split, dtype)


def compare_far_from_zero(split, dtype):
    for mean_over_std in (0.0, 10.0, 1e3, 1e4, 1e5, 1e6, 1e7):
        for size, layout in INPUTS[1::3]:
            with naming(mean_over_std, size, layout):
                compare(split, size, layout, dtype, mean_over_std)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("split", [(5,), (3, 2), (1, 4, 2), (1, 3, 0, 8)], ids=str)
def test_channels_far_from_zero(split, dtype, ranks):
    """As precise as the local layer, which the one rank is: y was off by 1e-4 at 1e6."""
    ranks(len(split)).run(compare_far_from_zero, split, dtype)


OPTIONS = [
    {"affine": False},
    {"momentum": None},
    {"momentum": 0.0},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"eps": 0.1},
]


def compare_options(options):
    compare((3, 1), (4, 3), "contiguous", torch.float32, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, ranks):
    ranks(2).run(compare_options, options)


def check_all_empty():
    for affine, dtype in itertools.product([True, False], [torch.float32, torch.bfloat16]):
        layer = batchnorm_ext.SyncBatchNorm(CHANNELS, affine=affine)
        x = torch.empty(0, CHANNELS, 4, 3, dtype=dtype, requires_grad=True)
        before = {k: v.clone() for k, v in layer.named_buffers()}
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.shape == x.grad.shape
        for name, buffer in layer.named_buffers():
            assert_bitwise(name, buffer, before[name])
        for parameter in layer.parameters():
            assert_bitwise("gradient", parameter.grad, torch.zeros(CHANNELS))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_ranks_empty(size, ranks):
    ranks(size).run(check_all_empty)


def check_one_element():
    layer = batchnorm_ext.SyncBatchNorm(CHANNELS)
    x = torch.full((1 - dist.get_rank(), CHANNELS), 3.0)
    y = layer(x)
    assert_bitwise("y", y, torch.zeros_like(x))
    torch.testing.assert_close(layer.running_mean, torch.full((CHANNELS,), 0.3))
    assert_bitwise("running_var", layer.running_var, torch.ones(CHANNELS))
    assert layer.num_batches_tracked == 1


def test_one_element_on_all_ranks_together(ranks):
    """It has no unbiased variance."""
    ranks(2).run(check_one_element)


def check_mixed_dtypes(dtypes, split):
    """float32 layers, inputs of several dtypes."""
    rank = dist.get_rank()
    x, dy = zip(*_batches(split, (4, 3), 1.0, 0), strict=True)
    x = [a.to(d) for a, d in zip(x, dtypes, strict=True)]
    dy = [a.to(d) for a, d in zip(dy, dtypes, strict=True)]
    layer = _parameters(batchnorm_ext.SyncBatchNorm(CHANNELS))
    own = x[rank].clone().requires_grad_()
    y = layer(own)
    y.backward(dy[rank])
    whole = torch.cat([a.double() for a in x])
    wanted = reference.batch_norm(whole, layer.weight, layer.bias, training=True)
    gradients = reference.batch_norm_backward(
        torch.cat([a.double() for a in dy]), whole, layer.weight, wanted.stats, True
    )
    assert y.dtype == own.grad.dtype == dtypes[rank]
    _close("y", y, wanted.y.split(split)[rank], 3e-6)
    _close("dx", own.grad, gradients.dx.split(split)[rank], 3e-6)


@pytest.mark.parametrize("split", [(3, 2), (3, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16, torch.float64])
def test_ranks_of_different_dtypes(other, split, ranks):
    ranks(2).run(check_mixed_dtypes, (torch.float32, other), split)


def check_two_groups():
    """Pairs of ranks and all ranks, at the same time."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    compare((3, 1), (4, 3), "contiguous", torch.float32, group=pairs[dist.get_rank() // 2])
    first = batchnorm_ext.SyncBatchNorm(CHANNELS, process_group=pairs[dist.get_rank() // 2])
    second = batchnorm_ext.SyncBatchNorm(CHANNELS)
    x = [x for x, _ in _batches((1, 2, 3, 4), (4, 3), 1.0, 0)]
    y = second(first(x[dist.get_rank()].float()))
    halves = [
        reference.batch_norm(torch.cat(half).float(), training=True).y for half in (x[:2], x[2:])
    ]
    wanted = reference.batch_norm(torch.cat(halves), training=True).y
    # two layers, one after the other
    _close("y", y, wanted.split((1, 2, 3, 4))[dist.get_rank()], 2 * 3e-6)
    for pair in pairs:
        if pair != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(pair)


def test_two_process_groups_at_once(ranks):
    ranks(4).run(check_two_groups)


def check_frozen():
    """Parameters that want no gradient; then the whole layer, in evaluation."""
    rank = dist.get_rank()
    batches = list(_batches((3, 1), (4, 3), 1.0, 0, torch.float32))
    x, dy = batches[rank]
    layer = _parameters(batchnorm_ext.SyncBatchNorm(CHANNELS)).requires_grad_(False)
    layer(x.requires_grad_()).backward(dy)
    whole, whole_dy = (torch.cat(t) for t in zip(*batches, strict=True))
    wanted = reference.batch_norm(whole, layer.weight, layer.bias, training=True)
    gradients = reference.batch_norm_backward(whole_dy, whole, layer.weight, wanted.stats, True)
    _close("dx", x.grad, gradients.dx.split((3, 1))[rank], 3e-6)
    assert layer.weight.grad is None and layer.bias.grad is None

    layer.eval().requires_grad_(True)
    twin = _parameters(batchnorm_ext.BatchNorm2d(CHANNELS)).eval()
    twin.load_state_dict(layer.state_dict())
    results = []
    for module in (layer, twin):
        leaf = x.detach().clone().requires_grad_()
        y = module(leaf)
        y.backward(dy)
        results.append((y, leaf.grad, module.weight.grad, module.bias.grad))
    for name, ours, plain in zip(["y", "dx", "dweight", "dbias"], *results, strict=True):
        assert_bitwise(name, ours, plain)


def test_frozen(ranks):
    ranks(2).run(check_frozen)


def test_without_process_group_it_is_batch_norm():
    for training in (True, False):
        layer = _parameters(batchnorm_ext.SyncBatchNorm(CHANNELS)).train(training)
        twin = _parameters(batchnorm_ext.BatchNorm2d(CHANNELS)).train(training)
        ((x, dy),) = _batches((4,), (4, 3), 1.0, 0, torch.float32)
        results = []
        for module in (layer, twin):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(dy)
            gradients = [p.grad for p in module.parameters()]
            results.append([y, leaf.grad, *gradients, *module.buffers()])
        for ours, plain in zip(*results, strict=True):
            assert_bitwise("result", ours, plain)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batchnorm_ext.SyncBatchNorm(CHANNELS)(torch.randn(1, CHANNELS))


@pytest.mark.parametrize("size", [(CHANNELS,), (1, CHANNELS, 2, 2, 2, 2)], ids=len)
def test_number_of_dimensions(size):
    with pytest.raises(ValueError, match=f"2D to 5D input .got {len(size)}D"):
        batchnorm_ext.SyncBatchNorm(CHANNELS)(torch.randn(size))
