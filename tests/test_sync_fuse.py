"""Models of synchronized layers, converted and fused: their layers, and the same numbers."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize

import batchnorm_ext
from batchnorm_ext import convert_sync_batchnorm, revert
from fusing import BasicBlock, C, Model, ResNet, assert_same, conv, image, norm, randomized
from support import assert_bitwise
from test_convert import Doubled, objects
from test_sync_messages import counting_group

KINDS = [getattr(batchnorm_ext, f"BatchNormAct{dims}d") for dims in (1, 2, 3)]


# Conversion


def model_of_activated():
    return nn.Sequential(*(kind(C, "gelu") for kind in KINDS), nn.BatchNorm2d(C))


def test_conversion_and_back():
    model = model_of_activated()
    model[1].eval()
    model[2].register_forward_hook(lambda *_: None)
    before, keys = objects(model), list(model.state_dict())
    attributes = [vars(layer).copy() for layer in model]
    assert convert_sync_batchnorm(model) is model
    ours = [batchnorm_ext.SyncBatchNormAct] * 3 + [batchnorm_ext.SyncBatchNorm]
    assert [type(layer) for layer in model] == ours
    assert objects(model) == before and list(model.state_dict()) == keys
    assert [layer.activation for layer in model[:3]] == ["gelu"] * 3
    convert_sync_batchnorm(model)
    assert [type(layer) for layer in model] == ours
    revert(model)
    assert [type(layer) for layer in model] == [*KINDS, nn.BatchNorm2d]
    assert [vars(layer) for layer in model] == attributes


def test_process_group():
    group, other = object(), object()
    layer = batchnorm_ext.SyncBatchNorm.convert_sync_batchnorm(KINDS[0](C), group)
    assert layer.process_group is group
    assert convert_sync_batchnorm(layer).process_group is group
    assert convert_sync_batchnorm(layer, other).process_group is other
    assert type(revert(layer)) is KINDS[0] and not hasattr(layer, "process_group")
    made = batchnorm_ext.SyncBatchNormAct(C, process_group=group)
    assert made.process_group is group


def test_layer_made_as_it_is_is_not_reverted():
    """Nothing in torch.nn has an activation."""
    layer = batchnorm_ext.SyncBatchNormAct(C)
    with pytest.warns(UserWarning, match="not reverted: .*SyncBatchNormAct: torch.nn has no such"):
        revert(layer)
    assert type(layer) is batchnorm_ext.SyncBatchNormAct and layer.process_group is None


def test_subclass_is_left_alone():
    class Own(batchnorm_ext.BatchNormAct2d):
        pass

    model = nn.Sequential(Own(C))
    with pytest.warns(UserWarning, match=r"not converted: 0 \(.*Own: a subclass"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is Own


def test_parametrized_layer():
    model = nn.Sequential(KINDS[0](C))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    x = torch.randn(4, C)
    expected = copy.deepcopy(model)(x)
    convert_sync_batchnorm(model)
    assert isinstance(model[0], batchnorm_ext.SyncBatchNormAct)
    assert_bitwise("y", model(x), expected)
    assert type(revert(model)[0]).__base__ is KINDS[0]


def test_layer_is_one_of_its_kind():
    """State, constructor, repr, copies and pickles are those of SyncBatchNorm."""
    for options in ({}, {"affine": False}, {"momentum": None, "eps": 0.1}, {"bias": False}):
        layer = batchnorm_ext.SyncBatchNormAct(C, nn.LeakyReLU(0.1), **options)
        plain = batchnorm_ext.SyncBatchNorm(C, **options)
        assert layer.state_dict().keys() == plain.state_dict().keys()
        shown = repr(plain).removesuffix(")").replace("SyncBatchNorm", "SyncBatchNormAct")
        assert repr(layer) == f"{shown}, activation=leaky_relu(0.1))"
        plain.load_state_dict(layer.state_dict())
    layer.process_group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)
    twin = copy.deepcopy(layer)
    assert twin.process_group is layer.process_group and twin.activation == "leaky_relu(0.1)"
    with pytest.warns(UserWarning, match="pickled without its process group"):
        loaded = pickle.loads(pickle.dumps(layer))
    x, residual = torch.randn(2, 4, C, 3)
    local = batchnorm_ext.BatchNormAct1d(C, "leaky_relu(0.1)", **options)
    expected = [local(x, residual), local.eval()(x, residual)]
    for other in (layer, twin, loaded):
        for y, wanted in zip(
            [other(x, residual), other.eval()(x, residual)], expected, strict=True
        ):
            assert_bitwise("y", y, wanted)


def test_traced_and_folded_as_the_others_are():
    model = nn.Sequential(conv(), batchnorm_ext.SyncBatchNormAct(C, "silu")).eval()
    x = image().float()
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    assert_bitwise("traced", traced(x), model(x))
    exported = torch.export.export(model, (x,))
    assert not any("batchnorm_ext" in str(node.target) for node in exported.graph.nodes)
    folded = batchnorm_ext.fold(copy.deepcopy(model))
    assert type(folded[1]) is batchnorm_ext.SyncBatchNormAct
    assert_bitwise("folded", folded(x), model(x))


# Fusing


def network():
    layers = conv(3), norm(), nn.SiLU(), BasicBlock(C, C), conv(), norm(), nn.LeakyReLU(0.1)
    return randomized(nn.Sequential(*layers, ResNet().layer1[0], nn.Sequential(conv(), norm())))


def fused_pair(group=None):
    model = convert_sync_batchnorm(network(), group)
    fused, report = batchnorm_ext.fuse(copy.deepcopy(model), report=True)
    # the last norm is followed by nothing
    assert (len(report.done), list(report.left)) == (6, ["8.1"]), str(report)
    return model, fused


def test_fuse_in_one_process():
    model, fused = fused_pair()
    assert list(fused.state_dict()) == list(model.state_dict())
    assert_same(fused, model, image(3))
    assert_same(fused.eval(), model.eval(), image(3))
    kinds = {type(m) for m in fused.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {batchnorm_ext.SyncBatchNorm}
    assert [type(m) for m in revert(fused).modules()] == [type(m) for m in network().modules()]


def test_fuse_with_example_inputs():
    model = convert_sync_batchnorm(network())
    assert batchnorm_ext.fuse(model, image(3)) is model


def run_fused():
    torch.manual_seed(1)
    group = counting_group([0, 1])
    model, fused = fused_pair(group)
    x = image(3)[: 2 - dist.get_rank()] + dist.get_rank()
    names = []
    for each in (model, fused):
        y = each[:3](x)
        names.append(y.grad_fn.name())
        group.messages.clear()
        each(x.clone().requires_grad_()).cos().sum().backward()
        assert len(group.messages) == 2 * 7
        each.zero_grad()
    assert names == ["SiluBackward0", "batchnorm_ext::Norm"]
    model, fused = copy.deepcopy(model), copy.deepcopy(fused)
    assert_same(fused, model, x)
    with torch.no_grad():
        assert_same(fused, model, x, backward=False)
    assert_same(fused.eval(), model.eval(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without the process group
        loaded = pickle.loads(pickle.dumps(fused.train()))
    assert_same(loaded, copy.deepcopy(fused), x)


def test_fuse_over_ranks(ranks):
    ranks(2).run(run_fused)


def run_graph_pass():
    """In the graph that a compiler makes, where the layers are operators."""
    torch._dynamo.reset()
    # a forward that is not torch's own, which Dynamo would skip
    model = Model(lambda m, x: m.layers(x), layers=convert_sync_batchnorm(network()))
    reports = []

    def backend(graph_module, inputs):
        reports.append(batchnorm_ext.fuse_graph(graph_module))
        return graph_module.forward

    compiled = copy.deepcopy(model)
    compiled.compile(backend=backend, fullgraph=True)
    assert_same(compiled, model, image(3)[: 2 - dist.get_rank()])
    assert reports  # a graph for each call with other guards
    for report in reports:
        assert (len(report.done), len(report.left)) == (6, 1), str(report)
    torch._dynamo.reset()


def test_graph_pass_over_ranks(ranks):
    ranks(2).run(run_graph_pass)
