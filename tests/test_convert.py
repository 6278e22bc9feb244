"""Switching a model over and back: only classes change."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import batchnorm_ext
from batchnorm_ext import convert, revert
from support import assert_bitwise


class NormAndActivation(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, input):
        return super().forward(input).relu()


class Plain(nn.BatchNorm2d):
    """A subclass that only has another name."""


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _tree():
    shared = nn.BatchNorm2d(4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        shared,
        nn.ModuleDict({"inner": nn.Sequential(nn.ModuleList([nn.BatchNorm1d(4)]))}),
        shared,
        nn.BatchNorm3d(2),
        nn.LazyBatchNorm1d(),
        nn.LazyBatchNorm2d(),
        nn.LazyBatchNorm3d(),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.SyncBatchNorm(4),
    )


def objects(model):
    """Which objects a model is made of, with the facts and flags that a conversion leaves alone."""
    modules = [*model.named_modules(remove_duplicate=False)]
    tensors = [*model.named_parameters(remove_duplicate=False)]
    tensors += [*model.named_buffers(remove_duplicate=False)]
    facts = [(n, t.dtype, t.device, t.requires_grad) for n, t in tensors]
    flags = [(n, m.training, len(m._forward_hooks)) for n, m in modules]
    return [(n, id(o)) for n, o in tensors + modules], facts, flags


def _classes(model):
    return {name: type(m) for name, m in model.named_modules(remove_duplicate=False)}


CONVERTED = {
    "GroupNorm",
    *(f"{p}{n}Norm{d}d" for p in ("", "Lazy") for n in ("Batch", "Instance") for d in (1, 2, 3)),
}


def test_classes_of_a_tree_and_back():
    model = _tree()
    before = _classes(model)
    assert convert(model) is model
    for name, kind in _classes(model).items():
        native = before[name]
        expected = native
        if native.__name__ in CONVERTED:
            expected = getattr(batchnorm_ext, native.__name__)
        assert kind is expected, name
    assert model[1] is model[3]
    assert revert(model) is model
    assert _classes(model) == before


def test_objects_stay_the_same():
    model = _tree()
    model[1].eval()
    model[4].half()
    model[1].weight.requires_grad_(False)
    model[4].weight = model[4].bias  # tied

    before, keys = objects(model), list(model.state_dict())
    for change in (convert, convert, revert, revert):
        change(model)
        assert objects(model) == before and list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_root_is_a_batch_norm(kind):
    module = getattr(nn, kind)(3)
    assert convert(module) is module and type(module) is getattr(batchnorm_ext, kind)
    assert revert(module) is module and type(module) is getattr(nn, kind)


def test_nothing_to_do():
    model = nn.Sequential(nn.Linear(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert revert(convert(model)) is model
        revert(convert(_tree()))


@pytest.mark.parametrize("kind", [NormAndActivation, Plain])
def test_subclass_is_left_alone_and_reported(kind, device):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(kind(3))).to(device)
    x = torch.randn(2, 3, 4, 4, device=device)
    expected = copy.deepcopy(model)(x)
    with pytest.warns(UserWarning, match=rf"1\.0 \({kind.__name__}: a subclass, "):
        convert(model)
    assert type(model[0]) is batchnorm_ext.BatchNorm2d and type(model[1][0]) is kind
    # float32 twice through a normalization, with values of order 1
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_subclass_of_ours_is_not_reverted():
    class Mine(batchnorm_ext.BatchNorm2d):
        pass

    model = nn.Sequential(Mine(3), batchnorm_ext.BatchNorm2d(3))
    with pytest.warns(UserWarning, match=r"^not reverted: 0 \(.*Mine: a subclass, "):
        revert(model)
    assert type(model[0]) is Mine and type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize(
    "kind", [batchnorm_ext.BatchNormAct2d, partial(batchnorm_ext.GroupNormAct, 1)]
)
def test_layer_without_counterpart_is_not_reverted(kind, parametrized):
    """The warning once called it a subclass that may override forward."""
    layer = kind(3)
    if parametrized:
        parametrize.register_parametrization(layer, "weight", Doubled())
    before = type(layer)
    with pytest.warns(UserWarning, match=r"^not reverted: .*Act.*: torch.nn has no such layer\)$"):
        revert(layer)
    assert type(layer) is before


def test_same_results_and_hooks(device):
    """Hooks of every sort fire before, during and after the conversion."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(device)
    native = copy.deepcopy(model)
    calls = []
    model[1].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[1].register_forward_hook(lambda m, args, y: y + 1)
    model[1].weight.register_hook(lambda g: 3 * g)
    x = torch.randn(4, 3, 8, 8, device=device)
    convert(model)
    model(x).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    y = native[1](native[0](x)) + 1
    expected = native[2](y)
    expected.sum().backward()
    # sums of some hundred float32 terms of order 1
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model[1].weight.grad, 3 * native[1].weight.grad, **close)
    torch.testing.assert_close(model[0].weight.grad, native[0].weight.grad, **close)
    revert(model)
    model(x).sum().backward()
    assert calls == ["pre", "forward", "backward"] * 2


