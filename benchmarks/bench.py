"""Layer benchmark: ours, native, compiled native and a plain copy, interleaved in one process.

    python benchmarks/bench.py --json layers.json --plot layers.png
    python benchmarks/bench.py --pass forward --dtype fp32 --shapes resnet50 --no-compile
    python benchmarks/bench.py --mapped --json mapped.json
    python benchmarks/bench.py --device cuda --dtype bf16,fp16 --shapes resnet50 --batch 256
    python benchmarks/bench.py --plan --batch 256

Outputs and gradients are allocated in each call and freed after it, as in training. `--mapped`
instead keeps freed memory with the process, so that an output costs no page faults: what is left
is the kernel, to be held against the copy.

On a GPU, CUDA graphs of many calls are timed, each call on buffers of its own, together more than
the L2 cache holds: the kernels alone, on data from memory. "native" is what PyTorch chooses there;
where that is cuDNN, PyTorch's own kernels are timed too, as "aten".

`--plan` measures nothing and needs no GPU: it prints how the CUDA kernels would cut up every case,
and the memory traffic and the least time that follow.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from tqdm import tqdm

import batchnorm_ext
import graphs
from arguments import add_choice
from cases import (
    DTYPES,
    GROUPS,
    LAYOUTS,
    USUAL_DTYPES,
    USUAL_GROUPS,
    Case,
    all_cases,
    to_layout,
)
from environment import environment
from mapped import check_mapped, keep_memory
from plan import GPUS, KERNELS, Request, plans
from results import PASSES, Alone, Row, copy_verdicts, gpu_verdicts, layer_verdicts, save, select
from tables import (
    case_table,
    gpu_table,
    mapped_table,
    plan_table,
    plan_totals,
    summary_table,
    verdict_table,
)
from timing import Call, Timing, interleaved, undisturbed

LARGE_BYTES = 32 << 20  # glibc maps blocks of this size afresh at each allocation, by default
SAMPLE_SECONDS = {"cpu": 5e-3, "cuda": 3e-3}  # a GPU is left alone by other processes


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
    """PyTorch's own kernels, also where it would choose those of cuDNN."""
    with torch.backends.cudnn.flags(enabled=False):
        return F.batch_norm(*arguments)


def is_cudnn(x: torch.Tensor, module: nn.Module) -> bool:
    """Whether PyTorch chooses cuDNN for the module in training."""
    parameters = module.weight, module.bias, module.running_mean, module.running_var
    chosen = torch._C._select_batch_norm_backend(x, *parameters, True, 1e-5)
    return chosen == torch._C._BatchNormBackend.Cudnn


def copy_call(x: torch.Tensor) -> Call:
    data, output = x.detach(), x.detach().clone()
    return lambda: output.copy_(data)


def contestants(what: str, sets: list[tuple], compiled: bool) -> dict[str, list[Call]]:
    """Provider -> a call for each of the sets of (x, dy)."""
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
    # Compiled native runs where a user compiles: whole steps and eval. Only on a GPU are the halves
    # of a step apart from what calls them.
    if compiled and (x.is_cuda or what in ("eval", "module")):
        # A cache of earlier shapes would end in a recompile limit or in dynamic shapes.
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False  # the backward runs again and again
        options = {"fullgraph": True, "dynamic": False}
        module = torch.compile(native, **options)
        functions["compile"] = torch.compile(F.batch_norm, **options), module
    calls = {
        provider: [make_call(what, function, module, *tensors) for tensors in sets]
        for provider, (function, module) in functions.items()
    }
    return calls | {"copy": [copy_call(x) for x, _ in sets]}


def time_on_cpu(calls: dict[str, list[Call]], rounds: int) -> Timing:
    single = {provider: each[0] for provider, each in calls.items()}
    return undisturbed(partial(interleaved, single, rounds, SAMPLE_SECONDS["cpu"]))


def time_on_gpu(calls: dict[str, list[Call]], rounds: int) -> Timing:
    replays = {provider: graphs.capture(each) for provider, each in calls.items()}
    timing = interleaved(replays, rounds, SAMPLE_SECONDS["cuda"], sample=graphs.sample)
    return Timing({p: seconds / len(calls[p]) for p, seconds in timing.seconds.items()}, 0.0)


def make_sets(case: Case, dtype: str, layout: str, device: str) -> list[tuple]:
    """Input and gradient, on a GPU as often as it takes for them not to be in its L2 cache."""
    generator = torch.Generator(device).manual_seed(0)

    def randn() -> torch.Tensor:
        values = torch.randn(case.shape, generator=generator, device=device)
        return to_layout(values.to(DTYPES[dtype]), layout)

    x, dy = randn().requires_grad_(), randn()
    sets = [(x, dy)]
    if device == "cuda":  # all of the same values: random numbers take longer than the measurement
        more = graphs.working_sets(2 * x.nbytes) - 1
        sets += [(x.detach().clone().requires_grad_(), dy.clone()) for _ in range(more)]
    return sets


