"""Folded models compute what they did: float64 outputs of every kind of pair."""

import copy
import itertools

import pytest
import torch
from torch import nn

import batchnorm_ext
import networks as small
from batchnorm_ext import fold
from benchmarks import networks
from support import assert_bitwise, assert_within

pytestmark = pytest.mark.only("cpu", reason="of the parameters alone")

C = 4
# Two float64 sums of a few hundred terms in another order: some 1e-15 of the largest, per layer.
EXACT = 1e-12


def randomize(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In evaluation, with parameters and statistics that make every term count."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            nn.init.normal_(tensor, 0.3, 0.5)
    return model.eval().to(dtype)


def assert_folds(model: nn.Module, x: torch.Tensor, norms: int, left: int = 0) -> nn.Module:
    """Fold a copy: as many norms, no other, and the same outputs."""
    expected = model(x)
    folded, report = fold(model, report=True)
    assert (len(report.done), len(report.left)) == (norms, left), str(report)
    assert_within("output", folded(x), expected, EXACT * expected.abs().max())
    return folded


def assert_leaves(model: nn.Module, reason: str, name: str = "1") -> None:
    """Fold a copy: nothing, for that reason."""
    folded, report = fold(model, report=True)
    assert report.done == {} and reason in report.left[name], str(report)
    for key, value in model.state_dict().items():
        assert_bitwise(key, folded.state_dict()[key], value)


def image(dims: int, channels: int = C) -> torch.Tensor:
    return torch.randn(3, channels, *(13, 12, 11)[:dims], dtype=torch.float64)


def norm_of(kind: str, dims: int, package=batchnorm_ext, **options) -> nn.Module:
    if kind == "Sync":
        return package.SyncBatchNorm(C, **options)
    tracking = {} if kind == "Batch" else {"track_running_stats": True}
    return getattr(package, f"{kind}Norm{dims}d")(C, **tracking, **options)


layers = pytest.mark.parametrize("dims", [1, 2, 3])
biases = pytest.mark.parametrize("bias", [True, False])
groups = pytest.mark.parametrize("groups", [1, 2, 4])
norms = pytest.mark.parametrize("kind", ["Batch", "Instance", "Sync"])
packages = pytest.mark.parametrize("package", [nn, batchnorm_ext])
affine = pytest.mark.parametrize("affine", [True, False])


def every_pair(test):
    for mark in (layers, biases, groups, norms, packages, affine):
        test = mark(test)
    return test


# After a layer: always


@every_pair
def test_norm_after_convolution(dims, bias, groups, kind, package, affine):
    norm = norm_of(kind, dims, package, affine=affine)
    for name in ("Conv", "ConvTranspose"):
        # 8 inputs: neither axis of the weight passes for the other
        layer = getattr(nn, f"{name}{dims}d")(8, C, 3, 2, 1, groups=groups, bias=bias)
        model = randomize(nn.Sequential(layer, norm, nn.ReLU()))
        folded = assert_folds(model, image(dims, 8), 1)
        assert type(folded[1]) is nn.Identity and folded[0].bias.shape == (C,)


@layers
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_norm_after_padding(dims, mode):
    layer = getattr(nn, f"Conv{dims}d")(C, C, 3, padding=2, dilation=2, padding_mode=mode)
    assert_folds(randomize(nn.Sequential(layer, norm_of("Batch", dims))), image(dims), 1)


@biases
@packages
@affine
@pytest.mark.parametrize("kind", ["Batch", "Sync"])
def test_linear_on_either_side(bias, package, affine, kind):
    x = image(0)
    for layers in (
        [nn.Linear(C, C, bias), norm_of(kind, 1, package, affine=affine)],
        [norm_of(kind, 1, package, affine=affine), nn.Linear(C, 6, bias)],
    ):
        assert_folds(randomize(nn.Sequential(*layers)), x, 1)


# Before a layer: where no shift is missing


@every_pair
def test_norm_before_convolution_without_padding(dims, bias, groups, kind, package, affine):
    layer = getattr(nn, f"Conv{dims}d")(C, 8, 3, 2, dilation=2, groups=groups, bias=bias)
    norm = norm_of(kind, dims, package, affine=affine)
    assert_folds(randomize(nn.Sequential(norm, layer)), image(dims), 1)


def is_exact_after_a_shift(layer: nn.Module, dims: int) -> bool:
    """Whether a constant input gives a constant output, as a shift of the input has to."""
    y = layer(torch.ones_like(image(dims)[:1])) - layer(torch.zeros_like(image(dims)[:1]))
    y = y.flatten(2)
    return bool((y - y[..., :1]).abs().max() < EXACT)


def conv_options():
    for kernel, padding, dilation, stride in itertools.product((1, 3), (0, 1), (1, 2), (1, 2)):
        for mode in ("zeros", "reflect", "replicate", "circular"):
            options = {"padding": padding, "dilation": dilation, "padding_mode": mode}
            yield kernel, {"stride": stride, **options}
    for kernel, padding in itertools.product((1, 3), ("same", "valid")):
        yield kernel, {"padding": padding}


def transposed_options():
    for kernel, padding, dilation, stride, extra in itertools.product(
        (1, 2, 3), (0, 1, 2, 4, 5), (1, 2), (1, 2, 3), (0, 1)
    ):
        if extra < max(stride, dilation):
            options = {"padding": padding, "dilation": dilation, "output_padding": extra}
            yield kernel, {"stride": stride, **options}


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("name, table", [("", conv_options), ("Transpose", transposed_options)])
def test_norm_before_convolution_is_folded_exactly_where_it_can_be(dims, name, table):
    """Each of these layers is linear: folding is right if and only if a shift stays one."""
    outcomes = set()
    for kernel, options in table():
        layer = getattr(nn, f"Conv{name}{dims}d")(C, 8, kernel, **options)
        model = randomize(nn.Sequential(norm_of("Batch", dims), layer))
        exact = is_exact_after_a_shift(layer, dims)
        outcomes.add(exact)
        assert_folds(model, image(dims), int(exact), int(not exact))
        nn.init.zeros_(model[0].running_mean)
        nn.init.zeros_(model[0].bias)
        assert_folds(model, image(dims), 1)  # without a shift
    assert outcomes == {True, False}


def test_reasons_of_the_border():
    norm = norm_of("Batch", 2)
    for layer, reason in (
        (nn.Conv2d(C, C, 3, padding=1), "after it 1 (Conv2d): pads with zeros"),
        (nn.ConvTranspose2d(C, C, 2, 2), "after it 1 (ConvTranspose2d): its outputs get different"),
    ):
        assert_leaves(randomize(nn.Sequential(norm, layer)), reason, "0")


# Several


def test_several_norms_share_a_layer():
    def norm():
        return norm_of("Batch", 2)

    layers = [norm(), norm(), nn.Conv2d(C, C, 1), norm(), nn.Dropout2d(), nn.Identity(), norm()]
    assert_folds(randomize(nn.Sequential(*layers)), image(2), 4)


def test_the_layer_before_comes_first():
    layers = [nn.Conv2d(C, C, 1), norm_of("Batch", 2), nn.Conv2d(C, C, 1)]
    folded = assert_folds(model := randomize(nn.Sequential(*layers)), image(2), 1)
    assert_bitwise("layer after", folded[2].weight, model[2].weight)


@pytest.mark.parametrize("name", networks.NETWORKS)
@pytest.mark.parametrize("convert", [copy.deepcopy, batchnorm_ext.convert])
def test_networks(name, convert):
    model = convert(randomize(networks.NETWORKS[name]()))
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert_folds(model, torch.randn(1, 3, 64, 64, dtype=torch.float64), count)


def test_networks_with_preactivation():
    """As in DenseNet: norm, activation, convolution; the last norm of a block meets a layer."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.conv1 = nn.BatchNorm2d(C), nn.Conv2d(C, C, 1, bias=False)
            self.norm2, self.conv2 = nn.BatchNorm2d(C), nn.Conv2d(C, C, 3, padding=1, bias=False)

        def forward(self, x):
            y = self.conv1(self.norm1(x).relu())
            return torch.cat([x, self.conv2(self.norm2(y).relu())], 1)

    folded = assert_folds(randomize(Block()), image(2), 1, 1)
    assert type(folded.norm2) is nn.Identity


@pytest.mark.parametrize("convert", [batchnorm_ext.convert, batchnorm_ext.convert_sync_batchnorm])
def test_converted_models(convert):
    model = randomize(convert(small.Net()))
    assert_folds(model, small.make_input("cpu").double(), 2)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "googlenet"])
def test_torchvision(name):
    models = pytest.importorskip("torchvision").models
    model = randomize(getattr(models, name)(weights=None))
    folded, report = fold(model, report=True)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    assert len(report.done) > 10 and not report.note
    assert_within("output", folded(x), expected, EXACT * expected.abs().max())


# Dtypes and memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(dtype):
    model = randomize(nn.Sequential(nn.Conv2d(C, C, 3), norm_of("Batch", 2)), dtype)
    folded, report = fold(model, report=True)
    exact = fold(copy.deepcopy(model).double())
    for name, value in folded.state_dict().items():
        assert_bitwise(name, value, exact.state_dict()[name].to(dtype))
    name = str(dtype).removeprefix("torch.")
    says_so = f", rounded to {name}" if dtype.itemsize == 2 else ""
    assert report.done == {"1": f"into 0 (Conv2d){says_so}"}


def test_parameters_keep_what_they_are():
    model = randomize(nn.Sequential(nn.Conv2d(C, C, 3), norm_of("Batch", 2)))
    model.requires_grad_(False).to(memory_format=torch.channels_last)
    folded = fold(model)
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(type(own) is nn.Parameter for own in folded.parameters())
    assert not any(own.requires_grad for own in folded.parameters())
