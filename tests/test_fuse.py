"""Fused models compute what they did: outputs, gradients and statistics in float64."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm_ext
from benchmarks import networks
from fusing import (
    BasicBlock,
    C,
    DenseBlock,
    DropPath,
    InvertedResidual,
    Model,
    PreActivation,
    ResNet,
    UNet,
    assert_fuses,
    assert_same,
    block,
    conv,
    image,
    norm,
    pair,
    randomized,
)

pytestmark = pytest.mark.only("cpu", reason="of forwards alone")

CLOSE = 1e-12  # one layer in float64: a few roundings of values of order 1

# Networks


@pytest.mark.parametrize(
    "model, channels, done, left",
    [
        (ResNet(), 3, 9, 1),  # the projection's norm takes the other
        (PreActivation(), C, 2, 0),
        (DenseBlock(3), C, 6, 0),
        (nn.Sequential(InvertedResidual(C, C), InvertedResidual(C, 4)), C, 5, 1),
        (UNet(), C, 6, 0),
    ],
    ids=["ResNet", "pre-activation ResNet", "DenseNet", "MobileNetV3", "U-Net"],
)
def test_small_networks(model, channels, done, left):
    fused = assert_fuses(model, image(channels), done, left)
    assert_same(copy.deepcopy(fused), copy.deepcopy(model), image(channels))
    assert_same(pickle.loads(pickle.dumps(fused)), model, image(channels))


@pytest.mark.parametrize(
    "name, done, left",
    # ResNet-50: 53 norms, of which 4 are added to another; MobileNetV2: 52, and 7 of its 17 blocks
    # end in a norm without addition
    [("resnet50", 49, 4), ("mobilenetv2", 45, 7)],
)
def test_networks(name, done, left):
    model, report = batchnorm_ext.fuse(networks.NETWORKS[name](), report=True)
    assert (len(report.done), len(report.left)) == (done, left), str(report)


@pytest.mark.parametrize(
    "name, done", [("resnet18", 17), ("mobilenet_v2", 45), ("googlenet", 59), ("densenet121", 121)]
)
def test_torchvision(name, done):
    models = pytest.importorskip("torchvision").models
    _, report = batchnorm_ext.fuse(getattr(models, name)(weights=None), report=True)
    assert len(report.done) == done, str(report)


# What it leaves as it was


def test_model_keeps_what_it_is():
    model = randomized(ResNet())
    modules, parameters = list(model.modules()), list(model.parameters())
    names, kind = list(model.state_dict()), type(model.layer1[0])
    seen = []
    model.layer1.register_forward_hook(lambda *args: seen.append(args))
    assert batchnorm_ext.fuse(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names and model.training
    assert isinstance(model.layer1[0], kind) and type(model.layer1[0]).__name__ == "BasicBlock"
    model(image(3))
    assert len(seen) == 1


def test_revert():
    model = randomized(ResNet())
    original = copy.deepcopy(model)
    kinds = [type(module) for module in model.modules()]
    members = [set(vars(module)) for module in model.modules()]
    for _ in range(2):  # fusing twice is harmless
        batchnorm_ext.fuse(model)
    assert [type(module) for module in model.modules()] != kinds
    assert batchnorm_ext.revert(model) is model
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == members
    assert_same(model, original, image(3))


def test_empty_sequential():
    run = block(lambda m, x: m.relu(m.bn1(x) + m.shortcut(x)), bn2=None, shortcut=nn.Sequential())
    assert_fuses(run, image(), 1)


def test_shared_norms_and_blocks():
    """Each call is fused on its own."""
    shared = norm()
    run = block(lambda m, x: m.relu(m.bn1(m.conv1(m.relu(m.bn2(x))))), bn1=shared, bn2=shared)
    assert_fuses(run, image(), 1)
    twice = BasicBlock(C, C)
    fused = assert_fuses(nn.Sequential(twice, conv(), twice), image(), 2)
    assert fused[0] is fused[2]
    tied = nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm(), nn.ReLU())
    tied[4].weight = tied[1].weight
    fused = assert_fuses(tied, image(), 2)
    assert fused[4].weight is fused[1].weight


def test_example_inputs():
    model = randomized(ResNet())
    state = copy.deepcopy(model.state_dict())
    batchnorm_ext.fuse(model, image(3))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_difference_on_the_example_inputs_raises(monkeypatch):
    model = randomized(nn.Sequential(BasicBlock(C, C)))
    kinds = [type(module) for module in model.modules()]
    monkeypatch.setattr(batchnorm_ext._chain, "_name", lambda activation: "tanh")
    with pytest.raises(RuntimeError, match="differs on the example inputs: output 0 by"):
        batchnorm_ext.fuse(model, image())
    assert [type(module) for module in model.modules()] == kinds


# Changes after fusing


def test_hooks_registered_later():
    model, fused, _ = pair(BasicBlock(C, C))
    for each in (model, fused):
        each.bn2.register_forward_hook(lambda module, args, output: output * 2)
        each.relu.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_same(fused, model, image())


def test_layers_replaced_later():
    model, fused, _ = pair(BasicBlock(C, C))
    for each in (model, fused):
        each.bn1, each.relu = nn.Identity(), nn.GELU()
        each.downsample = nn.Conv2d(C, C, 1).double().requires_grad_(False)
        nn.init.ones_(each.downsample.weight)
        nn.init.ones_(each.downsample.bias)
    assert_same(fused, model, image())
    model, fused = (batchnorm_ext.fuse(nn.Sequential(conv(), norm(), nn.ReLU())) for _ in range(2))
    fused.append(nn.Tanh())
    del fused[2]
    assert [type(layer).__name__ for layer in fused] == ["Conv2d", "BatchNorm2d", "Tanh"]
    assert type(fused[:2]).__name__ == "Sequential" and fused(image().float()).min() >= -1


def test_residual_that_broadcasts():
    def run(m, x):
        return F.relu(m.bn1(m.conv1(x)) + x.mean((2, 3), keepdim=True))

    assert_fuses(block(run, bn2=None), image(), 1)
    wider = randomized(block(lambda m, x: m.bn1(m.conv1(x)) + x[None], bn2=None))
    y = batchnorm_ext.fuse(wider)(image())
    assert y.shape == (1, 3, C, 8, 8)


def test_forward_that_depends_on_attributes():
    """The graph goes with the values that it was made for."""

    def run(m, x):
        y = m.relu(m.bn1(m.conv1(x)))
        return F.dropout(y, 0.5, m.training) * m.scale if m.scale > 1 else F.relu(m.bn2(y))

    model = block(run)
    model.scale = 2.0
    fused = assert_fuses(model, image(), 1, 1)
    model.scale = fused.scale = 0.5
    assert_same(fused, model, image())
    model.conv1.stride = fused.conv1.stride = (2, 2)
    assert_same(fused, model, image())


def test_optional_arguments():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1 = norm()

        def forward(self, x, residual=None):
            y = self.bn1(x)
            return F.relu(y if residual is None else y * residual)

    model, fused, report = pair(Optional())
    assert set(report.done) == {"bn1"}
    x = image()
    for arguments in ((x,), (x, None), (x, x)):
        torch.testing.assert_close(fused(*arguments), model(*arguments), rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(fused(x=x), model(x=x), rtol=CLOSE, atol=CLOSE)
    with pytest.raises(TypeError, match="forward"):
        fused(x, x, x)


def test_identity_between():
    model = block(lambda m, x: m.relu(m.drop(m.bn1(m.conv1(x))) + x), bn2=None, drop=nn.Identity())
    fused = assert_fuses(model, image(), 1)
    for each in (model, fused):
        each.drop = nn.Tanh()
    assert_same(fused, model, image())


def test_drop_path_between():
    def run(m, x):
        return m.relu(m.drop(m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x)))))) + x)

    assert_fuses(block(run, drop=DropPath()), image(), 1, 1)


def test_compiled(fresh_dynamo):
    model, fused, _ = pair(nn.Sequential(BasicBlock(C, C), conv(), norm(), nn.SiLU()))
    fused.compile(backend="aot_eager", fullgraph=True)
    assert_same(fused, model, image())


def test_traced_and_exported_models_hold_native_nodes():
    model, fused, _ = pair(nn.Sequential(BasicBlock(C, C)).eval())
    x = image()
    for traced in (torch.fx.symbolic_trace(fused), torch.jit.trace(fused, x)):
        torch.testing.assert_close(traced(x), model(x), rtol=CLOSE, atol=CLOSE)
    exported = torch.export.export(fused, (x,))
    assert not any("batchnorm_ext" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), model(x), rtol=CLOSE, atol=CLOSE)


def test_fold_after_fuse():
    model = randomized(nn.Sequential(conv(), norm(), nn.ReLU(), BasicBlock(C, C))).eval()
    folded, report = batchnorm_ext.fold(batchnorm_ext.fuse(copy.deepcopy(model)), report=True)
    x = image()
    assert len(report.done) == 3 and not report.left
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)


def test_model_with_unusual_arguments():
    model = Model(lambda m, x: F.relu(m.bn(x)), bn=nn.BatchNorm1d(5))
    fused = batchnorm_ext.fuse(copy.deepcopy(model))
    x = torch.randn(4, 5)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        fused(torch.randn(5))
