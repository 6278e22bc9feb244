"""The one table of cases: the sizes, layouts, dtypes and options that the tests run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def _stored_as(order: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The layout whose memory holds the dimensions in this order, outermost first."""

    def lay_out(values: Tensor) -> Tensor:
        stored = values.permute(*order).clone(memory_format=torch.contiguous_format)
        return stored.permute([order.index(d) for d in range(values.dim())])

    return lay_out


def _window(values: Tensor, size: Sequence[int], window: tuple[slice, ...]) -> Tensor:
    """The values in a window of a larger tensor that is NaN elsewhere, where nobody may read."""
    larger = torch.full(size, torch.nan, dtype=values.dtype, device=values.device)
    larger[window] = values
    return larger[window]


def _every_other(values: Tensor) -> Tensor:
    size = (*values.shape[:-1], 2 * values.shape[-1])
    return _window(values, size, (..., slice(None, None, 2)))


def _channel_slice(values: Tensor) -> Tensor:
    size = (values.shape[0], values.shape[1] + 3, *values.shape[2:])
    return _window(values, size, (slice(None), slice(1, -2)))


def _offset(values: Tensor) -> Tensor:
    flat = _window(values.reshape(-1), (values.numel() + 1,), (slice(1, None),))
    return flat.view(values.shape)


# Each takes a contiguous tensor and gives one of the same size in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v.clone(memory_format=torch.contiguous_format),
    # torch.channels_last, torch.channels_last_3d and (N, L, C).transpose(1, 2)
    "channels_last": lambda v: _stored_as([0, *range(2, v.dim()), 1])(v),
    "channels_first": lambda v: _stored_as([1, 0, *range(2, v.dim())])(v),
    "reversed": lambda v: _stored_as(range(v.dim())[::-1])(v),
    "last_two_swapped": lambda v: v.mT.clone(memory_format=torch.contiguous_format).mT,
    "offset": _offset,
    "every_other": _every_other,
    "channel_slice": _channel_slice,
    "expanded": lambda v: v[:1].expand_as(v),
}

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

AFFINE = {
    "both": (True, True),
    "weight": (True, False),
    "bias": (False, True),
    "none": (False, False),
}


@dataclass(frozen=True)
class Case:
    """One input and the options of the call; ``param_dtype`` None is the dtype of the input."""

    size: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    affine: str = "both"
    track: bool = True
    momentum: float | None = 0.1
    param_dtype: torch.dtype | None = torch.float32
    eps: float = 1e-5

    def __str__(self) -> str:
        named = {
            "affine": self.affine,
            "track": self.track,
            "momentum": self.momentum,
            "param": _short(self.param_dtype or self.dtype),
            "eps": self.eps,
        }
        usual = {"affine": "both", "track": True, "momentum": 0.1, "param": "float32", "eps": 1e-5}
        options = [f"{key}={value}" for key, value in named.items() if value != usual[key]]
        size = "x".join(map(str, self.size))
        return "-".join([size, self.layout, _short(self.dtype), *options])

    @property
    def trainable(self) -> bool:
        """Whether a channel holds more than one element, or none at all."""
        elements = torch.Size(self.size).numel()
        return elements == 0 or elements > self.size[1]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SIZES = [
    # no element
    (0, 3),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
    (2, 0, 4, 4),
    # one element per channel
    (1, 5),
    (1, 5, 1, 1),
    # (N, C), and images of one pixel
    (2, 17),
    (32, 64),
    (257, 3),
    (20000, 1),
    (2, 2048),
    (32, 64, 1),
    (4, 2048, 1, 1),
    # (N, C, L)
    (3, 17, 11),
    (2, 64, 196),
    # images: one, two or three channels; the sizes of residual networks; odd ones
    (1, 1, 7, 7),
    (2, 3, 7, 7),
    (4, 17, 7, 7),
    (2, 2048, 7, 7),
    (3, 64, 14, 14),
    (1, 17, 13, 9),
    (5, 3, 31, 1),
    (2, 8, 112, 112),
    (1, 2, 301, 211),
    # (N, C, D, H, W)
    (2, 3, 5, 6, 7),
    (1, 64, 3, 5, 5),
]
FEW_SIZES = [(33, 17), (2, 17, 7, 9), (2, 3, 4, 5, 6), (2, 5, 40, 33)]
ONE_SIZE = (3, 17, 7, 9)
# Outputs of more than 32 MB, which the CPU kernels stream past the caches; rows of no round size.
LARGE = [
    ((33, 65, 65, 63), "contiguous", torch.float32),
    ((33, 65, 65, 63), "channels_last", torch.float32),
    ((33, 5435, 7, 7), "contiguous", torch.float32),
    ((67, 65, 65, 63), "contiguous", torch.bfloat16),
    ((67, 65, 65, 63), "channels_last", torch.bfloat16),
]


def _table() -> list[Case]:
    sizes = [
        Case(size, layout, dtype)
        for size in SIZES
        for layout in (["contiguous", "channels_last"] if len(size) > 2 else ["contiguous"])
        for dtype in DTYPES
    ]
    layouts = [
        Case(size, layout, dtype)
        for size in FEW_SIZES
        for layout in LAYOUTS
        for dtype in [torch.float32, torch.bfloat16]
    ]
    plain = [
        Case(ONE_SIZE, layout, dtype)
        for layout in ["contiguous", "channels_last"]
        for dtype in DTYPES
    ]
    options = [
        replace(case, **change)
        for case in plain
        for change in [
            *({"affine": affine} for affine in AFFINE if affine != "both"),
            {"track": False},
            {"track": False, "affine": "none"},
            *({"momentum": momentum} for momentum in [None, 0.0, 1.0]),
            {"param_dtype": None},
            {"param_dtype": None, "momentum": None},
            {"eps": 1e-3},
        ]
    ]
    large = [Case(*case) for case in LARGE]
    return list(dict.fromkeys(sizes + layouts + options + large))


CASES = _table()
TRAINING_CASES = [case for case in CASES if case.trainable]
EVAL_CASES = [case for case in CASES if case.track]
