"""Instance, group, layer and root mean square normalization, against native layers in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from batchnorm_ext._rows import default_rms_eps
from family import DTYPES, FEW, NAMES, SIZES, arranged, every_norm, gradients_of, layers, orders
from support import assert_bitwise, assert_within

pytestmark = pytest.mark.only("cpu", reason="test_cuda_norms.py has those on CUDA")


@every_norm
@pytest.mark.parametrize("dtype", DTYPES)
@orders(SIZES)
def test_forward_and_gradients(norm, size, layout, dtype):
    x, dy = (torch.randn(size) * 2 + 1).to(dtype), torch.randn(size).to(dtype)
    x = arranged(x, layout)
    native, ours = layers(norm, size, dtype)
    exact = copy.deepcopy(native).double()
    if exact.eps is None:  # stands for another value in float64
        exact.eps = default_rms_eps(dtype)
    expected = gradients_of(exact, x.double().contiguous(), dy.double())
    for name, actual, exact in zip(NAMES, gradients_of(ours, x, dy), expected, strict=False):
        assert actual.dtype == dtype
        # sums in float32 over at most 2e5 elements of terms of both signs, relative to the largest
        # result, and the rounding of the result
        arithmetic = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        bound = exact.abs() * torch.finfo(dtype).eps / 2 + exact.abs().max() * arithmetic
        assert_within(name, actual, exact, bound)
    if norm.startswith(("instance", "group")) and layout in ("contiguous", "channels last"):
        assert ours(x).stride() == x.stride()


@every_norm
@pytest.mark.parametrize("size", FEW)
@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4])
def test_output_is_accurate_at_any_mean(norm, size, ratio):
    """The bound of README: 4e-7 of the output's scale. Root mean squares have no small variance."""
    x = torch.randn(size) + ratio
    native, ours = layers(norm, size)
    exact = copy.deepcopy(native).double()
    if exact.eps is None:
        exact.eps = default_rms_eps(x.dtype)
    exact = exact(x.double())
    bound = 4e-7 * exact.abs().max() + exact.abs() * torch.finfo(torch.float32).eps / 2
    assert_within("y", ours(x), exact, bound)


@every_norm
@orders([(3, 4, 5), (2, 4, 3, 2)], ["contiguous", "channels last"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives(norm, size, layout, check):
    x = arranged(torch.randn(size, dtype=torch.float64), layout)
    _, ours = layers(norm, size, torch.float64)
    names = [name for name, _ in ours.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x,))

    assert check(function, (x.requires_grad_(), *ours.parameters()))


@pytest.mark.parametrize("size, groups, centred", [((3, 4, 5), 2, True), ((3, 4), 1, False)])
def test_operator(size, groups, centred):
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in (size, 4, 4))
    arguments = (x, weight, bias, None, None, True, 1e-5, groups, centred)
    torch.library.opcheck(torch.ops.batchnorm_ext.batch_norm, arguments)
    torch.library.opcheck(
        torch.ops.batchnorm_ext.layer_norm, (x, [size[-1]], None, None, centred, 1e-5)
    )


@every_norm
@pytest.mark.parametrize("size", [(64, 64, 14, 14), (8, 40, 64, 64)])
def test_same_bits_for_any_number_of_threads(norm, size):
    _, ours = layers(norm, size)
    x, dy = torch.randn(size), torch.randn(size)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(gradients_of(ours, x, dy))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, actual, expected in zip(NAMES, other, results[0], strict=False):
            assert_bitwise(name, actual, expected)


@every_norm
def test_constant_has_no_variance(norm):
    """Whatever the constant: each result is the bias, or the sign of the constant in its place."""
    size = (2, 4, 9, 9)
    _, ours = layers(norm, size)
    for parameter in ours.parameters():
        nn.init.ones_(parameter)
    for value in (1000.1, -3e30, 1e-20):
        y = ours(torch.full(size, value))
        if norm.startswith("rms"):
            assert_within("y", y, y.mean().expand(size), 1e-6)
        else:
            expected = 1.0 if getattr(ours, "bias", None) is not None else 0.0
            assert_bitwise("y", y, torch.full(size, expected))


@every_norm
@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e37])
def test_range_of_float32(norm, scale):
    size = (2, 4, 9, 9)
    native, ours = layers(norm, size)
    native.eps = ours.eps = 1e-42 if scale < 1 else 1e-5
    x = torch.randn(size) * scale
    native.double()
    exact = native(x.double()).detach()
    assert_within("y", ours(x), exact, exact.abs().max() * 1e-6)


@every_norm
def test_nan_stays_in_its_sample(norm):
    size = (3, 4, 9, 9)
    _, ours = layers(norm, size)
    x = torch.randn(size)
    clean = ours(x)
    x[1, 2, 3, 4] = torch.nan
    y = ours(x)
    assert y[1].isnan().any()
    assert_bitwise("other samples", y[::2], clean[::2])
