"""What SyncBatchNorm sends to other ranks, and what comes of ranks that don't."""

import os
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import batchnorm_ext
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


def counting_group(ranks):
    """A group whose messages are counted; any collective but all-reduce is an error there."""
    groups = []

    def make(store, rank, size, timeout):
        groups.append(Counting(dist.ProcessGroupGloo(store, rank, size, timeout)))
        return groups[0]

    if not hasattr(dist.Backend, "COUNTING"):
        dist.Backend.register_backend(
            "counting", lambda *a: counting_group.make(*a), devices=["cpu"]
        )
    counting_group.make = make
    dist.new_group(ranks, backend="counting")
    return groups[0] if groups else None


def count_messages():
    group = counting_group([0, 1])
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
    y = layer(x)
    torch.autograd.grad(y.sum(), x, create_graph=True)
    expect(forward, *[(C, torch.float64)] * 2, backward)
    layer(torch.randn(4, C)).sum().backward(create_graph=True)  # of the parameters alone
    expect(forward)
    layer.eval()(x).sum().backward()
    expect()

    group = counting_group([dist.get_rank()] if dist.get_rank() == 0 else [0])
    if group is not None:  # a group of one
        layer = batchnorm_ext.SyncBatchNorm(C, process_group=group)
        layer(x).sum().backward()
        expect()


def test_one_message_forward_and_one_backward(ranks):
    ranks(2).run(count_messages)


def state(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_unchanged(layer, before):
    for name, buffer in layer.named_buffers():
        assert_bitwise(name, buffer, before[name])


@contextmanager
def error(*words, kind=RuntimeError):
    """An error that names all of this comes, and comes in time."""
    start = time.monotonic()
    with pytest.raises(kind) as raised:
        yield
    assert time.monotonic() - start < PATIENCE.total_seconds() + 5
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"


def impatient_group(timeout=PATIENCE):
    """All ranks, once all are here."""
    dist.barrier()
    return dist.new_group(timeout=timeout)


def one_rank_raises():
    """It does not get to the forward, then not to the backward."""
    group = impatient_group()
    layer = batchnorm_ext.SyncBatchNorm(C, process_group=group)
    layer._batchnorm_ext_name = "stem.norm"
    before = state(layer)
    if dist.get_rank() == 0:
        with error("stem.norm", "rank 0 of 2", "(4, 3, 2)", "imed out"):
            layer(torch.randn(4, C, 2))
        assert_unchanged(layer, before)

    group = impatient_group()
    layer.process_group = group
    y = layer(torch.randn(4, C, 2, requires_grad=True))
    after = state(layer)
    if dist.get_rank() == 0:
        with error("in the backward of", "stem.norm", "rank 0 of 2", "(4, 3, 2)", "imed out"):
            y.sum().backward()
        assert layer.weight.grad is None
        assert_unchanged(layer, after)


def test_rank_that_raises(ranks):
    ranks(2).run(one_rank_raises)


def one_rank_dies():
    # gloo tells its neighbours, and lets those wait until the timeout who wait for these
    layer = batchnorm_ext.SyncBatchNorm(C, process_group=impatient_group())
    before = state(layer)
    if dist.get_rank() == 2:
        os._exit(1)
    with error("SyncBatchNorm", f"rank {dist.get_rank()} of 3"):
        layer(torch.randn(4, C))
    assert_unchanged(layer, before)


def test_rank_that_dies(ranks):
    ranks(3).run(one_rank_dies, dying=(2,))


def bad_groups():
    rank = dist.get_rank()
    only_first = dist.new_group([0])
    layer = batchnorm_ext.SyncBatchNorm(C, process_group=only_first)
    layer._batchnorm_ext_name = "head"
    if rank == 1:
        with error("head", "rank 1 is not in the process group", kind=ValueError):
            layer(torch.randn(4, C))
    both = dist.new_group([0, 1])
    dist.destroy_process_group(both)
    layer.process_group = both
    before = state(layer)
    with error("head", f"rank {rank} of 2", "process group"):
        layer(torch.randn(4, C))
    assert_unchanged(layer, before)


def test_group_without_this_rank_and_destroyed_group(ranks):
    ranks(2).run(bad_groups)


def bad_input():
    """Is told before the other ranks are: they are not left waiting for this one."""
    group = counting_group([0, 1])
    layer = batchnorm_ext.SyncBatchNorm(C, process_group=group)
    layer._batchnorm_ext_name = "head"
    before = state(layer)
    with error("head", "(4, 5)", "3", "5"):
        layer(torch.randn(4, 5))
    with error("head", "sparse", kind=NotImplementedError):
        layer(torch.randn(4, C).to_sparse())
    with error("head", "int64", kind=NotImplementedError):
        layer(torch.ones(4, C, dtype=torch.int64))
    with error("head", "torch.func", kind=NotImplementedError):
        torch.func.vmap(layer)(torch.randn(2, 4, C))
    with torch.inference_mode():
        x = torch.randn(4, C)
    with error("head", "Inference tensors cannot be saved", kind=NotImplementedError):
        layer(x)
    layer.running_var = torch.ones(1).expand(C)
    before = state(layer)
    with error("head", "single memory location"):
        layer(torch.randn(4, C))
    layer.running_var = torch.ones(C)
    assert_unchanged(layer, before)
    before = state(layer.double())
    with error("head", "float32", "Double"):
        layer(torch.randn(4, C))
    assert not group.messages
    assert_unchanged(layer, before)


def test_bad_input(ranks):
    ranks(2).run(bad_input)


def count_batches():
    """The version of the counter rises with it, so that autograd notices a later use."""
    layer, local = batchnorm_ext.SyncBatchNorm(C), batchnorm_ext.BatchNorm1d(C)
    x = torch.randn(4, C, requires_grad=True)
    for module in (layer, local):
        module(x)
    assert layer.num_batches_tracked._version == local.num_batches_tracked._version == 2
    with torch.inference_mode():
        layer = batchnorm_ext.SyncBatchNorm(C, affine=False)
    before = state(layer)
    with error("Inplace update to inference tensor"):
        layer(x)
    assert_unchanged(layer, before)


def test_counter_is_written_like_any_other_tensor(ranks):
    ranks(2).run(count_batches)
