"""What SyncBatchNorm sends to other ranks, and what comes of ranks that don't."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm_ext
from batchnorm_ext import sync
from support import assert_bitwise

C = 3
PATIENCE = timedelta(seconds=2)


class Counting(dist.ProcessGroup):
    """Gloo, and a list of what was asked of it."""

    def __init__(self, gloo):
        super().__init__(gloo.rank(), gloo.size())
        self.gloo = gloo
        self.messages = []

    def allreduce(self, tensors, options=None):
        self.messages += [(t.numel(), t.dtype) for t in tensors]
        return self.gloo.allreduce(tensors, options)

    def _set_group_name(self, name):
        self._name = name

    @property
    def group_name(self):
        return self._name

    def getBackendName(self):
        return "counting"


def _counting_group(ranks):
    """A group whose messages are counted; any collective but all-reduce is an error there."""
    groups = []

    def make(store, rank, size, timeout):
        groups.append(Counting(dist.ProcessGroupGloo(store, rank, size, timeout)))
        return groups[0]

    if not hasattr(dist.Backend, "COUNTING"):
        dist.Backend.register_backend(
            "counting", lambda *a: _counting_group.make(*a), devices=["cpu"]
        )
    _counting_group.make = make
    dist.new_group(ranks, backend="counting")
    return groups[0] if groups else None


def count_messages():
    group = _counting_group([0, 1])
    layer = batchnorm_ext.SyncBatchNorm(C, process_group=group)
    forward, backward = (4 * C + 1, torch.float64), (2 * C, torch.float64)

    def expect(*messages):
        assert group.messages == [*messages]
        group.messages.clear()

    for dtype in (torch.float32, torch.bfloat16):
        y = layer(torch.randn(4, C, 2, dtype=dtype, requires_grad=True))
        expect(forward)
        y.sum().backward()
        expect(backward)
    with torch.no_grad():
        layer(torch.randn(4, C))
    expect(forward)
    layer(torch.randn(4, C)).sum().backward()  # the gradients of the parameters are local
    expect(forward)
    x = torch.randn(4, C, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    expect(forward, forward, backward)
    layer.eval()(x).sum().backward()
    expect()

    group = _counting_group([dist.get_rank()] if dist.get_rank() == 0 else [0])
    if group is not None:  # a group of one
        layer = batchnorm_ext.SyncBatchNorm(C, process_group=group)
        layer(x).sum().backward()
        expect()


def test_one_message_forward_and_one_backward(ranks):
    ranks(2).run(count_messages)


def _state(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def _assert_unchanged(layer, before):
    for name, buffer in layer.named_buffers():
        assert_bitwise(name, buffer, before[name])


@contextmanager
def _error(*words, error=RuntimeError):
    """An error that names all of this comes, and comes in time."""
    start = time.monotonic()
    with pytest.raises(error) as raised:
        yield
    assert time.monotonic() - start < PATIENCE.total_seconds() + 5
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"


def _impatient_group():
    """All ranks, once all are here."""
    dist.barrier()
    return dist.new_group(timeout=PATIENCE)


def one_rank_raises():
    """It does not get to the forward, then not to the backward."""
    group = _impatient_group()
    layer = batchnorm_ext.SyncBatchNorm(C, process_group=group)
    layer.name = "stem.norm"
    before = _state(layer)
    if dist.get_rank() == 0:
        with _error("stem.norm", "rank 0 of 2", "(4, 3, 2)", "imed out"):
            layer(torch.randn(4, C, 2))
        _assert_unchanged(layer, before)

    group = _impatient_group()
    layer.process_group = group
    y = layer(torch.randn(4, C, 2, requires_grad=True))
    after = _state(layer)
    if dist.get_rank() == 0:
        with _error("imed out"):
            y.sum().backward()
        assert layer.weight.grad is None
        _assert_unchanged(layer, after)


def test_rank_that_raises(ranks):
    ranks(2).run(one_rank_raises)


def one_rank_dies():
    layer = batchnorm_ext.SyncBatchNorm(C)
    before = _state(layer)
    if dist.get_rank() == 2:
        os._exit(1)
    with _error("SyncBatchNorm", f"rank {dist.get_rank()} of 3"):
        layer(torch.randn(4, C))
    _assert_unchanged(layer, before)


def test_rank_that_dies(ranks):
    ranks(3).run(one_rank_dies, dying=(2,))


def bad_groups():
    rank = dist.get_rank()
    only_first = dist.new_group([0])
    layer = batchnorm_ext.SyncBatchNorm(C, process_group=only_first)
    layer.name = "head"
    if rank == 1:
        with _error("head", "rank 1 is not in the process group", error=ValueError):
            layer(torch.randn(4, C))
    both = dist.new_group([0, 1])
    dist.destroy_process_group(both)
    layer.process_group = both
    before = _state(layer)
    with _error("head", f"rank {rank} of 2", "process group"):
        layer(torch.randn(4, C))
    _assert_unchanged(layer, before)


def test_group_without_this_rank_and_destroyed_group(ranks):
    ranks(2).run(bad_groups)


def bad_input():
    """Is told before the other ranks are: they are not left waiting for this one."""
    group = _counting_group([0, 1])
    layer = batchnorm_ext.SyncBatchNorm(C, process_group=group)
    layer.name = "head"
    before = _state(layer)
    with _error("head", "(4, 5)", "3", "5"):
        layer(torch.randn(4, 5))
    with _error("head", "sparse", error=NotImplementedError):
        layer(torch.randn(4, C).to_sparse())
    with _error("head", "Long", error=NotImplementedError):
        layer(torch.ones(4, C, dtype=torch.int64))
    with _error("head", "torch.func", error=NotImplementedError):
        torch.func.vmap(layer)(torch.randn(2, 4, C))
    _assert_unchanged(layer, before)
    before = _state(layer.double())
    with _error("head", "float32", "Double"):
        layer(torch.randn(4, C))
    assert not group.messages
    _assert_unchanged(layer, before)


def test_bad_input(ranks):
    ranks(2).run(bad_input)


@contextmanager
def _debugging():
    """The group of all ranks with debugging on."""
    sync._DEBUG = True
    try:
        yield _impatient_group()
    finally:
        sync._DEBUG = False


def _norms(group, channels=(C, C)):
    model = nn.Sequential(*map(nn.BatchNorm1d, channels))
    return batchnorm_ext.convert_sync_batchnorm(model, group)


def debug_right():
    """Nothing is in the way of what is right, over many messages, of two dtypes, one rank empty."""
    with _debugging() as group:
        model = _norms(group)
        dtype = torch.bfloat16 if dist.get_rank() else torch.float32
        for count in (4, 4 * dist.get_rank(), 4 * (1 - dist.get_rank())):
            x = torch.randn(count, C, dtype=dtype, requires_grad=True)
            model(x).sum().backward()
        assert model[1].num_batches_tracked == 3
        sizes = []
        for _ in range(2):
            model(x).sum().backward()
            dist.barrier()
            sizes.append(group.get_group_store().num_keys())
            dist.barrier()
        assert sizes[0] == sizes[1], "notes are left in the store"


def debug_order():
    with _debugging() as group:
        model = _norms(group)
        first, second = model if dist.get_rank() == 0 else reversed(model)
        with _error("rank 0: forward of 0", "rank 1: forward of 1"):
            first(torch.randn(4, C))


def debug_channels():
    rank = dist.get_rank()
    with _debugging() as group:
        (layer,) = _norms(group, [C + rank])
        before = _state(layer)
        with _error("rank 0: forward of 0 with 3 channels", "rank 1: forward of 0 with 4 channels"):
            layer(torch.randn(4, C + rank))
        _assert_unchanged(layer, before)


def debug_missing():
    with _debugging() as group:
        model = _norms(group)
        x = torch.randn(4, C, requires_grad=True)
        y = model[0](x)
        if dist.get_rank() == 0:
            with _error("SyncBatchNorm 1: rank 1 has not come", "it was last at: forward of 0"):
                model[1](x)
    with _debugging() as group:
        model = _norms(group)
        y = model(x)
        if dist.get_rank() == 1:
            with _error("SyncBatchNorm 1: rank 0 has not come", "backward of 1", "forward of 1"):
                y.sum().backward()


@pytest.mark.parametrize("function", [debug_right, debug_order, debug_channels, debug_missing])
def test_debug_mode(function, ranks):
    ranks(2).run(function)


@pytest.mark.parametrize("value, expected", [("1", "True"), ("0", "False"), (None, "False")])
def test_variable_of_debug_mode(value, expected):
    environment = {k: v for k, v in os.environ.items() if k != "BATCHNORM_EXT_SYNC_DEBUG"}
    if value is not None:
        environment["BATCHNORM_EXT_SYNC_DEBUG"] = value
    code = "from batchnorm_ext import sync; print(sync._DEBUG)"
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == expected
