"""The other norms in a program that is written for torch.nn: results, errors, state, graphs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm_ext
from batchnorm_ext import functional
from family import FEW, NAMES, C, every_norm, gradients_of, layers
from support import assert_bitwise, assert_within

pytestmark = [
    pytest.mark.only("cpu", reason="on CUDA these norms are PyTorch's own"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.mark.parametrize("size", FEW)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_of_instances(size, momentum):
    name = f"InstanceNorm{len(size) - 2}d"
    native, ours = (
        getattr(package, name)(C, track_running_stats=True, momentum=momentum)
        for package in (nn, batchnorm_ext)
    )
    for _ in range(3):
        x = torch.randn(size) * 3 + 1
        assert_within("y", ours(x), native(x), 2e-6)
    for buffer, expected in native.state_dict().items():
        assert_within(buffer, ours.state_dict()[buffer], expected, 2e-6)
    assert_within("evaluation", ours.eval()(x), native.eval()(x), 2e-6)


def test_recomputed_forward_tracks_once():
    layer = batchnorm_ext.InstanceNorm2d(C, track_running_stats=True)
    once = copy.deepcopy(layer)
    x = torch.randn(2, C, 5, 5, requires_grad=True)
    once(x)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert_bitwise("running_mean", layer.running_mean, once.running_mean)
    assert_bitwise("running_var", layer.running_var, once.running_var)


@every_norm
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_in_one_graph(norm):
    size = (2, 4, 6, 5)
    _, ours = layers(norm, size)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(size), torch.randn(size)
    for name, actual, expected in zip(
        NAMES, gradients_of(compiled, x, dy), gradients_of(ours, x, dy), strict=False
    ):
        assert_bitwise(name, actual, expected)


@every_norm
def test_empty_batch(norm):
    native, ours = layers(norm, (0, 4, 3, 3))
    x = torch.randn(0, 4, 3, 3)
    if norm.startswith("instance") and norm != "instance, not affine":
        with pytest.raises(IndexError):
            native(x)
        with pytest.raises(IndexError):
            ours(x)
        return
    assert ours(x).shape == native(x).shape
    for actual, expected in zip(gradients_of(ours, x, x), gradients_of(native, x, x), strict=True):
        assert_bitwise("empty", actual, expected)


CALLS = {
    "one element for all samples": lambda package: package.GroupNorm(2, 2)(torch.randn(1, 2)),
    "one element for each statistic": lambda package: package.GroupNorm(2, 2)(torch.ones(3, 2)),
    "one element": lambda package: package.InstanceNorm1d(3)(torch.randn(2, 3, 1)),
    "channels not divisible": lambda package: package.GroupNorm(2, 6)(torch.randn(2, 5, 3)),
    "other channels": lambda package: package.GroupNorm(2, 6)(torch.randn(2, 8, 3)),
    "other features": lambda package: package.InstanceNorm1d(3, affine=True)(torch.randn(2, 4, 5)),
    "one dimension": lambda package: package.GroupNorm(2, 6)(torch.randn(6)),
    "dimensions of an instance": lambda package: package.InstanceNorm2d(3)(torch.randn(4)),
    "integers": lambda package: package.GroupNorm(2, 6)(torch.ones(2, 6, 3, dtype=torch.long)),
    "integers in rows": lambda package: package.LayerNorm(6)(torch.ones(2, 6, dtype=torch.long)),
    "negative eps": lambda package: package.GroupNorm(2, 6, eps=-1.0)(torch.ones(2, 6, 3)),
    "other shape": lambda package: package.LayerNorm(6)(torch.randn(2, 5)),
    "too few dimensions": lambda package: package.LayerNorm((3, 6))(torch.randn(6)),
    "rows of one": lambda package: package.LayerNorm(1)(torch.randn(4, 1)),
    "other shape, rms": lambda package: package.RMSNorm(6)(torch.randn(2, 5)),
    "integers, rms": lambda package: package.RMSNorm(6)(torch.ones(2, 6, dtype=torch.long)),
    "half input": lambda package: package.LayerNorm(6)(torch.ones(2, 6).bfloat16()),
    "half input, groups": lambda package: package.GroupNorm(2, 6)(torch.ones(2, 6, 2).bfloat16()),
    "half parameters": lambda package: package.LayerNorm(6).bfloat16()(torch.ones(2, 6)),
    "sparse": lambda package: package.LayerNorm(6)(torch.ones(2, 6).to_sparse()),
    "complex": lambda package: package.LayerNorm(6)(torch.ones(2, 6, dtype=torch.complex64)),
    "num_groups of another type": lambda package: functions(package).group_norm(
        torch.ones(2, 6, 2), 2.0
    ),
    "shape as a number": lambda package: functions(package).layer_norm(torch.ones(2, 6), 6),
    "shape as a size": lambda package: functions(package).layer_norm(
        torch.ones(2, 6), torch.Size([6])
    ),
    "eps None": lambda package: functions(package).layer_norm(torch.ones(2, 6), (6,), eps=None),
    "no shape": lambda package: functions(package).layer_norm(torch.ones(2, 6), ()),
}


def functions(package):
    return F if package is nn else functional


@pytest.mark.parametrize("call", CALLS)
def test_result_or_error_of_native(call):
    def outcome(package):
        try:
            y = CALLS[call](package)
        except Exception as error:
            return type(error).__name__, str(error)
        return y.dtype, y.shape, y.stride()

    assert outcome(batchnorm_ext) == outcome(nn)


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_dtype_under_autocast(norm, dtype, parameters):
    size = (2, 4, 6, 5)
    x = torch.randn(size, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            expected = layers(norm, size, parameters)[0](x)
        except RuntimeError:
            return  # native does not mix these; ours may
        native, ours = layers(norm, size, parameters)
        actual = ours(x)
        assert actual.dtype == expected.dtype
        assert_within("y", actual, native(x), 0.05 * native(x).abs().max())


def _export(model, x):
    graph = torch.export.export(model, (x,), strict=False).graph
    return [(str(node.target), len(node.users)) for node in graph.nodes]


def _trace(model, x):
    return [node.kind() for node in torch.jit.trace(model, x).inlined_graph.nodes()]


def _script(model, x):
    return [node.kind() for node in torch.jit.script(model).inlined_graph.nodes()]


def _fx(model, x):
    return [(node.op, node.target) for node in torch.fx.symbolic_trace(model).graph.nodes]


@every_norm
@pytest.mark.parametrize("graph_of", [_export, _trace, _script, _fx])
def test_artefact_is_that_of_native(norm, graph_of):
    size = (2, 4, 6, 5)
    native, ours = (nn.Sequential(nn.Identity(), layer) for layer in layers(norm, size))
    x = torch.randn(size)
    assert graph_of(ours, x) == graph_of(native, x)


@every_norm
def test_convert_and_revert(norm):
    native, ours = layers(norm, (2, 4, 6, 5))
    state = copy.deepcopy(native.__dict__)
    assert type(batchnorm_ext.convert(native)) is type(ours)
    assert type(batchnorm_ext.revert(native)) is type(native)
    assert native.__dict__.keys() == state.keys()
    assert type(ours).__mro__[1].__module__.startswith("batchnorm_ext")


def test_convert_picks_classes():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4))
    batchnorm_ext.convert(model, norms=(nn.BatchNorm2d, nn.LayerNorm))
    assert [type(layer) for layer in model] == [
        batchnorm_ext.BatchNorm2d,
        nn.GroupNorm,
        batchnorm_ext.LayerNorm,
    ]
    with pytest.raises(ValueError, match="expected norms to be classes of torch.nn among"):
        batchnorm_ext.convert(model, norms=(nn.Linear,))


@pytest.mark.parametrize("name", ["instance_norm", "group_norm", "layer_norm", "rms_norm"])
def test_replaced_function_is_called(name, monkeypatch):
    size = (2, 4, 6, 5)
    norm = name.removesuffix("_norm")
    _, ours = layers(norm, size)
    monkeypatch.setattr(F, name, lambda *arguments: "replaced")
    assert ours(torch.randn(size)) == "replaced"
