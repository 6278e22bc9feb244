"""The debug mode of SyncBatchNorm: what ranks tell each other before a message."""

import gc
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm_ext
from batchnorm_ext import sync, sync_debug
from test_sync_messages import C, assert_unchanged, error, impatient_group, state

TIMEOUT = 1.0  # after which a rank counts as dead in these tests


@contextmanager
def _debugging(**timeout):
    """The group of all ranks with debugging on."""
    sync._DEBUG = True
    sync_debug.HEARTBEAT_TIMEOUT, sync_debug.HEARTBEAT_INTERVAL = TIMEOUT, TIMEOUT / 10
    try:
        yield impatient_group(**timeout)
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
        with error("rank 0: forward of 0", "rank 1: forward of 1"):
            first(torch.randn(4, C))


def debug_channels():
    rank = dist.get_rank()
    with _debugging() as group:
        (layer,) = _norms(group, [C + rank])
        before = state(layer)
        with error("rank 0: forward of 0 with 3 channels", "rank 1: forward of 0 with 4 channels"):
            layer(torch.randn(4, C + rank))
        assert_unchanged(layer, before)


def debug_missing():
    with _debugging() as group:
        model = _norms(group)
        x = torch.randn(4, C, requires_grad=True)
        y = model[0](x)
        if dist.get_rank() == 0:
            with error("SyncBatchNorm 1: rank 1 has not arrived", "of rank 1: forward of 0"):
                model[1](x)
    with _debugging() as group:
        model = _norms(group)
        y = model(x)
        if dist.get_rank() == 1:
            with error("SyncBatchNorm 1: rank 0 has not arrived", "backward of 1", "forward of 1"):
                y.sum().backward()


def debug_gradient():
    """What wants no gradient sends no message in the backward, where the others would hang."""
    rank = dist.get_rank()
    with _debugging() as group:
        (layer,) = _norms(group, [C])
        before = state(layer)
        alone = "rank 1: forward of 0 with 3 channels and no message in the backward"
        with error("rank 0: forward of 0 with 3 channels; ", alone):
            layer(torch.randn(4, C, requires_grad=rank == 0))
        assert_unchanged(layer, before)
    with _debugging() as group:
        (layer,) = _norms(group, [C])
        with error("no message in the backward; rank 1: forward of 0 with 3 channels"):
            with torch.set_grad_enabled(rank == 1):
                layer(torch.randn(4, C, requires_grad=True))


@pytest.mark.parametrize(
    "function", [debug_right, debug_order, debug_channels, debug_missing, debug_gradient]
)
def test_debug_mode(function, ranks):
    ranks(2).run(function)


def debug_dead():
    """Is noticed long before the timeout, also of a rank that others wait for."""
    with _debugging(timeout=timedelta(seconds=100)) as group:
        model = _norms(group)
        x = model[0](torch.randn(4, C))
        if dist.get_rank() == 2:
            os._exit(1)
        with error("SyncBatchNorm 1: rank 2", "no heartbeat", "of rank 2: forward of 0"):
            model[1](x)


def test_dead_rank_is_noticed_within_seconds(ranks):
    ranks(3).run(debug_dead, dying=(2,))


def debug_slow():
    """A rank that computes is waited for, whether Python runs meanwhile or the operators."""
    with _debugging(timeout=timedelta(seconds=100)) as group:
        model = _norms(group)
        x = model[0](torch.randn(4, C))
        if dist.get_rank() == 1:
            end = time.monotonic() + 2 * TIMEOUT
            while time.monotonic() < end:
                pass
            time.sleep(2 * TIMEOUT)
        elif dist.get_rank() == 2:
            matrix = torch.randn(1000, 1000)
            end = time.monotonic() + 3 * TIMEOUT
            while time.monotonic() < end:
                matrix = torch.linalg.qr(matrix).Q
        assert model[1](x).isfinite().all()


def test_slow_rank_is_not_dead(ranks):
    ranks(3).run(debug_slow)


class Group:
    """As much of a process group of one as the debug mode needs."""

    def __init__(self, store):
        self.store = store

    def rank(self):
        return 0

    def size(self):
        return 1

    def get_group_store(self):
        return self.store


def test_store_that_has_gone():
    """It ends with the rank that keeps it."""
    group = Group(dist.TCPStore("127.0.0.1", 0, 1, is_master=True))
    sync_debug.compare(group, "stem", "forward of stem", timedelta(seconds=5))
    group.store = None
    with pytest.raises(RuntimeError, match="stem: the store of the process group does not answer"):
        sync_debug.compare(group, "stem", "forward of stem", timedelta(seconds=5))


def test_heartbeats_end_with_the_group():
    before = threading.active_count()
    group = Group(dist.HashStore())
    sync_debug.compare(group, "stem", "forward of stem", timedelta(seconds=5))
    assert threading.active_count() == before + 1
    del group
    gc.collect()
    assert threading.active_count() == before


def test_process_ends_while_it_sends_heartbeats():
    """A thread that comes back from the store after the interpreter has gone ends in an abort."""
    code = """
from datetime import timedelta
import torch.distributed as dist
from batchnorm_ext import sync_debug
sync_debug.HEARTBEAT_INTERVAL = 1e-6
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sync_debug.compare(dist.group.WORLD, "stem", "forward of stem", timedelta(seconds=5))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "")


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
