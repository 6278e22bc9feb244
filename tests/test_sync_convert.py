"""Switching a model over to synchronized layers and back: only classes change."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import batchnorm_ext
from batchnorm_ext import convert, convert_sync_batchnorm, revert
from support import assert_bitwise
from test_convert import Doubled, NormAndActivation, Plain, objects


def _tree():
    shared = nn.BatchNorm2d(4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        shared,
        nn.ModuleDict({"inner": nn.Sequential(nn.BatchNorm1d(4, momentum=None))}),
        shared,
        nn.BatchNorm3d(2, affine=False),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.SyncBatchNorm(4, track_running_stats=False),
        batchnorm_ext.BatchNorm2d(4),
        batchnorm_ext.SyncBatchNorm(4),
    )


BATCH_NORMS = ["1", "2.inner.0", "3", "4", "7", "8", "9"]


def _attributes(model):
    return {name: (type(m), m.__dict__.copy()) for name, m in model.named_modules()}


def test_classes_of_a_tree_and_back():
    model = _tree()
    before = _attributes(model)
    keys = list(model.state_dict())
    assert convert_sync_batchnorm(model) is model
    for name, layer in model.named_modules(remove_duplicate=False):
        kind = batchnorm_ext.SyncBatchNorm if name in BATCH_NORMS else before[name][0]
        assert type(layer) is kind, name
    assert model[1] is model[3] and list(model.state_dict()) == keys
    assert model[2]["inner"][0]._batchnorm_ext_name == "2.inner.0"
    assert convert_sync_batchnorm(model) is model
    assert revert(model) is model
    del before["9"]  # is native now
    after = _attributes(model)
    kind, _ = after.pop("9")
    assert kind is nn.SyncBatchNorm
    assert after == before


def test_objects_stay_the_same():
    model = _tree()
    model[1].eval()
    model[4].half()
    model[1].weight.requires_grad_(False)
    model[8].weight = model[8].bias  # tied
    model[1].register_forward_hook(lambda *_: None)

    before = objects(model)
    for change in (convert_sync_batchnorm, convert_sync_batchnorm, revert, convert, revert):
        change(model)
        assert objects(model) == before


def test_each_step_is_undone_by_itself():
    layer = convert_sync_batchnorm(convert(nn.BatchNorm2d(3)))
    kinds = [type(layer)] + [type(revert(layer)) for _ in range(3)]
    assert kinds == [
        batchnorm_ext.SyncBatchNorm,
        batchnorm_ext.BatchNorm2d,
        nn.BatchNorm2d,
        nn.BatchNorm2d,
    ]


def test_process_group_of_native_layers():
    group, other = object(), object()
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.BatchNorm1d(3))
    convert_sync_batchnorm(model)
    assert model[0].process_group is group and model[1].process_group is None
    revert(model)
    assert model[0].process_group is group and not hasattr(model[1], "process_group")
    convert_sync_batchnorm(model, other)
    assert model[0].process_group is model[1].process_group is other
    revert(model)
    assert model[0].process_group is group


def test_process_group_of_layers_that_are_ours():
    """A group given to layers converted before was ignored."""
    group, other = object(), object()
    layer = convert_sync_batchnorm(nn.BatchNorm1d(3), group)
    assert convert_sync_batchnorm(layer).process_group is group
    assert convert_sync_batchnorm(layer, other).process_group is other
    assert type(revert(layer)) is nn.BatchNorm1d and not hasattr(layer, "process_group")


@pytest.mark.parametrize("kind", [NormAndActivation, Plain])
def test_subclass_is_left_alone_and_reported(kind):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(kind(3)))
    with pytest.warns(UserWarning, match=rf"1\.0 \({kind.__name__}: a subclass, "):
        convert_sync_batchnorm(model)
    assert type(model[0]) is batchnorm_ext.SyncBatchNorm and type(model[1][0]) is kind


@pytest.mark.parametrize("module", [nn, batchnorm_ext])
def test_lazy_layer_is_left_alone_until_it_has_seen_an_input(module):
    model = nn.Sequential(module.LazyBatchNorm1d())
    with pytest.warns(UserWarning, match=r"0 \(LazyBatchNorm1d: run it once first\)"):
        convert_sync_batchnorm(model)
    model(torch.randn(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_sync_batchnorm(model)
    assert type(model[0]) is batchnorm_ext.SyncBatchNorm


def test_parametrized_layer():
    model = nn.Sequential(nn.BatchNorm1d(3))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    x = torch.randn(4, 3)
    expected = copy.deepcopy(model)(x)
    convert_sync_batchnorm(model)
    assert isinstance(model[0], batchnorm_ext.SyncBatchNorm)
    # float32 twice through a normalization, with values of order 1
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    revert(model)
    assert type(model[0]).__base__ is nn.BatchNorm1d
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.BatchNorm1d


def test_copies_and_checkpoints():
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    twin = copy.deepcopy(model)
    native = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    native.load_state_dict(twin.state_dict())
    for name, value in model.state_dict().items():
        assert_bitwise(name, native.state_dict()[name], value)
    x = torch.randn(2, 3, 4, 4)
    assert_bitwise("y", twin(x), model(x))
    assert [type(m) for m in revert(twin)] == [nn.BatchNorm2d, nn.SyncBatchNorm]


@pytest.mark.parametrize("given", [None, object()])
def test_class_method_is_the_function(given):
    own = object()
    model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3, process_group=own))
    convert = batchnorm_ext.SyncBatchNorm.convert_sync_batchnorm
    assert convert(model, process_group=given) is model
    assert [type(layer) for layer in model] == [batchnorm_ext.SyncBatchNorm] * 2
    assert [layer.process_group for layer in model] == [given, given or own]


def test_attributes_that_a_user_has_set_survive():
    """Layers with a name or an origin of their own lost it."""
    layer = nn.BatchNorm2d(3)
    layer.name, layer.origin = "stem", "checkpoint"
    assert (convert_sync_batchnorm(layer).name, layer.origin) == ("stem", "checkpoint")
    assert (revert(layer).name, layer.origin) == ("stem", "checkpoint")


def test_constructor_is_that_of_torch():
    for kwargs in (
        {},
        {"eps": 0.1, "momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"bias": False},
        {"dtype": torch.float64, "device": "meta"},
    ):
        ours, native = batchnorm_ext.SyncBatchNorm(3, **kwargs), nn.SyncBatchNorm(3, **kwargs)
        assert repr(ours) == repr(native)
        a, b = ours.state_dict(), native.state_dict()
        assert [(n, t.dtype, t.device) for n, t in a.items()] == [
            (n, t.dtype, t.device) for n, t in b.items()
        ]
    positional = (3, 0.1, 0.2, False, False, None)
    assert repr(batchnorm_ext.SyncBatchNorm(*positional)) == repr(nn.SyncBatchNorm(*positional))
    assert not isinstance(ours, nn.SyncBatchNorm)
