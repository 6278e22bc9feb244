"""Which forwards are rewritten, and why others are not."""

import gc
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm_ext
from fusing import (
    DropPath,
    assert_fuses,
    assert_leaves,
    assert_same,
    block,
    conv,
    image,
    norm,
    pair,
)

pytestmark = pytest.mark.only("cpu", reason="of forwards alone")

FLAG = True


class Settings:
    flag = True


class Layer(nn.Module):
    flag = True


def _counts(m, x):
    m.calls = m.calls + 1
    return m.relu(m.bn1(x))


def _keeps(m, x):
    m.kept.append(x)
    return m.relu(m.bn1(x))


def _no_grad(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    with torch.no_grad():
        z = m.bn2(x)
    return y + z


def _own_random(m, x):
    return m.relu(m.bn1(x)) if random.random() < 2 else x


def _global(m, x):
    return m.relu(m.bn1(x)) if FLAG else x


def _setting(m, x):
    return m.relu(m.bn1(x)) if Settings.flag else x


def _backends(m, x):
    return m.relu(m.bn1(x)) if torch.backends.mkldnn.enabled else x


def _caught(m, x):
    try:
        y = x * torch.rand(1)
    except Exception:
        y = x
    return m.relu(m.bn1(y))


def _noise(m, x):
    return m.relu(m.bn1(x)) + torch.rand(1)


def _grad_mode(m, x):
    return m.relu(m.bn1(x)) if torch.is_grad_enabled() else x


def _imports(m, x):
    import random

    return m.relu(m.bn1(x)) if random.random() < 2 else x


def _sets_a_global(m, x):
    global FLAG
    FLAG = True
    return m.relu(m.bn1(x))


def _matches(m, x):
    match x:
        case nn.Parameter():
            return x
    return m.relu(m.bn1(x))


def _checkpointed(m, x):
    from torch.utils.checkpoint import checkpoint

    return m.relu(m.bn1(checkpoint(m.conv1, x, use_reentrant=False)))


@pytest.mark.parametrize(
    "run, reason",
    [
        (lambda m, x: m.relu(m.bn1(x)) if x.sum() > 0 else x, "symbolically traced variables"),
        (lambda m, x: m.relu(m.bn1(x)) * m.table[0], "it reads table, a list"),
        (_counts, "it sets calls"),
        (_keeps, "it reads kept, a list"),
        (_no_grad, "it calls _set_grad_enabled on nothing that it is given"),
        (_own_random, "it uses the global random"),
        (_global, "it uses the global FLAG"),
        (lambda m, x: m.relu(m.bn1(x)) if not hasattr(m, "skip") else x, "it looks for skip"),
        (_setting, "it uses the global Settings"),
        (_backends, "it uses torch.backends"),
        (_caught, "it calls rand on nothing that it is given"),
        (_noise, "it calls rand on nothing that it is given"),
        (_grad_mode, "it calls is_grad_enabled of torch"),
        (_checkpointed, ""),
        (_imports, "it imports random"),
        (_sets_a_global, "it sets the global FLAG"),
        (_matches, "it asks for a type"),
        (lambda m, x: m.relu(m.bn1(x)) if Layer.flag else x, "it uses Layer.flag"),
        (lambda m, x: m.relu(m.bn1(x)) if type(m).__name__ else x, "it asks for a type"),
        (lambda m, x: m.relu(m.bn1(x)) if m.__class__.__name__ else x, "it asks for a type"),
        (lambda m, x: m.relu(m.bn1(x)) if m.__dict__["training"] else x, "it reads __dict__"),
        (lambda m, x: m.relu(m.bn1(x)) if x.grad_fn is None else x, "it reads grad_fn of a value"),
        (lambda m, x: m.relu(m.bn1(x)) if hasattr(x, "mask") else x, "it reads mask of a value"),
        (lambda m, x: m.relu(m.bn1(x)) if callable(x) else x, "it calls callable of builtins"),
        (
            lambda m, x: m.relu(m.bn1(x)) if isinstance(x, nn.Parameter) else x,
            "it asks for the type of a value",
        ),
        (
            lambda m, x: m.relu(m.bn1(x)) if isinstance(m.conv1(x), tuple) else x,
            "it asks for the type of a value",
        ),
        (lambda m, x: (m.log(x), m.relu(m.bn1(x)))[1], "it reads log, a builtin_function"),
    ],
)
def test_forwards_that_are_no_graphs(run, reason):
    model = block(run)
    model.calls, model.kept, model.table, model.log = 0, [], [2.0], [].append
    model, fused, report = pair(model)
    assert report.done == {} and f"is no graph: {reason}" in report.left["bn1"], str(report)
    assert "left as it is: the model (fusing.Model) is no graph" in report.note
    assert model.calls == fused.calls == 0 and model.kept == fused.kept == []
    assert_same(fused, model, image())


def test_forwards_with_comprehensions_and_helpers():
    def helper(value):
        return F.relu(value)

    def run(m, x):
        return torch.stack([helper(m.bn1(y)) for y in (x, m.conv1(x))]).sum(0)

    model = block(run, bn2=None)
    fused = assert_fuses(model, image(), 1)
    assert batchnorm_ext.fuse(fused, report=True)[1].done["bn1"] == "with relu; with relu"


@pytest.mark.parametrize(
    "of",
    [
        lambda x: torch.ones((x.size(0), 1, 1, 1), dtype=x.dtype),
        lambda x: torch.full((x.shape[0], 1, 1, 1), 0.5, dtype=x.dtype),
        lambda x: torch.reshape(x, (x.shape[0], -1)).mean(),
        lambda x: F.avg_pool2d(x, x.size()[2:]),
        lambda x: torch.unsqueeze(x, x.dim()).mean(),
        lambda x: x * 2 if isinstance(x, torch.Tensor) and not isinstance(x, list) else x,
    ],
)
def test_sizes_and_types_of_what_a_forward_is_given(of):
    """Sizes are no numbers while it is traced, nor tensors, for which C++ code would take them."""
    assert_fuses(block(lambda m, x: m.relu(m.bn1(m.conv1(x))) * of(x), bn2=None), image(), 1)


@pytest.mark.parametrize(
    "of",
    [
        lambda x: torch.rand(x.size(0), 1, 1, 1, dtype=x.dtype),
        lambda x: torch.tensor(x.shape[0]),
        lambda x: torch.as_tensor(x),
    ],
)
def test_sizes_that_a_function_needs_at_once(of):
    model = block(lambda m, x: m.relu(m.bn1(m.conv1(x))) * of(x))
    assert_leaves(model, "the model (fusing.Model) is no graph")


def test_decorated_forwards():
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1 = norm()

        @torch.autocast("cpu", torch.bfloat16)
        def forward(self, x):
            return F.relu(self.bn1(x))

    _, report = batchnorm_ext.fuse(Decorated(), report=True)
    assert "is no graph: it is torch's own, or decorated by it" in report.left["bn1"]


def test_parts_of_a_model_that_is_no_graph_are_fused():
    layers = nn.ModuleList([nn.Sequential(conv(), norm(), nn.ReLU()) for _ in range(3)])

    def run(m, x):
        for layer in m.layers:
            x = layer(x) if x.sum() < 1e9 else -x
        return m.relu(m.bn1(x))

    assert_fuses(block(run, bn2=None, layers=layers), image(), 3, 1)


def test_drop_path_before_the_sum():
    def run(m, x):
        return m.relu(m.drop(m.bn1(m.conv1(x))) + x)

    assert_leaves(block(run, drop=DropPath()), "before drop (fusing.DropPath)")


def test_callbacks_of_the_garbage_collector_are_no_part_of_a_forward():
    """As of pytest plugins and profilers, which write to globals of their own."""

    def read_a_global(phase, info):
        return FLAG

    threshold = gc.get_threshold()
    gc.callbacks.append(read_a_global)
    gc.set_threshold(1)
    try:
        assert_fuses(block(lambda m, x: m.relu(m.bn1(m.conv1(x))), bn2=None), image(), 1)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(read_a_global)
    assert gc.isenabled()
