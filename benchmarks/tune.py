"""Times launch plans other than those that the rules of csrc/cuda/plan.h choose, on a GPU.

    python benchmarks/tune.py --batch 32,256 --dtype bf16 --json tuning.json

For each case first the policy and the width of a group, then the blocks of a team, then who adds
up their sums; plans that come out the same are timed once. What is left is a dispatch table: the
plan of the rules, the best one found, and what it would gain. A best plan can be tried in any
program with the environment variable BATCHNORM_EXT_CUDA_PLAN.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean

import torch
from rich.console import Console
from torch import nn
from tqdm import tqdm

import batchnorm_ext
import graphs
from arguments import add_choice
from bench import SAMPLE_SECONDS, make_call, make_sets
from cases import DTYPES, GROUPS, LAYOUTS, Case, all_cases
from environment import environment
from plan import KERNELS, Gpu, Plan, Request, plans
from results import shape_name
from tables import Table, duration, ratio
from timing import interleaved

ROUNDS = 5
AT_ONCE = 6  # graphs, each of which has its outputs in memory
WIDTHS = (8, 16, 32, 64, 128, 256)
RANKS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 132, 198, 264, 396)
RELAYS = (1, 1 << 30)  # always; never


@contextmanager
def forced(override: str) -> Iterator[None]:
    override_plan = torch.ops.batchnorm_ext._override_cuda_plan
    before = override_plan(override)
    try:
        yield
    finally:
        override_plan(before)


def this_gpu() -> Gpu:
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    per_block = p.shared_memory_per_block_optin >> 10
    per_sm = p.shared_memory_per_multiprocessor >> 10
    architecture = 10 * p.major + p.minor
    sizes = p.multi_processor_count, per_sm, per_block, p.L2_cache_size >> 20
    return Gpu(p.name, architecture, *sizes, bandwidth=0.0)


class Search:
    """The plans of one case, and their times."""

    def __init__(self, case: Case, dtype: str, layout: str, what: str, sets: list, gpu: Gpu):
        self.request = Request(case.shape, layout, DTYPES[dtype].itemsize, what)
        self.sets, self.gpu = sets, gpu
        name = f"BatchNorm{max(len(case.shape) - 2, 1)}d"
        self.module: nn.Module = getattr(batchnorm_ext, name)(case.shape[1], device="cuda")
        self.plans: dict[str, Plan] = {}
        self.seconds: dict[str, float] = {}

    def replay(self, override: str):
        function = batchnorm_ext.functional.batch_norm
        with forced(override):
            calls = [
                make_call(self.request.what, function, self.module, *tensors)
                for tensors in self.sets
            ]
            return graphs.capture(calls)

    def time(self, overrides: list[str]) -> str:
        """Time those that lead to new plans; the best override so far."""
        for override in overrides:
            (plan,) = plans([self.request], self.gpu, override)
            if all(plan_key(plan) != plan_key(p) for p in self.plans.values()):
                self.plans[override] = plan
        fresh = [override for override in self.plans if override not in self.seconds]
        for first in range(0, len(fresh), AT_ONCE):
            replays = {override: self.replay(override) for override in fresh[first:][:AT_ONCE]}
            timing = interleaved(replays, ROUNDS, SAMPLE_SECONDS["cuda"], sample=graphs.sample)
            for override, seconds in timing.seconds.items():
                self.seconds[override] = seconds / len(self.sets)
        return min(self.seconds, key=self.seconds.get)

    def run(self) -> str:
        policies = ["policy=split", "policy=block", "policy=grid"]
        widths = [f"{policy},width={w}" for policy in policies for w in WIDTHS]
        best = self.time(["", *policies, *widths])
        policy = self.plans[best].policy
        base = best if best else f"policy={policy}"
        if policy != "block":
            best = self.time([f"{base},ranks={ranks}" for ranks in RANKS])
        if self.plans[best].policy == "grid":
            best = self.time([f"{best or base},relay={relay}" for relay in RELAYS])
        return best


def plan_key(plan: Plan) -> tuple:
    return plan.policy, plan.ranks, plan.width, plan.relay


def describe(plan: Plan) -> str:
    return f"{plan.policy} {plan.ranks}x{plan.teams}, width {plan.width}" + ", relay" * plan.relay


def dispatch_table(rows: list[dict]) -> Table:
    lines = [
        [
            f"{shape_name(row['shape'])} {row['dtype']} {row['layout']}",
            row["what"],
            row["rules"]["rule"],
            describe(Plan(**row["rules"])),
            duration(row["seconds"][""]),
            describe(Plan(**row["best"])),
            duration(min(row["seconds"].values())),
            ratio(gain(row)),
        ]
        for row in rows
    ]
    mean = ratio(geometric_mean(gain(row) for row in rows) if rows else None)
    lines.append(["geometric mean", *[""] * 6, mean])
    header = [
        "case",
        "pass",
        "rule",
        "its plan (ranks x teams)",
        "time",
        "best plan",
        "time",
        "gain",
    ]
    return Table("Dispatch: the rules and the best plans found", header, lines, footer=1)


def gain(row: dict) -> float:
    return row["seconds"][""] / min(row["seconds"].values())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choice(parser, "--pass", tuple(KERNELS), dest="passes", default=["forward", "backward"])
    add_choice(parser, "--dtype", tuple(DTYPES), default=["bf16"])
    add_choice(parser, "--layout", LAYOUTS)
    add_choice(parser, "--shapes", GROUPS, default=["resnet50"])
    parser.add_argument("--batch", default="256,32", help="comma-separated")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each of them")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    machine, gpu = environment("cuda"), this_gpu()
    console.print("\n".join(f"{key}: {value}" for key, value in machine.items()), highlight=False)
    todo = [
        (case, dtype, layout)
        for batch in map(int, args.batch.split(","))
        for dtype in args.dtype
        for case in all_cases(batch)
        for layout in args.layout
        if set(case.groups) & set(args.shapes) and layout in case.layouts
    ]
    gc.freeze()  # what is there stays; the many collections to come need not look at it
    rows: list[dict] = []
    with torch.cuda.stream(torch.cuda.Stream()), tqdm(todo, unit="case", file=sys.stderr) as bar:
        for case, dtype, layout in bar:
            bar.set_postfix_str(f"{shape_name(case.shape)} {dtype} {layout}")
            sets = make_sets(case, dtype, layout, "cuda")
            for what in args.passes:
                search = Search(case, dtype, layout, what, sets, gpu)
                try:
                    best = search.run()
                except torch.OutOfMemoryError as error:
                    bar.write(f"{case.shape} {dtype} {layout} left out: {error}", sys.stderr)
                    continue
                row = {"shape": case.shape, "dtype": dtype, "layout": layout, "what": what}
                row |= {"override": best, "seconds": search.seconds}
                row |= {"rules": asdict(search.plans[""]), "best": asdict(search.plans[best])}
                rows.append(row)
                if args.json:
                    content = {"kind": "tuning", "environment": machine, "rows": rows}
                    args.json.write_text(json.dumps(content, indent=1) + "\n")
    dispatch_table(rows).print(console)


if __name__ == "__main__":
    main()