def measure(case: Case, dtype: str, layout: str, passes: list[str], args) -> list[Row]:
    sets = make_sets(case, dtype, layout, args.device)
    x = sets[0][0]
    rows = []
    for what in passes:
        calls = contestants(what, sets, args.compile)
        timing = (time_on_gpu if x.is_cuda else time_on_cpu)(calls, args.rounds)
        if args.mapped:
            check_mapped(calls["ours"][0], x.nbytes)
        rows.append(Row(case.shape, case.layers, dtype, layout, what, **asdict(timing)))
    return rows


def measure_all(cases: list[Case], args, keep: Callable[[list[Row], str], None]) -> list[Row]:
    """All rows; `keep` gets them whenever those of a dtype and layout are complete."""
    rows: list[Row] = []
    for dtype in args.dtype:
        for layout in args.layout:
            todo = [case for case in cases if layout in case.layouts]
            if args.mapped:
                todo = [c for c in todo if prod(c.shape) * DTYPES[dtype].itemsize >= LARGE_BYTES]
            with tqdm(todo, desc=f"{dtype} {layout}", unit="shape", file=sys.stderr) as bar:
                for case in bar:
                    bar.set_postfix_str("x".join(map(str, case.shape)))
                    try:
                        rows += measure(case, dtype, layout, args.passes, args)
                    except torch.OutOfMemoryError as error:
                        bar.write(f"{case.shape} {dtype} {layout} left out: {error}", sys.stderr)
                        torch.cuda.empty_cache()
            keep(rows, f"{dtype} {layout}")
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choice(parser, "--pass", PASSES, dest="passes", metavar="PASS")
    add_choice(parser, "--dtype", tuple(DTYPES), default=USUAL_DTYPES)
    add_choice(parser, "--layout", LAYOUTS)
    add_choice(parser, "--shapes", GROUPS, default=USUAL_GROUPS)
    parser.add_argument("--batch", type=int, default=32, help="of the layers of the networks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--plan", action="store_true", help="print the launch plans for GPUs, no more"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave compiled native out"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: every sixth shape, 3 rounds, no compile"
    )
    parser.add_argument(
        "--mapped", action="store_true", help="large ResNet-50 NCHW inputs with the output mapped"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--plot", type=Path, help="write the speed-ups by shape to this picture")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.compile = 3, False
    if args.mapped:
        if args.device != "cpu":
            parser.error("--mapped is about the memory of a CPU")
        args.passes, args.layout, args.shapes = ["forward", "backward"], ["nchw"], ["resnet50"]
        args.compile = False
    return args


def print_plans(cases: list[Case], args, console: Console) -> None:
    for gpu in GPUS.values():
        requests = [
            Request(case.shape, layout, DTYPES[dtype].itemsize, what)
            for dtype in args.dtype
            for layout in args.layout
            for what in args.passes
            for case in cases
            if layout in case.layouts and what in KERNELS
        ]
        planned = plans(requests, gpu)
        plan_table(gpu, requests, planned).print(console)
        plan_totals(gpu, requests, planned).print(console)


def main() -> None:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    cases = [case for case in all_cases(args.batch) if set(case.groups) & set(args.shapes)]
    if args.quick:
        cases = cases[::6]
    if args.plan:
        print_plans(cases, args, console)
        return
    if args.mapped:
        keep_memory()
    torch.set_num_threads(args.threads)
    machine = environment(args.device)
    console.print("\n".join(f"{key}: {value}" for key, value in machine.items()), highlight=False)
    if args.device == "cuda":
        gc.freeze()  # what is there stays; the many collections to come need not look at it
        # Graphs are captured on a stream that is not the default one, where a backward has to run
        # whose forward ran there.
        with torch.cuda.stream(torch.cuda.Stream()):
            run(cases, args, machine, console)
    else:
        run(cases, args, machine, console)


def run(cases: list[Case], args, machine: dict, console: Console) -> None:
    on_gpu = args.device == "cuda"

    def keep(rows: list[Row], kind: str) -> None:
        """A long run shows and saves what it has."""
        if args.mapped:
            mapped_table(select(rows, kind)).print(console)
        else:
            for what in args.passes:
                case_table(rows, kind, what).print(console)
        if args.json:
            settings = {"rounds": args.rounds, "quick": args.quick}
            name = "gpu layers" if on_gpu else "mapped" if args.mapped else "layers"
            save(args.json, name, machine, settings, rows)

    rows = measure_all(cases, args, keep)
    if not args.mapped:
        (gpu_table if on_gpu else summary_table)(rows).print(console)
    verdicts = (gpu_verdicts if on_gpu else copy_verdicts if args.mapped else layer_verdicts)(rows)
    verdict_table([v for v in verdicts if v.value is not None]).print(console)
    if not on_gpu:
        console.print(str(Alone.of(rows)), highlight=False)
    if args.plot:
        import plot  # matplotlib takes a second to import, and only pictures need it

        (plot.roofline if on_gpu else plot.plot)(rows, machine, args.plot)


if __name__ == "__main__":
    main()
