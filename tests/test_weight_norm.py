"""Weight normalization, against PyTorch's parametrization in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations, parametrize

import batchnorm_ext
from support import assert_bitwise, assert_within

pytestmark = pytest.mark.only("cpu", reason="on CUDA this is PyTorch's own")

LAYERS = {
    "linear": (lambda: nn.Linear(33, 7), 0),
    "linear, by input": (lambda: nn.Linear(33, 7), 1),
    "linear, one norm": (lambda: nn.Linear(33, 7), None),
    "convolution": (lambda: nn.Conv2d(5, 6, 3), 0),
    "convolution, by input": (lambda: nn.Conv2d(5, 6, 3), 1),
    "convolution, by column": (lambda: nn.Conv2d(5, 6, 3), 3),
    "transposed convolution": (lambda: nn.ConvTranspose1d(5, 6, 3), 1),
    "wide": (lambda: nn.Linear(40000, 3), 0),
    "one element for each norm": (lambda: nn.Linear(1, 7), 0),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def _pair(layer, dtype=torch.float32):
    make, dim = LAYERS[layer]
    native = make().to(dtype)
    ours = copy.deepcopy(native)
    return parametrizations.weight_norm(native, dim=dim), batchnorm_ext.weight_norm(ours, dim=dim)


def _weight_and_gradients(module, dw):
    g, v = module.parametrizations.weight.original0, module.parametrizations.weight.original1
    w = module.weight
    return [w, *torch.autograd.grad(w, [g, v], dw.to(w.dtype))]


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weight_and_gradients(layer, dtype):
    native, ours = _pair(layer, dtype)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    native.load_state_dict(ours.state_dict())
    dw = torch.randn(ours.weight.shape).to(dtype)
    exact = _weight_and_gradients(native.double(), dw)
    for name, actual, expected in zip("wgv", _weight_and_gradients(ours, dw), exact, strict=True):
        assert actual.dtype == dtype
        # float32 sums of at most 40000 terms, relative to the largest result; the result's rounding
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        bound = 32 * eps * expected.abs().max() + expected.abs() * torch.finfo(dtype).eps / 2
        # of one element the direction has no derivative: what is left is rounding of zero
        assert_within(name, actual, expected, bound + 4 * eps)


# not the wide one: the checks move every element by itself
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "wide"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives(layer, check):
    _, ours = _pair(layer, torch.float64)
    norm, original = ours.parametrizations.weight[0], ours.parametrizations.weight
    assert check(norm, (original.original0, original.original1))


@each_layer
def test_compatible_with_native(layer):
    native, ours = _pair(layer)
    assert native.state_dict().keys() == ours.state_dict().keys()
    for name, value in native.state_dict().items():
        assert_bitwise(name, ours.state_dict()[name], value)
    weight = ours.weight.detach()
    parametrize.remove_parametrizations(ours, "weight")
    assert_bitwise("weight", ours.weight, weight)


def test_old_checkpoint():
    """As torch.nn.utils.weight_norm wrote them."""
    ours = batchnorm_ext.weight_norm(nn.Linear(3, 2))
    state = {"weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 3), "bias": torch.zeros(2)}
    ours.load_state_dict(state)
    assert_within("weight", ours.weight, torch.full((2, 3), 3**-0.5), 1e-7)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_in_one_graph():
    _, ours = _pair("convolution")
    x = torch.randn(2, 5, 8, 8)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_bitwise("y", compiled(x), ours(x))


def test_exported_program_is_that_of_native():
    native, ours = _pair("linear")
    x = torch.randn(2, 33)
    native, ours = (torch.export.export(m, (x,), strict=False).graph for m in (native, ours))
    assert [str(n.target) for n in ours.nodes] == [str(n.target) for n in native.nodes]


def test_zero_vector_is_nan_as_natively():
    native, ours = _pair("linear")
    for module in (native, ours):
        module.parametrizations.weight.original1.data[2] = 0
    assert_within("weight", ours.weight, native.weight, 1e-6)
