"""Instance, group, layer, root mean square and weight normalization, forward and backward together.

    python benchmarks/bench_family.py --allocator both --runs 3

Writes family-<allocator>.csv, milliseconds: this library, native PyTorch, what users write by hand
where there is a usual formula, native under torch.compile, and a clone of the input.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from tqdm import tqdm

import batchnorm_ext
import environment
import report
import results
import timing
from cases import DTYPES


class ByHand(nn.Module):
    """Layer normalization of channels, as ConvNeXt has it."""

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(f(channels)) for f in (torch.ones, torch.zeros))

    def forward(self, x):
        rows = x.permute(0, 2, 3, 1)
        return F.layer_norm(rows, self.weight.shape, self.weight, self.bias).permute(0, 3, 1, 2)


Make = Callable[[object, tuple[int, ...]], nn.Module]
NORMS: dict[str, tuple[Make, list[tuple[int, ...]]]] = {
    "GroupNorm": (
        lambda lib, shape: lib.GroupNorm(32, shape[1]),
        [
            (2, 320, 64, 64),
            (2, 640, 32, 32),
            (2, 1280, 16, 16),
            (8, 256, 14, 14),
            (2, 128, 256, 256),
        ],
    ),
    "InstanceNorm": (
        lambda lib, shape: getattr(lib, f"InstanceNorm{len(shape) - 2}d")(shape[1], affine=True),
        [(2, 32, 64, 128, 128), (4, 64, 256, 256), (8, 256, 14, 14)],
    ),
    "LayerNorm": (
        lambda lib, shape: lib.LayerNorm(shape[-1]),
        [(8192, 1024), (2048, 4096), (50000, 96), (64, 128)],
    ),
    "RMSNorm": (
        lambda lib, shape: lib.RMSNorm(shape[-1]),
        [(8192, 1024), (2048, 4096), (50000, 96), (64, 128)],
    ),
    "LayerNorm of channels": (
        lambda lib, shape: getattr(lib, "LayerNorm" if lib is batchnorm_ext else "ByHand")(
            shape[1], channel_dim=1
        ),
        [(16, 96, 56, 56), (16, 384, 14, 14), (16, 768, 7, 7)],
    ),
    "weight_norm": (None, [(512, 512, 3, 3), (1024, 4096), (64, 3, 7, 7)]),
}


class WeightNorm(nn.Module):
    """The weight alone, as a function of its direction."""

    def __init__(self, library, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(shape[0], *[1] * (len(shape) - 1)))
        norm = parametrizations if library is nn else batchnorm_ext
        linear = norm.weight_norm(nn.Linear(1, 1))
        self.norm = linear.parametrizations.weight[0]

    def forward(self, v):
        return self.norm(self.g, v)


nn.ByHand = ByHand


def call(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> timing.Call:
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(module(x), leaves, dy)


def measure(name: str, shape: tuple[int, ...], dtype: str, layout: str, args: Namespace) -> dict:
    make = NORMS[name][0] or WeightNorm
    x, dy = (torch.randn(shape).to(DTYPES[dtype]) for _ in range(2))
    if layout == "nhwc":
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    x.requires_grad_()
    native, ours = (make(library, shape).to(x.dtype) for library in (nn, batchnorm_ext))
    calls = {"copy": x.detach().clone, "ours": call(ours, x, dy), "native": call(native, x, dy)}
    if not args.quick:
        torch._dynamo.reset()
        calls["compiled"] = call(torch.compile(native, dynamic=False), x, dy)
    times = timing.interleaved(calls, args.rounds, timing.CPU_SECONDS)
    where = {"dtype": dtype, "layout": layout, "shape": results.shape_name(shape)}
    return {"norm": name, "pass": "module"} | where | times


def cases() -> Iterator[tuple]:
    for name, (_, shapes) in NORMS.items():
        for shape in shapes:
            for dtype in ("fp32", "bf16"):
                images = len(shape) > 2 and name != "weight_norm"
                for layout in ("nchw", "nhwc") if images else ("nchw",):
                    yield name, shape, dtype, layout


def main() -> None:
    parser = environment.make_parser(__doc__, rounds=9)
    parser.add_argument("--runs", type=int, default=1, help="of which the median is kept")
    args = parser.parse_args()
    args.rounds = 3 if args.quick else args.rounds
    environment.start(args)
    path, machine = environment.path(args, "family"), environment.machine(args)
    rows: list[dict] = []
    for i in range(args.runs):
        with tqdm(
            list(cases())[:: 8 if args.quick else 1], desc=f"run {i + 1}", file=sys.stderr
        ) as bar:
            for case in bar:
                bar.set_postfix_str(" ".join(map(str, case)))
                rows.append(measure(*case, args))
                results.write(path, machine, results.median_run(pd.DataFrame(rows)))
    print(f"{path}\n\n{report.family_table(results.read(path))}")


if __name__ == "__main__":
    main()
