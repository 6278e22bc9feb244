"""Copies and pickles of layers with a process group, which can be neither copied nor pickled."""

import copy
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

import batchnorm_ext
from support import assert_bitwise

C = 3


@pytest.fixture
def groups():
    return [dist.ProcessGroupGloo(dist.HashStore(), 0, 1) for _ in range(2)]


def _model(groups):
    """Of two groups, of which one is that of a layer before its conversion."""
    model = nn.Sequential(nn.SyncBatchNorm(C, process_group=groups[0]), nn.BatchNorm2d(C))
    return batchnorm_ext.convert_sync_batchnorm(model, groups[1])


def _assert_same_values(model, twin):
    for name, value in model.state_dict().items():
        assert_bitwise(name, twin.state_dict()[name], value)
    assert all(a is not b for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_deep_copy_shares_the_process_group(groups):
    model = _model(groups)
    twin = copy.deepcopy(model)
    _assert_same_values(model, twin)
    assert [layer.process_group for layer in twin] == [groups[1], groups[1]]
    batchnorm_ext.revert(twin)
    assert type(twin[0]) is nn.SyncBatchNorm and twin[0].process_group is groups[0]
    tied = nn.Sequential(model[0], model[0])
    first, second = copy.deepcopy(tied)
    assert first is second and first is not model[0]


def test_deep_copy_of_a_rank_outside_the_process_group():
    outside = dist.GroupMember.NON_GROUP_MEMBER
    layer = copy.deepcopy(batchnorm_ext.SyncBatchNorm(C, process_group=outside))
    assert layer.process_group is outside


def test_copy_refers_to_the_same(groups):
    layer = _model(groups)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = copy.copy(layer)
    assert twin is not layer and twin.weight is layer.weight and twin.process_group is groups[1]


def test_pickle_leaves_the_process_group_out_and_says_so_once(groups):
    model, file = _model(groups), io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        torch.save(model, file)
    (warning,) = caught
    assert "without its process group" in str(warning.message)
    assert [layer.process_group for layer in model] == [groups[1], groups[1]]
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    _assert_same_values(model, twin)
    assert [layer.process_group for layer in twin] == [None, None]
    assert [type(layer) for layer in batchnorm_ext.revert(twin)] == [
        nn.SyncBatchNorm,
        nn.BatchNorm2d,
    ]


def test_pickle_without_a_process_group_is_silent():
    model = batchnorm_ext.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(model, io.BytesIO())


def average():
    """As torch.optim.swa_utils.update_bn does it: the average has to synchronize too."""
    group = dist.new_group()
    model = nn.Sequential(batchnorm_ext.SyncBatchNorm(C, process_group=group))
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    whole = torch.arange(12.0).reshape(4, C)
    own = whole.chunk(2)[dist.get_rank()]
    y = averaged.train()(own)
    wanted = nn.BatchNorm1d(C)(whole).chunk(2)[dist.get_rank()]
    # float32 values of order 1
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)


def test_averaged_model(ranks):
    ranks(2).run(average)
