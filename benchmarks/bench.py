"""Layer benchmark: ours, native, compiled native and a plain copy, interleaved in one process.

    python benchmarks/bench.py --json layers.json --plot layers.png
    python benchmarks/bench.py --pass forward --dtype fp32 --shapes resnet50 --no-compile
    python benchmarks/bench.py --mapped --json mapped.json

Outputs and gradients are allocated in each call and freed after it, as in training. `--mapped`
instead keeps freed memory with the process, so that an output costs no page faults: what is left
is the kernel, to be held against the copy.
"""

import argparse
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
from arguments import add_choice
from cases import DTYPES, GROUPS, LAYOUTS, Case, all_cases, to_layout
from environment import environment
from mapped import check_mapped, keep_memory
from results import PASSES, Alone, Row, copy_verdicts, layer_verdicts, save, select
from tables import case_table, mapped_table, summary_table, verdict_table
from timing import Call, interleaved, undisturbed

LARGE_BYTES = 32 << 20  # glibc maps blocks of this size afresh at each allocation, by default
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


def contestants(what: str, x: torch.Tensor, dy: torch.Tensor, compiled: bool) -> dict[str, Call]:
    """Provider -> call. Compiled native runs where a user compiles: whole steps and eval."""
    name = f"BatchNorm{max(x.dim() - 2, 1)}d"
    native, ours = getattr(nn, name), getattr(batchnorm_ext, name)
    data, output = x.detach(), x.detach().clone()
    calls: dict[str, Call] = {
        "ours": make_call(what, batchnorm_ext.functional.batch_norm, ours(x.size(1)), x, dy),
        "native": make_call(what, F.batch_norm, native(x.size(1)), x, dy),
        "copy": lambda: output.copy_(data),
    }
    if compiled and what in ("eval", "module"):
        # A cache of earlier shapes would end in a recompile limit or in dynamic shapes.
        torch._dynamo.reset()
        options = {"fullgraph": True, "dynamic": False}
        module = torch.compile(native(x.size(1)), **options)
        calls["compile"] = make_call(what, torch.compile(F.batch_norm, **options), module, x, dy)
    return calls


def measure(case: Case, dtype: str, layout: str, passes: list[str], args) -> list[Row]:
    generator = torch.Generator().manual_seed(0)

    def randn() -> torch.Tensor:
        return to_layout(torch.randn(case.shape, generator=generator).to(DTYPES[dtype]), layout)

    x, dy = randn().requires_grad_(), randn()
    rows = []
    for what in passes:
        calls = contestants(what, x, dy, args.compile)
        timing = undisturbed(partial(interleaved, calls, args.rounds, SAMPLE_SECONDS))
        if args.mapped:
            check_mapped(calls["ours"], x.nbytes)
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
                    rows += measure(case, dtype, layout, args.passes, args)
            keep(rows, f"{dtype} {layout}")
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choice(parser, "--pass", PASSES, dest="passes", metavar="PASS")
    add_choice(parser, "--dtype", tuple(DTYPES))
    add_choice(parser, "--layout", LAYOUTS)
    add_choice(parser, "--shapes", GROUPS)
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
        args.passes, args.layout, args.shapes = ["forward", "backward"], ["nchw"], ["resnet50"]
        args.compile = False
    return args


def main() -> None:
    args = parse_arguments()
    if args.mapped:
        keep_memory()
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    machine = environment()
    console.print("\n".join(f"{key}: {value}" for key, value in machine.items()), highlight=False)

    cases = [case for case in all_cases() if set(case.groups) & set(args.shapes)]
    if args.quick:
        cases = cases[::6]

    def keep(rows: list[Row], kind: str) -> None:
        """A long run shows and saves what it has."""
        if args.mapped:
            mapped_table(select(rows, kind)).print(console)
        else:
            for what in args.passes:
                case_table(rows, kind, what).print(console)
        if args.json:
            settings = {"rounds": args.rounds, "quick": args.quick}
            save(args.json, "mapped" if args.mapped else "layers", machine, settings, rows)

    rows = measure_all(cases, args, keep)
    if not args.mapped:
        summary_table(rows).print(console)
    verdicts = (copy_verdicts if args.mapped else layer_verdicts)(rows)
    verdict_table([v for v in verdicts if v.value is not None]).print(console)
    console.print(str(Alone.of(rows)), highlight=False)
    if args.plot:
        from plot import plot  # matplotlib takes a second to import, and only pictures need it

        plot(rows, machine, args.plot)


if __name__ == "__main__":
    main()
