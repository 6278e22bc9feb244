"""Bad input: the exception type of PyTorch, a message that helps, and no state changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import batchnorm_ext
import batchnorm_ext.functional as ours
from support import batch_norm


def _arguments(**changed):
    arguments = {
        "input": torch.randn(4, 3, 2, 2),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.randn(3),
        "bias": torch.randn(3),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }
    return arguments | changed


def _bad_calls():
    """Which argument is bad, what is wrong, the changes."""
    # The tensors are on the CPU, and moved to the device under test by the test.
    meta, double, half = torch.device("meta"), torch.float64, torch.float16
    for training in (True, False):
        both = {"training": training}
        yield "input", "1-D", {"input": torch.randn(3), **both}
        yield "input", "int64", {"input": torch.ones(4, 3).long(), **both}
        yield "input", "bool", {"input": torch.ones(4, 3).bool(), **both}
        for name in ("running_mean", "running_var", "weight", "bias"):
            for size in (2, 4, 0):
                yield name, f"size {size}", {name: torch.ones(size), **both}
            for dtype in (double, half, torch.int64):
                yield name, str(dtype), {name: torch.ones(3).to(dtype), **both}
            yield name, "on meta", {name: torch.ones(3, device=meta), **both}
        yield "eps", "negative", {"eps": -1.0, **both}
    yield "eps", "zero in training", {"eps": 0.0}
    yield "input", "one value per channel", {"input": torch.randn(1, 3, 1, 1)}
    for name in ("running_mean", "running_var"):
        yield name, "alone missing in training", {name: None}
        yield name, "alone missing in eval", {name: None, "training": False}
    neither = {"running_mean": None, "running_var": None, "training": False}
    yield "running_mean", "missing in eval", neither


CALLS = list(_bad_calls())


def _move(value, device):
    return value.to(device) if torch.is_tensor(value) and not value.is_meta else value


@pytest.mark.parametrize("name, what, changed", CALLS, ids=[f"{c[0]} {c[1]}" for c in CALLS])
def test_function(name, what, changed, device):
    """The exception and its text are native's, but ours leaves all arguments as they were."""
    arguments = {k: _move(v, device) for k, v in _arguments(**changed).items()}
    tensors = {k: v for k, v in arguments.items() if torch.is_tensor(v) and not v.is_meta}
    before = {k: v.clone() for k, v in tensors.items()}
    with pytest.raises(Exception) as native:
        F.batch_norm(**{k: v.clone() if torch.is_tensor(v) else v for k, v in arguments.items()})
    with pytest.raises(type(native.value)) as raised:
        ours.batch_norm(**arguments)
    assert type(raised.value) is type(native.value)
    assert str(raised.value).startswith(str(native.value))
    for key, tensor in tensors.items():
        assert torch.equal(tensor, before[key]), f"{key} changed"


MODULES = [
    (nn.BatchNorm1d, (2,)),
    (nn.BatchNorm1d, (2, 3, 4, 5)),
    (nn.BatchNorm2d, (2, 3)),
    (nn.BatchNorm2d, (2, 3, 4)),
    (nn.BatchNorm2d, (2, 3, 4, 5, 6)),
    (nn.BatchNorm3d, (2, 3, 4, 5)),
    (nn.BatchNorm1d, (1, 3)),
    (nn.BatchNorm2d, (1, 3, 1, 1)),
    (nn.BatchNorm3d, (1, 3, 1, 1, 1)),
    (nn.BatchNorm2d, (2, 4, 2, 2)),
    (nn.BatchNorm1d, (4, 2)),
]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind, size", MODULES, ids=[f"{k.__name__} {s}" for k, s in MODULES])
def test_module(kind, size, momentum, device):
    native = kind(3, momentum=momentum).to(device)
    converted = batchnorm_ext.convert(copy.deepcopy(native))
    x = torch.randn(size, device=device)
    with pytest.raises(Exception) as expected:
        native(x)
    before = copy.deepcopy(converted.state_dict())
    with pytest.raises(Exception) as raised:
        converted(x)
    assert type(raised.value) is type(expected.value)
    channels_differ = len(size) > 1 and size[1] != 3
    raised.match(r"running_mean|weight" if channels_differ else r"expected \dD|more than 1 value")
    for name, value in converted.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"


def test_module_dtypes(device):
    module = batchnorm_ext.BatchNorm2d(3).double().to(device)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="mixed dtype|scalar type|same type"):
        module(torch.randn(2, 3, 4, 5, device=device))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"


def test_cumulative_average_needs_a_counter(device):
    with pytest.raises(NotImplementedError, match="num_batches_tracked"):
        x = torch.randn(4, 3, device=device)
        mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
        batch_norm(x, None, None, mean, var, None, True, None, 1e-5)


@pytest.mark.parametrize(
    "tracked", [torch.tensor(0.0), torch.tensor(0).int(), torch.zeros(3).long()], ids=str
)
def test_counter_must_be_one_int64(tracked, device):
    x, tracked = torch.randn(4, 3, device=device), tracked.to(device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    before = tracked.clone()
    with pytest.raises(NotImplementedError, match="num_batches_tracked"):
        batch_norm(x, None, None, mean, var, tracked, True, 0.1, 1e-5)
    assert torch.equal(tracked, before) and mean.eq(0).all() and var.eq(1).all()


@pytest.mark.parametrize(
    "name, value",
    [
        ("dy", torch.randn(4, 2)),
        ("dy", torch.randn(4, 3).double()),
        ("dy", torch.randn(4, 3, device="meta")),
        ("weight", torch.ones(4)),
        ("stats", torch.ones(3, 2).double()),
        ("stats", torch.ones(2, 3)),
        ("stats", torch.ones(2, 4).double()),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.dtype}{list(v.shape)}{v.device}",
)
def test_backward_operator(name, value, device):
    arguments = {
        "dy": torch.randn(4, 3),
        "x": torch.randn(4, 3),
        "weight": torch.ones(3),
        "stats": torch.ones(2, 3).double(),
    }
    match = "weight should contain" if name == "weight" else f"expected {name}"
    with pytest.raises(RuntimeError, match=match):
        torch.ops.batchnorm_ext.batch_norm_backward(
            **{k: _move(v, device) for k, v in (arguments | {name: value}).items()},
            training=True,
            output_mask=[True] * 3,
        )


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_error_of_a_call_without_data_is_the_native_one(kind):
    """It was that of the comparison which looks for what has been written."""
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        arguments = torch.empty(4, 3), torch.zeros(3), torch.ones(3)
        for batch_norm in (F.batch_norm, ours.batch_norm):
            with pytest.raises(TypeError, match="'<=' not supported"):
                batch_norm(*arguments, training=True, eps="x")
