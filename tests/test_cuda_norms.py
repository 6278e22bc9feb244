"""Instance, group and layer normalization on a GPU, against native layers in float64 on the CPU."""

import copy

import pytest
import torch
from torch import nn

import batchnorm_ext
import tolerances
from gpu_cases import every_plan, kernels_of
from support import assert_within

pytestmark = pytest.mark.only("cuda", reason="a test of the GPU")

SAMPLES = {
    "instance": lambda package: package.InstanceNorm2d(24, affine=True, track_running_stats=True),
    "group": lambda package: package.GroupNorm(4, 24),
    "one group": lambda package: package.GroupNorm(1, 24),
    "groups of one channel": lambda package: package.GroupNorm(24, 24),
}
every_norm_of_samples = pytest.mark.parametrize("norm", SAMPLES)


def assert_like_native_in_float64(native, ours, size, layout, dtype, device):
    """Output, gradients and buffers, with the same parameters; returns x and dy on the device."""
    for parameter in native.parameters():
        nn.init.uniform_(parameter, -2, 2)
    ours.load_state_dict(native.state_dict())
    native.double(), ours.to(device)
    x, dy = (torch.randn(size).to(dtype).to(memory_format=layout) for _ in range(2))
    on_device = x.to(device).requires_grad_(), dy.to(device)
    results = []
    for layer, value, grad in [
        (native, x.double().requires_grad_(), dy.double()),
        (ours, *on_device),
    ]:
        y = layer(value)
        results.append([y, *torch.autograd.grad(y, [value, *layer.parameters()], grad)])
    assert results[1][0].dtype == dtype and results[1][0].stride() == x.stride()
    names = ("y", "dx", "dweight", "dbias")
    for name, exact, actual in zip(names, *results, strict=True):
        # as on the CPU: sums in float32 of terms of both signs, relative to the largest result,
        # and the rounding of the result
        arithmetic = 64 * torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
        bound = exact.abs().max() * arithmetic + tolerances.half_ulp(exact, actual.dtype)
        assert_within(name, actual.cpu(), exact, bound)
    for name, buffer in ours.named_buffers():
        assert_within(name, buffer.cpu(), dict(native.named_buffers())[name], 1e-6)
    return on_device


@every_plan
@every_norm_of_samples
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_of_samples(norm, layout, dtype, plan, device):
    native, ours = SAMPLES[norm](nn), SAMPLES[norm](batchnorm_ext)
    x, _ = assert_like_native_in_float64(native, ours, (5, 24, 19, 17), layout, dtype, device)
    assert any("norm_kernel" in name for name in kernels_of(lambda: ours(x)))


@every_norm_of_samples
def test_same_bits_of_samples_every_time(norm, device):
    layer = SAMPLES[norm](batchnorm_ext).to(device)
    x = torch.randn(8, 24, 56, 56, device=device)
    expected = copy.deepcopy(layer)(x)
    for _ in range(5):
        assert torch.equal(copy.deepcopy(layer)(x), expected)


@every_norm_of_samples
def test_dtype_of_samples_under_autocast(norm, device):
    x = torch.randn(2, 24, 8, 8, device=device).bfloat16()
    native, ours = SAMPLES[norm](nn).to(device), SAMPLES[norm](batchnorm_ext).to(device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert ours(x).dtype == native(x).dtype


class _LayerNormOfChannels(nn.LayerNorm):
    """As users write it."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("size", [(3, 40, 16, 16), (2, 96, 7, 9), (5, 1000, 3, 5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layer_norm_of_channels(size, layout, dtype, device):
    native = _LayerNormOfChannels(size[1]).to(dtype)
    ours = batchnorm_ext.LayerNorm(size[1], channel_dim=1).to(dtype)
    x, _ = assert_like_native_in_float64(native, ours, size, layout, dtype, device)
    names = kernels_of(lambda: ours(x))
    ours_ran = [name for name in names if "across_kernel" in name]
    if layout is torch.contiguous_format:
        assert len(ours_ran) == len(names) == 1, names
    else:
        assert not ours_ran, names
