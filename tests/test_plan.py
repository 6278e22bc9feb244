"""The launch plans of the CUDA kernels, as the host would compute them: traffic and limits."""

import re
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
    """What is not read again fills a quarter of all shared memory; of 256 channels the sums take a
    large part of the rest."""
    pairs = zip(REQUESTS, plans(REQUESTS, gpu), strict=True)
    larger = [(r, plan) for r, plan in pairs if plan.rule == "group exceeds the chip"]
    assert {request.what for request, _ in larger} == {"forward", "backward"}
    for request, plan in larger:
        inputs = KERNELS[request.what][0]
        groups = -(-request.shape[1] // plan.width)
        kept = (LEAST[request.what] + inputs - plan.passes) * plan.elements / groups
        room = gpu.sms * (gpu.shared_per_sm << 10)
        assert kept * request.element_bytes > 0.25 * room, (request, plan)


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


OVERRIDDEN = Request((32, 64, 28, 28), "nhwc", 2, "backward")


def test_override():
    usual, split, narrow = (
        plans([OVERRIDDEN], GPUS["h200"], override)[0]
        for override in ("", "policy=split", "width=32")
    )
    assert (usual.policy, usual.passes, usual.width) == ("grid", 3.0, 64)
    assert (split.policy, split.passes, split.rule) == ("split", 5.0, "override")
    assert narrow.width == 32


def test_override_of_every_key():
    """Of 132 multiprocessors 100 are left to others; 12 teams of 8 fill the rest three times."""
    override = "margin=100,relay=255,ranks=8,width=32,policy=grid"
    large = Request((256, 2048, 28, 28), "nhwc", 2, "forward")
    (plan,) = plans([large], GPUS["h200"], override)
    assert (plan.policy, plan.rule, plan.width, plan.relay) == ("grid", "override", 32, 1)
    assert (plan.ranks, plan.teams) == (8, 12)
    (plan,) = plans([large], GPUS["h200"], override.replace("255", "256"))
    assert plan.relay == 0


def test_policy_that_is_not_possible_is_left_to_the_rules():
    group_of_4_mb = Request((16, 64, 256, 256), "nchw", 4, "forward")
    (plan,) = plans([group_of_4_mb], GPUS["h200"], "policy=block")
    assert (plan.policy, plan.rule) == ("grid", "group fits the chip")


ITEMS = "policy, ranks, width, relay, stagger or margin as key=value"


@pytest.mark.parametrize(
    "text, expected, got",
    [
        ("polcy=grid", ITEMS, "polcy=grid"),
        ("grid", ITEMS, "grid"),
        ("policy=grid,", ITEMS, ""),
        (",", ITEMS, ""),
        ("policy=grid, ranks=8", ITEMS, " ranks=8"),
        ("policy=grid;ranks=8", "policy to be block, grid or split", "grid;ranks=8"),
        ("policy=gridlock", "policy to be block, grid or split", "gridlock"),
        ("policy=map", "policy to be block, grid or split", "map"),
        ("policy", "policy to be block, grid or split", ""),
        ("ranks=", "ranks to be an integer from 1 to 65535", ""),
        ("ranks=0", "ranks to be an integer from 1 to 65535", "0"),
        ("ranks=65536", "ranks to be an integer from 1 to 65535", "65536"),
        ("ranks=8x", "ranks to be an integer from 1 to 65535", "8x"),
        ("ranks=+8", "ranks to be an integer from 1 to 65535", "+8"),
        ("ranks= 8", "ranks to be an integer from 1 to 65535", " 8"),
        ("ranks=99999999999999999999", "ranks to be an integer from 1 to 65535", "9" * 20),
        ("width=-32", f"width to be an integer from 1 to {2**30}", "-32"),
        ("width=1.5", f"width to be an integer from 1 to {2**30}", "1.5"),
        ("relay=0", f"relay to be an integer from 1 to {2**30}", "0"),
        ("margin=-1", f"margin to be an integer from 0 to {2**30}", "-1"),
        ("margin=132", "margin to be less than the multiprocessors of the device, 132", "132"),
        ("ranks=8,ranks=8", "every key at most once", "ranks=8"),
        ("policy=grid,width=32,policy=split", "every key at most once", "policy=split"),
    ],
)
def test_override_that_is_wrong_is_an_error(text, expected, got):
    """It used to be ignored, or cut off where it began to be wrong."""
    message = f"BATCHNORM_EXT_CUDA_PLAN: expected {expected}, got '{got}'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plans([OVERRIDDEN], GPUS["h200"], text)
