"""Tools of PyTorch that train, average or differentiate a model: as with the native one."""

import copy

import pytest
import torch
from torch import func, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import prune
from torch.optim import swa_utils

import batchnorm_ext
from networks import (
    CLOSE,
    assert_same_state,
    assert_same_step,
    conversions,
    make_input,
    make_pair,
    on_cpu,
)


@conversions
def test_replica_of_data_parallel(convert, device):
    """Its parameters are plain tensors, and its buffers those of the model."""
    native, model = make_pair(convert, device)
    replicas = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer)
    x = make_input(device)
    y, expected = replicas[model](x), native(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    for output in (y, expected):
        output.pow(3).mean().backward()
    for name, parameter in native.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, **CLOSE)
    assert_same_state(model.named_buffers(), native.named_buffers())


@conversions
@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model(use_buffers, convert, device):
    if use_buffers and device.type == "cuda":
        pytest.skip("PyTorch's average divides integer buffers, an error there, of native too")
    native, model = make_pair(convert, device)
    batches = [make_input(device, batch) for batch in (3, 4, 5)]
    averages = []
    for module in (native, model):
        averages.append(swa_utils.AveragedModel(module, use_buffers=use_buffers))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        for x in batches:
            optimizer.zero_grad()
            module(x).pow(2).mean().backward()
            optimizer.step()
            averages[-1].update_parameters(module)
    expected, average = averages
    assert_same_state(average.state_dict(), expected.state_dict())
    for module in averages:
        swa_utils.update_bn(batches, module)
    assert average.module.bn.momentum == 0.1 and average.module.bn.num_batches_tracked == 3
    assert_same_state(average.state_dict(), expected.state_dict())


@conversions
def test_gradients_of_a_functional_call(convert, device):
    """The buffers that were handed over are updated, and not those of the module."""
    x, results = make_input(device), []

    def loss(parameters, buffers, module):
        return func.functional_call(module, (parameters, buffers), x).pow(3).mean(), buffers

    for module in make_pair(convert, device):
        tensors = [
            dict(module.named_parameters()),
            {n: b.clone() for n, b in module.named_buffers()},
        ]
        gradients, _ = func.grad(loss, has_aux=True)(*tensors, module)
        results.append((gradients, tensors[1]))
        assert module.bn.num_batches_tracked == 0 and tensors[1]["bn.num_batches_tracked"] == 1
    for expected, actual in zip(*results, strict=True):
        assert_same_state(actual, expected)


@conversions
def test_ensemble(convert, device):
    x = make_input(device)

    def outputs(modules):
        parameters, buffers = func.stack_module_state(modules)
        call = lambda p, b: func.functional_call(modules[0], (p, b), x)  # noqa: E731
        return func.vmap(call)(parameters, buffers)

    pairs = [make_pair(convert, device, training=False) for _ in range(3)]
    natives, models = zip(*pairs, strict=True)
    torch.testing.assert_close(outputs(list(models)), outputs(list(natives)), **CLOSE)


@conversions
def test_per_sample_gradients_without_running_statistics(convert, device):
    pair = make_pair(convert, device)
    x = make_input(device)
    gradients = []
    for module in pair:
        module.bn1d = nn.Identity()  # one value per channel in a sample
        func.replace_all_batch_norm_modules_(module)
        assert module.bn.running_mean is None
        loss = lambda p, x, m=module: func.functional_call(m, p, x[None]).pow(3).mean()  # noqa: E731
        gradients.append(func.vmap(func.grad(loss), (None, 0))(dict(module.named_parameters()), x))
    assert_same_state(gradients[1], gradients[0])


@conversions
@pytest.mark.parametrize("pruned_first", [True, False])
def test_pruned_weight(pruned_first, convert, device):
    native, _ = make_pair(convert, device)
    model = copy.deepcopy(native)
    for module in (native, model):
        if module is model and not pruned_first:
            convert(module)
        prune.l1_unstructured(module.bn, "weight", 0.5)
    convert(model)
    assert isinstance(model.bn, batchnorm_ext.BatchNorm2d | batchnorm_ext.SyncBatchNorm)
    assert_same_step(model, native, make_input(device))


def train_sharded(policy):
    """Against native's in float32, which fails in bfloat16 on the CPU."""
    pair = make_pair(batchnorm_ext.convert, "cpu")
    precision = {} if policy is None else {"mp_policy": MixedPrecisionPolicy(policy, torch.float32)}
    states = []
    for model, options in zip(pair, ({}, precision), strict=True):
        for module in (model.conv, model.bn, model.linear, model.bn1d, model):
            fully_shard(module, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(torch.distributed.get_rank())
        for _ in range(2):
            optimizer.zero_grad()
            model(make_input("cpu")).float().pow(2).mean().backward()
            optimizer.step()
        states.append(model.state_dict())
    # bfloat16 rounds every activation and gradient to 4e-3
    close = CLOSE if policy is None else {"rtol": 5e-2, "atol": 5e-2}
    expected, actual = (
        {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in s.items()} for s in states
    )
    assert_same_state(actual, expected, close)
    assert actual["bn.running_var"].dtype == torch.float32


@on_cpu
@pytest.mark.parametrize("policy", [None, torch.bfloat16])
def test_fully_shard(policy, ranks):
    ranks(2).run(train_sharded, policy)
