"""Layer normalization over channels in the CUDA side of the operators."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import tolerances
from batchnorm_ext import reference
from emulator.glue_cases import AFFINE, EPS, every_dtype, needs_glue, ops
from support import assert_within

pytestmark = needs_glue

CHANNELS = {  # (N, positions, channels)
    "whole packs": (3, 64, 12),
    "odd": (2, 35, 70),
    "many positions": (1, 700, 6),
    "one channel": (2, 40, 1),
    "more strips than parts of the gradients": (1030, 3, 2),
}
ORDERS = {
    "contiguous": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels last": Tensor.contiguous,
    "sliced": lambda x: torch.cat([x, x], 2)[:, :, ::2],
}


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("order", ORDERS)
@every_dtype
def test_layer_norm_of_channels(name, order, dtype):
    size = CHANNELS[name]
    draw = random.Random(f"{name} {order} {dtype}").choice
    weight, bias = AFFINE[draw(list(AFFINE))](size[2], dtype)
    x, dy = torch.randn(size) * 2 + torch.randn(*size[:2], 1) * 10, torch.randn(size)
    x, dy = (ORDERS[order](v.to(dtype)) for v in (x, dy))
    domain = (size[1], True, 2)
    if size[2] == 1:
        with pytest.raises(NotImplementedError, match="more than 1 element per statistic"):
            ops.batch_norm(x, weight, bias, None, None, True, EPS, *domain)
        return
    y, stats = ops.batch_norm(x, weight, bias, None, None, True, EPS, *domain)
    rows = (1, -1, size[2])
    normalized = reference.batch_norm(x.double().reshape(rows), training=True, eps=EPS)
    xhat, w = normalized.y.reshape(size), 1 if weight is None else weight.double()
    exact = xhat * w + (0 if bias is None else bias.double())
    assert_within("y", y, exact, tolerances.output(exact, dtype, 10))
    assert y.stride() == torch.empty_like(x).stride()
    relative = tolerances.normalized(dtype, 10)
    assert_within("mean", stats[0], normalized.stats[0], relative / normalized.stats[1])
    assert_within("invstd", stats[1], normalized.stats[1], relative * normalized.stats[1])

    scaled = (dy.double() * w).reshape(rows)
    exact = reference.batch_norm_backward(scaled, x.reshape(rows), None, normalized.stats, True)
    expected = (
        exact.dx.reshape(size),
        (dy.double() * xhat).sum((0, 1)),
        dy.double().sum((0, 1)),
    )
    terms = dy.double().abs().sum((0, 1))
    magnitudes = (4 * expected[0].abs().max() + 1e-3, 4 * terms, terms)
    mask = [draw([True, False]) for _ in range(3)]
    bias_dtype = None if bias is None else bias.dtype
    for wanted in (mask, [True] * 3):
        gradients = ops.batch_norm_backward(dy, x, weight, stats, True, wanted, bias_dtype, *domain)
        assert [g is not None for g in gradients] == wanted
        for what, value, exact, size_of_terms in zip(
            ("dx", "dweight", "dbias"), gradients, expected, magnitudes, strict=True
        ):
            if value is not None:
                bound = tolerances.gradient(exact, size_of_terms, dtype, 10, value.dtype)
                assert_within(what, value, exact, bound)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e37])
def test_range_of_layer_norm_of_channels(scale):
    """Squares of these leave the range of float32."""
    x = ORDERS["contiguous"](torch.randn(2, 33, 40) * scale)
    eps = 1e-42 if scale < 1 else 1e-5
    y, _ = ops.batch_norm(x, None, None, None, None, True, eps, 33, True, 2)
    exact = reference.batch_norm(x.double().reshape(1, 66, 40), training=True, eps=eps).y
    assert_within(
        "y", y, exact.reshape(x.shape), tolerances.output(exact.reshape(x.shape), x.dtype, 4)
    )
