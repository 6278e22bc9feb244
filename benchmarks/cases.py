"""The one table of benchmark cases: every BatchNorm layer of two networks, and odd shapes."""

from collections import Counter
from functools import partial
from itertools import product
from math import prod

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from networks import NETWORKS
from results import LAYOUTS, PASSES, shape_name

GROUPS = (*NETWORKS, "odd", "large")
USUAL_GROUPS = GROUPS[:-1]  # what a CPU gets through in reasonable time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Overhead-bound, 2-D, 3-D and 5-D inputs, odd extents, few and many channels, HW of 1.
ODD = [
    *[(8, 16, 8, 8), (32, 64), (256, 1000), (4096, 64), (1, 64, 56, 56), (4, 17, 13, 13)],
    *[(8, 3, 255, 255), (2, 3, 224, 224), (16, 32, 512), (2, 16, 16, 32, 32), (64, 2048, 1, 1)],
]


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


def all_cases(batch: int) -> dict[tuple[int, ...], dict[str, int]]:
    """Shape -> how many layers of each network have it. Networks first, then odd and large ones."""
    cases: dict[tuple[int, ...], dict[str, int]] = {}
    for name in NETWORKS:
        for shape, count in layer_shapes(name, batch).items():
            cases.setdefault(shape, {})[name] = count
    return cases | {shape: {"odd": 1} for shape in ODD} | {(16, 64, 256, 256): {"large": 1}}


def add_case_options(parser, passes, dtypes, shapes, batch=32) -> None:
    add = partial(parser.add_argument, nargs="+")
    add("--pass", dest="passes", choices=PASSES, default=passes)
    add("--dtype", choices=DTYPES, default=dtypes)
    add("--layout", choices=LAYOUTS, default=LAYOUTS)
    add("--shapes", choices=GROUPS, default=shapes)
    add("--batch", type=int, default=[batch], help="of the layers of the networks")


def chosen_cases(args) -> list[dict]:
    """The columns of a case in a result file, for these options."""
    cases = [
        {"dtype": dtype, "layout": layout, "shape": shape_name(shape)}
        | {name: layers.get(name, 0) for name in NETWORKS}
        for dtype, layout, batch in product(args.dtype, args.layout, args.batch)
        for shape, layers in all_cases(batch).items()
        if layers.keys() & set(args.shapes)
    ]
    # (N, C) and a single position are the same memory in both layouts.
    single = {shape_name(shape) for shape in ODD if prod(shape[2:]) == 1}
    return [case for case in cases if case["layout"] == "nchw" or case["shape"] not in single]
