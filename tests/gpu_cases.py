"""What the tests of a GPU run on: cases, launch plans, and the step that they repeat."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cases import Case
from support import assert_bitwise, batch_norm_backward

OUTPUTS = ["y", "stats", "dx", "dweight", "dbias"]
# Rows and columns, odd sizes, packs of one element, few and many channels, more than one group.
SHORT = [
    Case((8, 17, 7, 7), dtype=torch.bfloat16),
    Case((8, 16, 14, 14), "channels_last"),
    Case((5, 3, 31, 33)),
    Case((64, 130), dtype=torch.float16),
    Case((4, 24, 28, 28), dtype=torch.float64),
    Case((16, 64, 28, 28), "channels_last", torch.bfloat16),
]
# Some of which a GPU of today keeps on chip with many blocks a group.
LARGER = [
    *SHORT,
    Case((32, 64, 56, 56), dtype=torch.bfloat16),
    Case((32, 64, 56, 56), "channels_last", torch.bfloat16),
    Case((16, 8, 128, 128)),
    Case((20000, 64), momentum=None),
]
PLANS = ["", "policy=block", "policy=grid,ranks=2", "policy=grid,ranks=7,relay=1", "policy=split"]

every_plan = pytest.mark.parametrize("plan", PLANS, indirect=True, ids=lambda p: p or "rules")


def step(problem):
    """A forward and a backward in training, without autograd."""
    y, stats = problem.forward(training=True)
    arguments = problem.dy, problem.x, problem.weight, stats, True, [True] * 3
    return y, stats, *batch_norm_backward(*arguments)


def assert_same(actual, expected):
    for name, a, b in zip(OUTPUTS, actual, expected, strict=True):
        assert_bitwise(name, a, b)


def kernels_of(call):
    """The names of the kernels that a call launches."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    is_kernel = torch.autograd.DeviceType.CUDA
    return [event.name for event in profiler.events() if event.device_type == is_kernel]
