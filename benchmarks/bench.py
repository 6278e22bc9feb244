"""Layers: batchnorm_ext, native PyTorch and a clone of the input, interleaved in one process.

    python benchmarks/bench.py --allocator both --runs 3
    python benchmarks/bench.py --pass forward --dtype fp32 --shapes resnet50
    python benchmarks/bench.py --family GroupNorm RMSNorm

Writes layers-<allocator>.csv, milliseconds of one call. Outputs and gradients are allocated in each
call and freed after it, as in training; the clone has such an output as well. `--runs 3` repeats
everything and keeps the median run of each case. `--family` measures the other norms, forward and
backward together, also against compiled native layers and formulas by hand: family-<allocator>.csv.

On a GPU, CUDA graphs of many calls are timed, each call on buffers of its own, which together
exceed the L2 cache. "native" is what PyTorch chooses there, cuDNN included.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config as functorch
from tqdm import tqdm

import batchnorm_ext
import environment
import norms
import report
import results
import timing
from cases import (
    DTYPES,
    FAMILY,
    USUAL_GROUPS,
    add_case_options,
    chain_cases,
    chosen_cases,
    family_cases,
)


def make_call(what: str, batch_norm: Callable, module: nn.Module, x, dy) -> timing.Call:
    """The call to time, on the module's parameters and running statistics."""
    leaves = (x, *module.parameters())
    if what == "module":
        return lambda: torch.autograd.grad(module(x), leaves, dy)
    if batch_norm is None and what == "forward":
        return lambda: module(x)
    if batch_norm is None:
        y = module(x)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    w, b, mean, var = module.weight, module.bias, module.running_mean, module.running_var
    if what == "forward":
        return lambda: batch_norm(x, mean, var, w, b, True, 0.1, 1e-5)
    if what == "backward":
        y = batch_norm(x, mean, var, w, b, True, 0.1, 1e-5)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    # Detached instead of no_grad: entering that context costs as much as a small layer.
    x, w, b = x.detach(), w.detach(), b.detach()
    return lambda: batch_norm(x, mean, var, w, b, False, 0.1, 1e-5)


def contestants(what: str, case: dict, sets: list[tuple]) -> dict[str, list[timing.Call]]:
    """Name -> a call for each of the sets of (x, dy)."""
    x = sets[0][0]
    norm = case.get("norm", "BatchNorm")
    functions = {"ours": batchnorm_ext.functional.batch_norm, "native": F.batch_norm}
    if " + " in norm:
        layers, functions = norms.chains(norm, x.detach()), {}
        if x.is_cuda:
            torch._dynamo.reset()
            layers["compiled"] = torch.compile(layers["native"], dynamic=False)
    else:
        layers = norms.layers(norm, x.shape)
    if "hand" in layers:  # parameters are of the dtype of the input, as in model.bfloat16()
        layers = {name: layer.to(x.dtype) for name, layer in layers.items()}
        if x.is_cpu:  # on a GPU, compiling all of these would take most of the minutes of a run
            torch._dynamo.reset()
            layers["compiled"] = torch.compile(layers["native"], dynamic=False)
    calls = {"copy": [x.detach().clone for x, _ in sets]}
    for name, layer in layers.items():
        parts = what, functions.get(name), layer.to(x.device)
        calls[name] = [make_call(*parts, *tensors) for tensors in sets]
    return calls


def make_sets(case: dict, device: str) -> list[tuple]:
    """Input and gradient; on a GPU as many copies as it takes to exceed the L2 cache."""
    shape = tuple(map(int, case["shape"].split("x")))
    generator = torch.Generator(device).manual_seed(0)

    def randn() -> torch.Tensor:
        x = torch.randn(shape, generator=generator, device=device).to(DTYPES[case["dtype"]])
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if case["layout"] == "nhwc" else x

    x, dy = randn().requires_grad_(), randn()
    more = timing.working_sets(2 * x.nbytes) - 1 if device == "cuda" else 0
    return [(x, dy), *((x.detach().clone().requires_grad_(), dy.clone()) for _ in range(more))]


def measure(case: dict, args: Namespace) -> Iterator[dict]:
    sets = make_sets(case, args.device)
    passes = args.passes
    if "norm" in case:
        apart = args.device == "cuda" and " + " in case["norm"]
        passes = ["forward", "backward"] if apart else ["module"]
    for what in passes:
        calls = contestants(what, case, sets)
        if args.device == "cuda":
            replays = {name: timing.capture(each) for name, each in calls.items()}
            times = timing.time_graphs(replays, len(sets), args.rounds)
        else:
            single = {name: each[0] for name, each in calls.items()}
            times = timing.interleaved(single, args.rounds, timing.CPU_SECONDS)
        yield {"pass": what} | case | times


def run(args: Namespace, name: str, cases: list[dict], measure, summary: Callable) -> None:
    """Measure every case so many times, write the median run of each, and print a summary."""
    path, machine = environment.path(args, name), environment.machine(args)
    rows: list[dict] = []
    for i in range(args.runs):
        with tqdm(cases, desc=f"run {i + 1} {machine['allocator']}", file=sys.stderr) as bar:
            for case in bar:
                bar.set_postfix_str(" ".join(map(str, case.values())))
                try:
                    rows += measure(case, args)
                except torch.OutOfMemoryError as error:
                    bar.write(f"{case} left out: {error}", sys.stderr)
                    torch.cuda.empty_cache()
                    continue
                kept = results.median_run(pd.DataFrame(rows))
                results.write(path, machine, kept)  # a run that is cut short leaves what it has
    print(f"{path}\n\n{summary(results.read(path))}")


def main() -> None:
    parser = environment.make_parser(__doc__, rounds=9, runs=True)
    add_case_options(parser, results.PASSES, ["fp32", "bf16"], USUAL_GROUPS)
    help = "these norms, or all but BatchNorm, in all of their cases"
    parser.add_argument("--family", nargs="*", choices=FAMILY, help=help)
    parser.add_argument("--fused", action="store_true", help="norms with what follows them")
    parser.add_argument("--name", default="layers", help="of the CSV file of BatchNorm")
    args = parser.parse_args()
    environment.start(args)
    functorch.donated_buffer = False  # a compiled backward runs more than once
    # Graphs are captured on a stream that is not the default one. A backward runs on the stream of
    # its forward.
    with torch.cuda.stream(torch.cuda.Stream()) if args.device == "cuda" else nullcontext():
        if args.family is not None:
            cases = family_cases(args.family or FAMILY)[:: 7 if args.quick else 1]
            return run(args, "family", cases, measure, report.family_table)
        if args.fused:
            cases = chain_cases(args.device)[:: 24 if args.quick else 1]
            return run(args, "fused", cases, measure, report.family_table)
        cases = chosen_cases(args)[:: 12 if args.quick else 1]
        run(args, args.name, cases, measure, report.layer_report)


if __name__ == "__main__":
    main()
