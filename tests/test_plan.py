"""The launch plans of the CUDA kernels, as the host would compute them: traffic and limits."""

from itertools import product

import pytest

from plan import GPUS, KERNELS, Request, plans

LEAST = {"forward": 2.0, "backward": 3.0, "eval": 2.0}  # each tensor once
BLOCKS_PER_SM = 3

SHAPES = [
    *product([1, 32, 256], [3, 64, 256, 2048], [56], [56]),
    *product([2, 32, 256], [64, 512, 2048], [7, 14], [7]),
    *[(256, 64, 112, 112), (16, 64, 256, 256), (32, 64), (4096, 1000), (1 << 20, 3), (1, 5, 99)],
]
REQUESTS = [
    Request(shape, layout, element_bytes, what)
    for shape in SHAPES
    for layout in ("nchw", "nhwc")
    for element_bytes in (2, 4, 8)
    for what in KERNELS
]
every_gpu = pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))


@every_gpu
def test_traffic_is_the_least_where_the_tensor_is_kept(gpu):
    """Two passes forward and three backward; of a group larger than the chip some is read again."""
    for request, plan in zip(REQUESTS, plans(REQUESTS, gpu), strict=True):
        least, inputs = LEAST[request.what], KERNELS[request.what][0]
        if plan.rule == "group exceeds the chip":
            assert least < plan.passes < least + inputs, (request, plan)
        else:
            assert plan.passes == least, (request, plan)
        assert plan.bytes == pytest.approx(plan.passes * plan.elements * request.element_bytes)


@every_gpu
def test_a_larger_group_is_kept_as_far_as_it_goes(gpu):
    """What is not read again fills at least half of all shared memory."""
    pairs = zip(REQUESTS, plans(REQUESTS, gpu), strict=True)
    larger = [(r, plan) for r, plan in pairs if plan.rule == "group exceeds the chip"]
    assert {request.what for request, _ in larger} == {"forward", "backward"}
    for request, plan in larger:
        inputs = KERNELS[request.what][0]
        groups = -(-request.shape[1] // plan.width)
        kept = (LEAST[request.what] + inputs - plan.passes) * plan.elements / groups
        room = gpu.sms * (gpu.shared_per_sm << 10)
        assert kept * request.element_bytes > 0.5 * room, (request, plan)


@every_gpu
def test_policies_in_the_table(gpu):
    assert {plan.policy for plan in plans(REQUESTS, gpu)} == {"block", "grid", "map"}


@every_gpu
def test_limits_of_the_chip(gpu):
    """Three blocks share the memory of a multiprocessor; those of GRID are all there at once."""
    for plan in plans(REQUESTS, gpu):
        assert plan.shared_bytes <= (gpu.shared_per_sm << 10) / BLOCKS_PER_SM - 1024, plan
        assert plan.blocks < 2**31 and plan.ranks * plan.teams == plan.blocks
        if plan.policy == "grid":
            assert plan.blocks <= BLOCKS_PER_SM * gpu.sms, plan


def test_known_plan():
    """A channel of 4 MiB takes 55 blocks of 75 KiB, or more: the rest of 396 then has no team."""
    request = Request((16, 64, 256, 256), "nchw", 4, "forward")
    (plan,) = plans([request], GPUS["h200"])
    assert (plan.pattern, plan.policy, plan.pack) == ("row", "grid", 4)
    assert 55 <= plan.ranks <= 66 and plan.teams == 396 // plan.ranks
    assert plan.loaded == plan.stored == 16 * 64 * 256 * 256


def test_override():
    request = Request((32, 64, 28, 28), "nhwc", 2, "backward")
    usual, split, narrow = (
        plans([request], GPUS["h200"], override)[0] for override in ("", "policy=split", "width=32")
    )
    assert (usual.policy, usual.passes, usual.width) == ("grid", 3.0, 64)
    assert (split.policy, split.passes, split.rule) == ("split", 5.0, "override")
    assert narrow.width == 32
