"""Layers: batchnorm_ext, native PyTorch and a clone of the input, interleaved in one process.

    python benchmarks/bench.py --allocator both --runs 3
    python benchmarks/bench.py --pass forward --dtype fp32 --shapes resnet50
    python benchmarks/bench.py --device cuda --dtype bf16,fp16 --shapes resnet50 --batch 256

Writes layers-<allocator>.csv, one line per case, with the times of one call in milliseconds.
Outputs and gradients are allocated in each call and freed after it, as in training; the clone has
such an output as well. `--runs 3` repeats everything and keeps the median run of each case.

On a GPU, CUDA graphs of many calls are timed, each call on buffers of its own, which together
exceed the L2 cache. "native" is what PyTorch chooses there. Where that is cuDNN, PyTorch's own
kernels are timed too, as "aten". The file is <name>.csv.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import batchnorm_ext
import environment
import graphs
import report
import results
from arguments import add_choice, make_parser, numbers
from cases import DTYPES, GROUPS, USUAL_DTYPES, USUAL_GROUPS, Case, chosen_cases, to_layout
from networks import NETWORKS
from timing import Call, interleaved, undisturbed

SAMPLE_SECONDS = 5e-3


def make_call(what: str, batch_norm: Callable, module: nn.Module, x, dy) -> Call:
    """The call to time, on the module's parameters and running statistics."""
    w, b, mean, var = module.weight, module.bias, module.running_mean, module.running_var
    leaves = (x, w, b)
    if what == "forward":
        return lambda: batch_norm(x, mean, var, w, b, True, 0.1, 1e-5)
    if what == "backward":
        y = batch_norm(x, mean, var, w, b, True, 0.1, 1e-5)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    if what == "eval":
        # Detached instead of no_grad: entering that context costs as much as a small layer.
        x, w, b = x.detach(), w.detach(), b.detach()
        return lambda: batch_norm(x, mean, var, w, b, False, 0.1, 1e-5)
    return lambda: torch.autograd.grad(module(x), leaves, dy)


def aten(*arguments) -> torch.Tensor:
    """PyTorch's own kernels, also where PyTorch would choose cuDNN."""
    with torch.backends.cudnn.flags(enabled=False):
        return F.batch_norm(*arguments)


def is_cudnn(x: torch.Tensor, module: nn.Module) -> bool:
    """Whether PyTorch chooses cuDNN for the module in training."""
    parameters = module.weight, module.bias, module.running_mean, module.running_var
    chosen = torch._C._select_batch_norm_backend(x, *parameters, True, 1e-5)
    return chosen == torch._C._BatchNormBackend.Cudnn


def contestants(what: str, sets: list[tuple], compiled: bool) -> dict[str, list[Call]]:
    """Name -> a call for each of the sets of (x, dy)."""
    x = sets[0][0]
    name = f"BatchNorm{max(x.dim() - 2, 1)}d"
    native, ours = (
        getattr(library, name)(x.size(1), device=x.device) for library in (nn, batchnorm_ext)
    )
    functions = {
        "ours": (batchnorm_ext.functional.batch_norm, ours),
        "native": (F.batch_norm, native),
    }
    if x.is_cuda and what != "module" and is_cudnn(x, native):
        functions["aten"] = aten, native
    if compiled:
        # A cache of earlier shapes would end in a recompile limit or in dynamic shapes.
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False  # the backward runs again and again
        compile = partial(torch.compile, fullgraph=True, dynamic=False)
        functions["compiled"] = compile(F.batch_norm), compile(native)
    calls = {
        contestant: [make_call(what, function, module, *tensors) for tensors in sets]
        for contestant, (function, module) in functions.items()
    }
    return calls | {"copy": [x.detach().clone for x, _ in sets]}


def make_sets(case: Case, dtype: str, layout: str, device: str) -> list[tuple]:
    """Input and gradient; on a GPU as many copies as it takes to exceed the L2 cache."""
    generator = torch.Generator(device).manual_seed(0)

    def randn() -> torch.Tensor:
        values = torch.randn(case.shape, generator=generator, device=device)
        return to_layout(values.to(DTYPES[dtype]), layout)

    x, dy = randn().requires_grad_(), randn()
    more = graphs.working_sets(2 * x.nbytes) - 1 if device == "cuda" else 0
    return [(x, dy), *((x.detach().clone().requires_grad_(), dy.clone()) for _ in range(more))]


def measure(case: Case, dtype: str, layout: str, args) -> list[dict]:
    sets = make_sets(case, dtype, layout, args.device)
    shape = results.shape_name(case.shape)
    layers = {name: case.layers.get(name, 0) for name in NETWORKS}
    rows = []
    for what in args.passes:
        calls = contestants(what, sets, args.compile)
        if args.device == "cuda":
            timing = graphs.time_graphs(calls, args.rounds)
        else:
            single = {name: each[0] for name, each in calls.items()}
            timing = undisturbed(partial(interleaved, single, args.rounds, SAMPLE_SECONDS))
        row = {"pass": what, "dtype": dtype, "layout": layout, "shape": shape}
        rows.append(row | layers | timing.row())
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=9)
    add_choice(parser, "--pass", results.PASSES, dest="passes", metavar="PASS")
    add_choice(parser, "--dtype", tuple(DTYPES), default=USUAL_DTYPES)
    add_choice(parser, "--layout", results.LAYOUTS)
    add_choice(parser, "--shapes", GROUPS, default=USUAL_GROUPS)
    parser.add_argument("--batch", type=numbers, default=[32], help="of the networks' layers")
    parser.add_argument("--runs", type=int, default=1, help="of which the median is kept")
    parser.add_argument("--compile", action="store_true", help="measure compiled native as well")
    parser.add_argument("--name", default="layers", help="of the CSV file")
    return parser.parse_args()


def run(args) -> None:
    machine = environment.machine(args.device)
    cases = chosen_cases(args)
    if args.quick:
        cases, args.rounds = cases[::12], 3
    on_gpu = args.device == "cuda"
    path = args.out / (f"{args.name}.csv" if on_gpu else f"{args.name}-{machine['allocator']}.csv")
    machine |= {"runs": args.runs, "rounds": args.rounds} | ({"quick": True} if args.quick else {})
    rows: list[dict] = []
    for i in range(args.runs):
        with tqdm(cases, desc=f"run {i + 1} {machine['allocator']}", file=sys.stderr) as bar:
            for case, dtype, layout in bar:
                bar.set_postfix_str(f"{results.shape_name(case.shape)} {dtype} {layout}")
                try:
                    rows += measure(case, dtype, layout, args)
                except torch.OutOfMemoryError as error:
                    bar.write(f"{case.shape} {dtype} {layout} left out: {error}", sys.stderr)
                    torch.cuda.empty_cache()
                    continue
                kept = results.median_run(pd.DataFrame(rows))
                results.write(path, machine, kept)  # a run that is cut short leaves what it has
    print(report.layer_report(*results.read(path)))
    print(path)


def main() -> None:
    args = parse_arguments()
    if args.device == "cpu":
        environment.use_allocator(args.allocator)
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        gc.freeze()  # the many collections to come need not look at what is there now
        # Graphs are captured on a stream that is not the default one. A backward runs on the stream
        # of its forward.
        with torch.cuda.stream(torch.cuda.Stream()):
            run(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
