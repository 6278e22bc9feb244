"""Several ranks compute what one process computes from their batches put together."""

import pytest
import torch
import torch.distributed as dist

import batchnorm_ext
from batchnorm_ext import reference
from sync_problems import (
    CHANNELS,
    SPREAD,
    assert_close,
    make_batches,
    naming,
    precision_of,
    with_parameters,
)

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
    ((2, 1, 2, 3), "contiguous"),
]


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


def compare(split, size, layout, dtype, mean_over_std=1.0, group=None, **options):
    """Three steps of training on this rank against those of one process on all batches."""
    rank = dist.get_rank(group)
    precision = precision_of(dtype, mean_over_std)
    param_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    layer = batchnorm_ext.SyncBatchNorm(CHANNELS, dtype=param_dtype, process_group=group, **options)
    with_parameters(layer)
    state = {name: b.double().clone() for name, b in layer.named_buffers()}
    for step in range(3):
        batches = list(make_batches(split, size, mean_over_std, step, dtype, layout))
        x, dy = batches[rank]
        x = x.requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)

        whole, whole_dy = (torch.cat(t) for t in zip(*batches, strict=True))
        wanted, gradients = _oracle(whole, whole_dy, layer, state, mean_over_std * SPREAD)
        assert y.dtype == dtype and x.grad.dtype == dtype
        assert y.stride() == torch.empty_like(x).stride(), "memory format of y"
        assert_close("y", y, wanted.y.split(split)[rank], precision)
        assert_close("dx", x.grad, gradients.dx.split(split)[rank], precision)
        if layer.track_running_stats:
            state = {name: getattr(wanted, name) for name in state}
            assert layer.num_batches_tracked == state["num_batches_tracked"]
            mean, var = state["running_mean"], state["running_var"]
            # each step rounds what is stored
            assert_close(
                "running_mean", layer.running_mean, mean, precision, SPREAD.max(), step + 1
            )
            assert_close("running_var", layer.running_var, var, precision, roundings=step + 1)
        for name, parameter in layer.named_parameters():
            mean = parameter.grad.double()  # as DistributedDataParallel would make it
            dist.all_reduce(mean, group=group)
            expected = getattr(gradients, f"d{name}")
            assert_close(f"d{name}", mean / len(split), expected / len(split), precision)


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


def check_mixed_dtypes(dtypes, split):
    """float32 layers, inputs of several dtypes."""
    rank = dist.get_rank()
    x, dy = zip(*make_batches(split, (4, 3), 1.0, 0), strict=True)
    x = [a.to(d) for a, d in zip(x, dtypes, strict=True)]
    dy = [a.to(d) for a, d in zip(dy, dtypes, strict=True)]
    layer = with_parameters(batchnorm_ext.SyncBatchNorm(CHANNELS))
    own = x[rank].clone().requires_grad_()
    y = layer(own)
    y.backward(dy[rank])
    whole = torch.cat([a.double() for a in x])
    wanted = reference.batch_norm(whole, layer.weight, layer.bias, training=True)
    gradients = reference.batch_norm_backward(
        torch.cat([a.double() for a in dy]), whole, layer.weight, wanted.stats, True
    )
    assert y.dtype == own.grad.dtype == dtypes[rank]
    assert_close("y", y, wanted.y.split(split)[rank], 3e-6)
    assert_close("dx", own.grad, gradients.dx.split(split)[rank], 3e-6)


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
    x = [x for x, _ in make_batches((1, 2, 3, 4), (4, 3), 1.0, 0)]
    y = second(first(x[dist.get_rank()].float()))
    halves = [
        reference.batch_norm(torch.cat(half).float(), training=True).y for half in (x[:2], x[2:])
    ]
    wanted = reference.batch_norm(torch.cat(halves), training=True).y
    # two layers, one after the other
    assert_close("y", y, wanted.split((1, 2, 3, 4))[dist.get_rank()], 2 * 3e-6)
    for pair in pairs:
        if pair != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(pair)


def test_two_process_groups_at_once(ranks):
    ranks(4).run(check_two_groups)
