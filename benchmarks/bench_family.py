"""Instance, group, layer, root mean square and weight normalization, forward and backward together.

    python benchmarks/bench_family.py --allocator both --runs 3

Writes family-<allocator>.csv, milliseconds: this library, native PyTorch (for layer normalization
of channels the formula that users write), the same under torch.compile, a clone of the input.
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

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(f(channels)) for f in (torch.ones, torch.zeros))

    def forward(self, x):
        rows = x.permute(0, 2, 3, 1)
        return F.layer_norm(rows, self.weight.shape, self.weight, self.bias).permute(0, 3, 1, 2)


class WeightNorm(nn.Module):
    """The weight alone, as a function of its direction."""

    def __init__(self, weight_norm: Callable, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(shape[0], *[1] * (len(shape) - 1)))
        self.norm = weight_norm(nn.Linear(1, 1)).parametrizations.weight[0]

    def forward(self, v):
        return self.norm(self.g, v)


Make = Callable[[tuple[int, ...]], nn.Module]


def both(make: Callable[[object, tuple[int, ...]], nn.Module]) -> tuple[Make, Make]:
    """Native and ours."""
    return (lambda shape: make(nn, shape)), (lambda shape: make(batchnorm_ext, shape))


ROWS = [(8192, 1024), (2048, 4096), (50000, 96), (64, 128)]
NORMS: dict[str, tuple[Make, Make, list[tuple[int, ...]]]] = {
    "GroupNorm": (
        *both(lambda lib, shape: lib.GroupNorm(32, shape[1])),
        [
            (2, 320, 64, 64),
            (2, 640, 32, 32),
            (2, 1280, 16, 16),
            (8, 256, 14, 14),
            (2, 128, 256, 256),
        ],
    ),
    "InstanceNorm": (
        *both(lambda lib, s: getattr(lib, f"InstanceNorm{len(s) - 2}d")(s[1], affine=True)),
        [(2, 32, 64, 128, 128), (4, 64, 256, 256), (8, 256, 14, 14)],
    ),
    "LayerNorm": (*both(lambda lib, shape: lib.LayerNorm(shape[-1])), ROWS),
    "RMSNorm": (*both(lambda lib, shape: lib.RMSNorm(shape[-1])), ROWS),
    "LayerNorm of channels": (
        lambda shape: ByHand(shape[1]),
        lambda shape: batchnorm_ext.LayerNorm(shape[1], channel_dim=1),
        [(16, 96, 56, 56), (16, 384, 14, 14), (16, 768, 7, 7)],
    ),
    "weight_norm": (
        lambda shape: WeightNorm(parametrizations.weight_norm, shape),
        lambda shape: WeightNorm(batchnorm_ext.weight_norm, shape),
        [(512, 512, 3, 3), (1024, 4096), (64, 3, 7, 7)],
    ),
}


def call(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> timing.Call:
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(module(x), leaves, dy)


def measure(name: str, shape: tuple[int, ...], dtype: str, layout: str, args: Namespace) -> dict:
    x, dy = (torch.randn(shape).to(DTYPES[dtype]) for _ in range(2))
    if layout == "nhwc":
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    x.requires_grad_()
    native, ours = (make(shape).to(x.dtype) for make in NORMS[name][:2])
    calls = {"copy": x.detach().clone, "ours": call(ours, x, dy), "native": call(native, x, dy)}
    if not args.quick:
        torch._dynamo.reset()
        calls["compiled"] = call(torch.compile(native, dynamic=False), x, dy)
    times = timing.interleaved(calls, args.rounds, timing.CPU_SECONDS)
    where = {"dtype": dtype, "layout": layout, "shape": results.shape_name(shape)}
    return {"norm": name, "pass": "module"} | where | times


def cases() -> Iterator[tuple]:
    for name, (_, _, shapes) in NORMS.items():
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
