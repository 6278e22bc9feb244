"""The one table of benchmark cases: BatchNorm layers of two networks, odd shapes, other norms."""

from collections import Counter
from collections.abc import Iterable
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

# The other norms -> dtypes, layouts, shapes: what they are used for, and small ones.
USUAL = ("fp32", "bf16")
ROWS = USUAL, ["rows"], [(8192, 1024), (2048, 4096), (50000, 96), (64, 128)]  # transformers
FAMILY = {
    # diffusion; nnU-Net, style transfer; ConvNeXt
    "GroupNorm": (USUAL, LAYOUTS, [(2, 320, 64, 64), (8, 256, 14, 14), (16, 64, 4, 4)]),
    "InstanceNorm": (USUAL, LAYOUTS, [(2, 32, 64, 128, 128), (4, 64, 256, 256)]),
    "LayerNorm of channels": (USUAL, LAYOUTS, [(16, 96, 56, 56)]),
    "LayerNorm": ROWS,
    "RMSNorm": ROWS,
    "weight_norm": (USUAL, ["rows"], [(512, 512, 3, 3), (1024, 4096), (64, 3, 7, 7)]),
}


# Chains of layers. Shapes are those of ResNet-50, of MobileNetV3 and of diffusion models.
RESNET_CHAINS = ("BatchNorm + ReLU", "BatchNorm + add + ReLU", "BatchNorm + SiLU")
GPU_SHAPES = [(64, 256, 56, 56)]
OTHER_CHAINS = {
    "BatchNorm + Hardswish": [(32, 16, 112, 112), (32, 240, 14, 14), (32, 480, 14, 14)],
    "GroupNorm + SiLU": [(2, 320, 64, 64), (2, 640, 32, 32)],
}


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
    return [
        {"dtype": dtype, "layout": layout, "shape": shape_name(shape)}
        | {name: layers.get(name, 0) for name in NETWORKS}
        for dtype, layout, batch in product(args.dtype, args.layout, args.batch)
        for shape, layers in all_cases(batch).items()
        if layers.keys() & set(args.shapes)
        # (N, C) and a single position are the same memory in both layouts.
        if layout == "nchw" or prod(shape[2:]) > 1
    ]


def chain_cases(device: str) -> list[dict]:
    """On a GPU a few large ones, which are compiled one by one."""
    resnet = [shape for shape in layer_shapes("resnet50") if len(shape) == 4]
    chains = dict.fromkeys(RESNET_CHAINS, resnet) | OTHER_CHAINS
    if device == "cuda":
        chains = dict.fromkeys(RESNET_CHAINS, GPU_SHAPES)
    return [
        {"norm": name, "dtype": dtype, "layout": layout, "shape": shape_name(shape)}
        for name, shapes in chains.items()
        for dtype, layout, shape in product(USUAL, LAYOUTS, shapes)
    ]


def family_cases(norms: Iterable[str]) -> list[dict]:
    return [
        {"norm": norm, "dtype": dtype, "layout": layout, "shape": shape_name(shape)}
        for norm in norms
        for dtype, layout, shape in product(*FAMILY[norm])
    ]