def test_optimizer_goes_on(device):
    """Momentum buffers belong to the parameters, which stay: three native steps, three of ours."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(device)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin)]
    for step in range(6):
        x = torch.randn(16, 5, device=device)
        if step == 3:
            convert(model)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).pow(2).mean().backward()
            optimizer.step()
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        # float32 roundings of two correct implementations, over three steps
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_parametrization_is_kept(device):
    model = nn.Sequential(nn.BatchNorm2d(3)).to(device)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    native = copy.deepcopy(model)
    original = model[0].parametrizations.weight.original
    x = torch.randn(4, 3, 5, 5, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model)
    assert isinstance(model[0], batchnorm_ext.BatchNorm2d)
    assert parametrize.is_parametrized(model[0], "weight")
    assert model[0].parametrizations.weight.original is original
    assert type(model[0]).__name__ == type(native[0]).__name__
    # float32, values of order 1
    torch.testing.assert_close(model(x), native(x), rtol=1e-5, atol=1e-5)
    convert(model)
    assert isinstance(model[0], batchnorm_ext.BatchNorm2d)
    revert(model)
    assert not isinstance(model[0], batchnorm_ext.BatchNorm2d)
    torch.testing.assert_close(model(x), native(x), rtol=1e-5, atol=1e-5)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.BatchNorm2d and model[0].weight.tolist() == [2, 2, 2]


def test_parametrization_may_go_while_converted():
    module = nn.BatchNorm2d(3)
    parametrize.register_parametrization(module, "weight", Doubled())
    convert(module)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is batchnorm_ext.BatchNorm2d
    assert type(revert(module)) is nn.BatchNorm2d


def test_converted_module_may_be_parametrized(device):
    module = convert(nn.BatchNorm2d(3)).to(device)
    parametrize.register_parametrization(module, "weight", Doubled())
    x = torch.randn(4, 3, 5, 5, device=device)
    # exact: weight 1 doubled is a power of two
    assert_bitwise("y", module(x), 2 * convert(nn.BatchNorm2d(3)).to(device)(x))
    revert(module)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is nn.BatchNorm2d


def test_lazy_modules_materialize_after_conversion(device):
    model = convert(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())).to(device)
    twin = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).to(device)
    x = torch.randn(4, 3, 8, 8, device=device)
    model(x)
    assert type(model[1]) is batchnorm_ext.BatchNorm2d and model[1].num_features == 4
    twin.load_state_dict(model.state_dict())
    assert type(revert(model)[1]) is nn.BatchNorm2d
    # float32, values of order 1
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)


def test_sync_batch_norm_takes_converted_layers():
    model = convert(nn.Sequential(nn.BatchNorm2d(3)))
    weight = model[0].weight
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synced[0]) is nn.SyncBatchNorm and synced[0].weight is weight


def test_fusing_with_a_convolution(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(device)
    x = torch.randn(4, 3, 8, 8, device=device)
    model(x)
    convert(model).eval()
    fused = torch.nn.utils.fuse_conv_bn_eval(model[0], model[1])
    # the scale goes into 27 products instead of onto their sum, in float32
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
