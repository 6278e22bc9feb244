"""The norms beside batch normalization: the one table of their layers, sizes and layouts."""

from functools import partial

import pytest
import torch
from torch import nn

import batchnorm_ext

C = 12


def instance(size, **options):
    return f"InstanceNorm{len(size) - 2}d", (size[1],), {"affine": True, **options}


NORMS = {
    "instance": instance,
    "instance, not affine": partial(instance, affine=False),
    "instance, tracking": partial(instance, track_running_stats=True),
    "group": lambda size: ("GroupNorm", (2, size[1]), {}),
    "group, all channels": lambda size: ("GroupNorm", (1, size[1]), {}),
    "group, not affine": lambda size: ("GroupNorm", (size[1] // 2, size[1]), {"affine": False}),
    "layer": lambda size: ("LayerNorm", (size[-1],), {}),
    "layer, samples": lambda size: ("LayerNorm", (size[1:],), {}),
    "layer, no bias": lambda size: ("LayerNorm", (size[-1],), {"bias": False}),
    "rms": lambda size: ("RMSNorm", (size[-1],), {}),
    "rms, samples": lambda size: ("RMSNorm", (size[1:],), {"eps": 1e-3}),
    "rms, not affine": lambda size: ("RMSNorm", (size[-1],), {"elementwise_affine": False}),
}
# (N, C, L), images of few and of many elements, volumes; rows of a group that are short and long
SIZES = [
    (5, C, 7),
    (3, C, 5, 3),
    (2, C, 24, 25),
    (2, C, 130, 131),
    (2, C, 3, 5, 8),
    (70, C, 1, 5),
    (3, 300, 3, 3),
]
FEW = [(5, C, 7), (3, C, 5, 3), (2, C, 24, 25)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels last", "sliced", "samples last"]


def orders(sizes, layouts=LAYOUTS):
    """Each size in each order of memory that it has: channels_last is for images and volumes."""
    pairs = [(s, o) for s in sizes for o in layouts if o != "channels last" or len(s) in (4, 5)]
    return pytest.mark.parametrize("size, layout", pairs)


every_norm = pytest.mark.parametrize("norm", NORMS)


def arranged(x, layout):
    """x in another order of memory."""
    if layout == "channels last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.to(memory_format=formats[x.dim()])
    if layout == "sliced":
        return torch.cat([x, x], 1)[:, : x.size(1)]
    if layout == "samples last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return x


def layers(norm, size, dtype=torch.float32):
    """The native layer and ours, with the same parameters, not 1 and 0."""
    name, arguments, options = NORMS[norm](size)
    native, ours = (
        getattr(package, name)(*arguments, **options).to(dtype) for package in (nn, batchnorm_ext)
    )
    for parameter in native.parameters():
        nn.init.uniform_(parameter, -2, 2)
    ours.load_state_dict(native.state_dict())
    return native, ours


def gradients_of(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))]


NAMES = ("y", "dx", "dweight", "dbias")
