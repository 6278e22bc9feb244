"""The one table of benchmark cases: every BatchNorm layer of two networks, and odd shapes."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from math import prod

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from networks import NETWORKS
from results import LAYOUTS

GROUPS = (*NETWORKS, "odd", "large")
USUAL_GROUPS = GROUPS[:-1]  # what a CPU gets through in reasonable time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
USUAL_DTYPES = ("fp32", "bf16")

# Overhead-bound, 2-D, 3-D and 5-D inputs, odd extents, few and many channels, HW of 1.
ODD = [
    *[(8, 16, 8, 8), (32, 64), (256, 1000), (4096, 64), (1, 64, 56, 56), (4, 17, 13, 13)],
    *[(8, 3, 255, 255), (2, 3, 224, 224), (16, 32, 512), (2, 16, 16, 32, 32), (64, 2048, 1, 1)],
]
LARGE = (16, 64, 256, 256)


@dataclass(frozen=True)
class Case:
    """An input shape, and how many layers of each network (or of `large`) have it."""

    shape: tuple[int, ...]
    layers: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self.layers) or ("odd",)

    @property
    def layouts(self) -> tuple[str, ...]:
        """One layout where both are the same memory: `(N, C)`, and a single position."""
        return LAYOUTS if prod(self.shape[2:]) > 1 else LAYOUTS[:1]


def to_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x in memory order N, C, *spatial ("nchw") or N, *spatial, C ("nhwc"), at the same shape."""
    if layout == "nchw":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def layer_shapes(name: str, batch: int = 32, size: int = 224) -> Counter:
    """Input shape of every BatchNorm layer -> number of layers, from a run on the meta device."""
    shapes: Counter = Counter()
    with torch.device("meta"):
        network, images = NETWORKS[name](), torch.empty(batch, 3, size, size)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(lambda _, args: shapes.update([tuple(args[0].shape)]))
    network(images)
    return shapes


@cache
def all_cases(batch: int = 32) -> list[Case]:
    """Every case once: layers in the order of the networks, then odd and large shapes."""
    layers: dict[tuple[int, ...], dict[str, int]] = {}
    for name in NETWORKS:
        for shape, count in layer_shapes(name, batch).items():
            layers.setdefault(shape, {})[name] = count
    cases = [Case(shape, counts) for shape, counts in layers.items()]
    return [*cases, *map(Case, ODD), Case(LARGE, {"large": 1})]


def chosen_cases(args) -> list[tuple[Case, str, str]]:
    """(case, dtype, layout) for the options --batch, --shapes, --dtype and --layout."""
    return [
        (case, dtype, layout)
        for dtype in args.dtype
        for layout in args.layout
        for batch in args.batch
        for case in all_cases(batch)
        if layout in case.layouts and set(case.groups) & set(args.shapes)
    ]
