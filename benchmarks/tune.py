"""Times launch plans other than those that the rules of csrc/cuda/planner.h choose, on a GPU.

For each case first the policy and the width of a group, then the blocks of a team, then who adds up
their sums. Writes tuning.csv: the plan of the rules, the best plan found, its gain, and its value
of the environment variable BATCHNORM_EXT_CUDA_PLAN, by which any program can try it.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd
import torch
from tqdm import tqdm

import batchnorm_ext
import environment
import results
import timing
from bench import make_call, make_sets
from cases import add_case_options, chosen_cases
from norms import layer_of
from plan import Gpu, Request, plans

AT_ONCE = 6  # graphs, each of which has its outputs in memory
WIDTHS = (8, 16, 32, 64, 128, 256)
RANKS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 132, 198, 264, 396)
RELAYS = (1, 1 << 30)  # always; never


def this_gpu() -> Gpu:
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    shared = p.shared_memory_per_multiprocessor >> 10, p.shared_memory_per_block_optin >> 10
    sizes = 10 * p.major + p.minor, p.multi_processor_count, *shared, p.L2_cache_size >> 20
    return Gpu(p.name, *sizes)


def describe(plan) -> str:
    return f"{plan.policy} {plan.ranks}x{plan.teams} width {plan.width}" + " relay" * plan.relay


@dataclass
class Search:
    """The plans of one case by their overrides, and their times."""

    request: Request
    sets: list[tuple]
    gpu: Gpu
    rounds: int
    plans: dict[str, tuple] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)

    def replay(self, override: str) -> timing.Call:
        module = layer_of(batchnorm_ext, "BatchNorm", self.request.shape).cuda()
        operands = self.request.what, batchnorm_ext.functional.batch_norm, module
        before = torch.ops.batchnorm_ext._override_cuda_plan(override)
        try:
            return timing.capture([make_call(*operands, *tensors) for tensors in self.sets])
        finally:
            torch.ops.batchnorm_ext._override_cuda_plan(before)

    def time(self, overrides: list[str]) -> str:
        """Time those that lead to new plans; the best override so far."""
        for override in overrides:
            (plan,) = plans([self.request], self.gpu, override)
            if describe(plan) not in map(describe, self.plans.values()):
                self.plans[override] = plan
        fresh = [override for override in self.plans if override not in self.times]
        for first in range(0, len(fresh), AT_ONCE):
            replays = {override: self.replay(override) for override in fresh[first:][:AT_ONCE]}
            times = timing.time_graphs(replays, len(self.sets), self.rounds)
            self.times |= {override: times[override] for override in replays}
        return min(self.times, key=self.times.get)

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


def tune(case: dict, args, gpu: Gpu) -> Iterator[dict]:
    sets = make_sets(case, "cuda")
    x = sets[0][0]
    for what in args.passes:
        request = Request(tuple(x.shape), case["layout"], x.element_size(), what)
        search = Search(request, sets, gpu, args.rounds)
        best = search.run()
        rules, times = search.plans[""], search.times
        row = {"pass": what} | case | {"rule": rules.rule, "plan": describe(rules)}
        row |= {"ms": times[""], "best plan": describe(search.plans[best]), "best ms": times[best]}
        yield row | {"gain": times[""] / times[best], "override": best}


def main() -> None:
    parser = environment.make_parser(__doc__, rounds=5)
    add_case_options(parser, ["forward", "backward"], ["bf16"], ["resnet50"], batch=256)
    parser.set_defaults(device="cuda")
    args = parser.parse_args()
    machine, gpu, rows = environment.machine(args), this_gpu(), []
    with torch.cuda.stream(torch.cuda.Stream()):
        for case in tqdm(chosen_cases(args), unit="case", file=sys.stderr):
            rows += tune(case, args, gpu)
            results.write(args.out / "tuning.csv", machine, pd.DataFrame(rows))
    frame = pd.DataFrame(rows)
    print(frame.to_string(), f"\nbest plans against the rules: x {results.mean(frame.gain):.2f}")


if __name__ == "__main__":
    main()
