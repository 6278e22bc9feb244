"""The CUDA kernels in the emulator: right numbers, no race, no stray access, no barrier too many.

For ThreadSanitizer each configuration is a process of its own: it misses races in a process that
has run others. Elsewhere several share one. A failure prints the command line that repeats it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

import pytest

from emulator.harness import HERE, MISUSE, assert_passes, build, mutants, run
from programs import CSRC, RACE, WRONG, Mutant, selected, skip_without, unsupported

SOURCE = HERE / "kernels.cpp"

# So many configurations of each operation, policy and dtype run in each mode. The dtypes take
# turns: in plain mode they cover all shapes and plans. What takes longest to compile comes first.
MODES = {"address": 10, "thread": 4, "plain": 32}
IN_A_PROCESS = {"address": 4, "thread": 1, "plain": 8}
# ThreadSanitizer takes 1.6 MB and a millisecond for each thread: it gets small grids. More teams
# than these are more of the same, since a team does not know of the others.
MOST_BLOCKS = 18
DTYPES = ["f32", "f64", "f16", "bf16"]
POLICIES = {
    "forward": ["block", "grid", "split"],
    "backward": ["block", "grid", "split"],
    "eval_backward": ["block", "grid", "split"],
    "moments": ["reduce"],
    "sums_backward": ["reduce"],
    "grad_moments": ["reduce"],
    "eval": ["map"],
    "apply": ["map"],
    "grad_apply": ["map"],
    "scale": ["map"],
}
PLANS = {  # a reduction alone and a map alone have no other policy
    "block": ["policy=block", "policy=block,width=8"],
    "grid": [
        f"policy=grid,{options}"
        for options in ("ranks=2", "ranks=3,width=8", "ranks=7,relay=1", "ranks=5,width=16,relay=1")
    ],
    "split": [f"policy=split,{options}" for options in ("ranks=2", "ranks=3,width=8", "ranks=5")],
    "reduce": ["ranks=1", "ranks=3,width=8", "ranks=7"],
    "map": ["ranks=1", "ranks=3,width=8", "ranks=7"],
}
SHAPES = [  # [outer, stats, inner] and samples, for blocks of 64 threads
    (3, 5, 49),  # odd runs that no pack divides,
    (4, 8, 49),  # and those that whole packs fit into over several channels
    (2, 3, 4099),  # too odd and too long for either: element by element
    (7, 6, 64),
    (5, 3, 1000),
    (1, 1, 7000),
    (37, 13, 1),
    (37, 24, 1),
    (300, 40, 1),
    (23, 12, 4),
    (6, 130, 2),
    (1, 3, 2),  # fewer elements than threads
    (2, 1, 1),
    (1, 4, 1),  # one element: no unbiased variance
    (1, 7, 49, 5),  # samples that have statistics of their own
    (5, 3, 1000, 2),
    (37, 24, 1, 3),
    (23, 12, 4, 2),
    (100, 70, 1, 2),
    (1, 3, 49, 2),  # few enough for ThreadSanitizer, see MOST_BLOCKS
    (37, 13, 1, 2),
]
EMPTY = [(0, 3, 4), (4, 3, 0)]  # the channels of which there are all the same
DATA = ["normal", "shifted", "outlier", "constant", "huge", "tiny", "nan", "inf"]
# What the kernels with an activation are tested on, and the activations, with a residual or not.
NEAR = ["normal", "shifted", "outlier", "constant"]
AFTER = [("silu", 0), ("silu", 1), ("leaky_relu", 1)]
# Up to the largest number there is; gradients too, where nothing multiplies them.
LARGE = ["loud", "limit", "spike"]
ACTIVATED = [
    *("forward", "eval", "apply"),
    *("backward", "eval_backward", "sums_backward", "grad_moments", "grad_apply"),
]
LOUD = ["backward", "sums_backward", "grad_moments"]


def configurations(op: str, policy: str, dtype: str) -> list[list[str]]:
    """Arguments for every shape and plan; the rest is drawn, each time the same."""
    draw = random.Random(f"{op} {policy} {dtype}").choice
    # Squares of float16 overflow nothing. In float64 they overflow the sums of SyncBatchNorm, and
    # those of huge values are more than the sums that this test makes up can hold exactly.
    data = DATA if dtype == "f16" else DATA + LARGE
    if dtype == "f64" and op in ("moments", "apply", "grad_apply"):
        data = [kind for kind in DATA if kind != "huge"]
    draw_after = random.Random(f"after {op} {policy} {dtype}").choice
    settings = [
        {
            "op": op,
            "dtype": dtype,
            "outer": outer,
            "stats": stats,
            "inner": inner,
            "batch": batch[0] if batch else 1,
            "data": (kind := draw(["normal", *data])),
            "gradient": draw(["normal", "loud"]) if kind in LARGE and op in LOUD else "normal",
            "data_seed": draw(range(1000)),
            "aligned": draw([1, 1, 0]),
            "parameters": draw(["f32", "same"]),
            "momentum": draw([0.25, "none"]),
            # statistics of one element alone are of no use next to others
            "total": draw([-1, -1, -1 if kind in LARGE else 1] if outer * inner else [0, 1, 50]),
            "plan": plan,
            "sms": draw([2, 4]),
            # a block keeps any group; a grid keeps some of it, if not all
            "shared": 640 << 10 if policy == "block" else draw([128 << 10, 30 << 10]),
            "cooperative": 1 if policy == "grid" else draw([0, 1]),
            "seed": draw(range(1000)),
        }
        for outer, stats, inner, *batch in SHAPES + (EMPTY if op in ("apply", "eval") else [])
        for plan in PLANS[policy]
    ]
    if dtype != "f64" and op in ACTIVATED:
        for s in settings:
            if s["data"] in NEAR and draw_after([True, False]):
                s["activation"], s["residual"] = draw_after(AFTER)
    return [[f"{key}={value}" for key, value in s.items()] for s in settings]


def turn_of(dtype: str, commands: list[list[str]], seed: str) -> list[list[str]]:
    """The commands in an order in which the first of each dtype are others, as far as there are."""
    random.Random(seed).shuffle(commands)
    first = DTYPES.index(dtype) * MODES["plain"] % len(commands)
    return commands[first:] + commands[:first]


# Configurations that reach every barrier, in the dtype whose packs take two passes of a column.
NET = [
    f"dtype=bf16 {settings}"
    for settings in [
        "op=backward outer=10 stats=16 inner=9 sms=1 plan=policy=grid,ranks=3,width=8 "
        "activation=silu residual=1",
        "op=backward outer=5 stats=4 inner=1000 plan=policy=block activation=silu",
        "op=forward outer=10 stats=16 inner=9 sms=1 plan=policy=grid,ranks=3,width=8",
        "op=forward outer=100 stats=40 inner=1 plan=policy=split,ranks=3,width=16 momentum=none",
        "op=forward outer=5 stats=4 inner=1000 sms=1 plan=policy=grid,ranks=3,relay=1",
        "op=forward outer=5 stats=4 inner=1000 plan=policy=split,ranks=3",
        "op=backward outer=100 stats=40 inner=1 sms=1 plan=policy=grid,ranks=3,width=16,relay=1",
        "op=forward outer=100 stats=40 inner=1 plan=policy=block data=tiny",
        "op=forward outer=100 stats=40 inner=1 sms=1 shared=30000 plan=policy=grid,ranks=2",
        "op=backward outer=100 stats=40 inner=1 plan=policy=block data=spike gradient=loud",
        # what the first thread has seen is no centre for the others: in a row, in a column
        "op=forward outer=2 stats=40 inner=67 data=outlier plan=policy=block",
        "op=forward outer=60 stats=64 inner=1 data=outlier plan=policy=block,width=8",
    ]
]
NET_TYPE = "__nv_bfloat16"


BARRIER = r"(__sync(threads|warp)\(.*\)|__threadfence\(\)|meet\(.*\));"
# What else orders the blocks, and some wrong counts and sums.
EDITS = [
    (CSRC / "cuda/norm.cuh", "half ^= 1", "half ^= 0", RACE),
    (HERE / "emulator.h", "__ATOMIC_ACQ_REL", "__ATOMIC_ACQUIRE", RACE),
    (HERE / "emulator.h", "__ATOMIC_ACQ_REL", "__ATOMIC_RELEASE", RACE),
    (HERE / "emulator.h", "p, __ATOMIC_ACQUIRE", "p, __ATOMIC_RELAXED", RACE),
    (CSRC / "cuda/norm.cuh", "kept = kKeeps && step < s.kept", "kept = kKeeps", WRONG),
    (CSRC / "cuda/team.cuh", "(ranks - 1)", "(ranks)", MISUSE),
    (CSRC / "cuda/team.cuh", "put(first + i * step, sum)", "put(first + i, sum)", WRONG),
    (CSRC / "cuda/reduce.cuh", "first + warp_sum(", "first + 0 * warp_sum(", WRONG),
    (CSRC / "cuda/reduce.cuh", "< kCentreRows ? rows : kCentreRows", "< 1 ? rows : 1", WRONG),
    (CSRC / "cuda/chunk.cuh", "last < kWarp ? last : kWarp", "kWarp", WRONG),
    (CSRC / "cuda/lanes.cuh", "s2 < most * 1e-30", "s2 < 0", WRONG),
    (CSRC / "cuda/backward.cuh", "isfinite(sum.x) && isfinite(sum.y) &&", "", WRONG),
    (CSRC / "math.h", "? mean : 0;", "? mean : mean;", WRONG),
]


def blocks(plain: Path, command: list[str]) -> int:
    """Of its grid, as the program without sanitizers says."""
    text = run(plain, *command).out
    ranks, teams = (int(re.search(rf"{name}=(\d+)", text)[1]) for name in ("ranks", "teams"))
    return ranks * teams


def joined(commands: list[list[str]], count: int) -> list[list[str]]:
    """As many of them as that for each process."""
    separated = [["--", *command] for command in commands]
    chunks = [separated[i : i + count] for i in range(0, len(separated), count)]
    return [sum(chunk, [])[1:] for chunk in chunks]


def all_mutants() -> Iterator[Mutant]:
    for file in sorted({*CSRC.glob("cuda/*.cuh")} - {CSRC / "cuda/across.cuh"}):  # it has its own
        for line, text in mutants(file, BARRIER):
            yield Mutant(file, str(line), text)
    for file, old, new, code in EDITS:
        yield Mutant.edit(file, old, new, code)


def compile_kernels(mode: str, directory: Path, tree: Path = CSRC, *defines: str) -> Path:
    """The program, with the headers of ``tree``."""
    defines = ("BATCHNORM_EXT_CUDA_THREADS=64", *defines)
    return build(SOURCE, mode, defines=defines, include=[tree], directory=directory)


def escape(mutant: Mutant, directory: Path) -> list[str]:
    """How the configurations of the net ended; nothing if one of them reported the mutant."""
    inside = mutant.file.is_relative_to(CSRC)
    with mutant.tree(directory, CSRC if inside else HERE) as tree:
        program = compile_kernels(mutant.mode, tree, tree, f"BATCHNORM_EXT_KERNELS_OF={NET_TYPE}")
        ends = []
        for settings in NET:
            result = run(program, *settings.split())
            if result.code == mutant.code:
                return []
            ends.append(f"{settings}: {result}")
        return ends


@pytest.fixture(scope="module")
def programs(request, pool, tmp_path_factory) -> dict[str, Future[Path]]:
    """By mode."""
    directory = tmp_path_factory.mktemp("kernels")
    modes = dict.fromkeys([*selected(request, "mode"), "plain"])
    modes = [mode for mode in modes if not unsupported(mode)]
    return {mode: pool.submit(compile_kernels, mode, directory) for mode in modes}


@pytest.fixture(scope="module")
def escapes(request, pool, tmp_path_factory) -> dict[Mutant, Future[list[str]]]:
    directory = tmp_path_factory.mktemp("mutants")
    hunted = [mutant for mutant in selected(request, "mutant") if not unsupported(mutant.mode)]
    return {mutant: pool.submit(escape, mutant, directory) for mutant in hunted}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "policy"), [(op, p) for op in POLICIES for p in POLICIES[op]])
@pytest.mark.parametrize("mode", MODES)
def test_configurations(programs, pool, mode, op, policy, dtype):
    skip_without(mode)
    commands = turn_of(dtype, configurations(op, policy, dtype), f"{op} {policy}")
    if mode == "thread":
        plain = programs["plain"].result()
        commands = (command for command in commands if blocks(plain, command) <= MOST_BLOCKS)
    commands = joined(list(islice(commands, MODES[mode])), IN_A_PROCESS[mode])
    assert_passes(programs[mode].result(), pool, commands, f"policy={policy} ")


def test_dtypes_cover_all_shapes_and_plans():
    def shape_and_plan(command):
        return tuple(s for s in command if s.split("=")[0] in ("outer", "stats", "inner", "plan"))

    for op in POLICIES:
        for policy in POLICIES[op]:
            every, some = set(), set()
            for dtype in DTYPES:
                commands = turn_of(dtype, configurations(op, policy, dtype), f"{op} {policy}")
                every |= set(map(shape_and_plan, commands))
                some |= set(map(shape_and_plan, commands[: MODES["plain"]]))
            assert some == every


@pytest.mark.parametrize("plan", ["policy=block", "policy=grid,ranks=2", "policy=split,ranks=2"])
@pytest.mark.parametrize("mode", ["plain"])
def test_momentum_of_nan_is_no_cumulative_average(programs, pool, mode, plan):
    """It makes the running statistics NaN, as those of PyTorch's own function."""
    commands = [f"op={op} momentum=nan outer=40 plan={plan}".split() for op in ("forward", "apply")]
    assert_passes(programs[mode].result(), pool, commands)


@pytest.mark.parametrize("mode", MODES)
def test_net_is_for_mutants_only(programs, pool, mode):
    skip_without(mode)
    assert_passes(programs[mode].result(), pool, [settings.split() for settings in NET])


@pytest.mark.parametrize("mutant", list(all_mutants()), ids=str)
def test_mutant_is_reported(escapes, mutant):
    skip_without(mutant.mode)
    assert not (ends := escapes[mutant].result()), "\n".join(ends)
