"""BatchNormAct and GroupNormAct: layers of batch and group normalization in all but the forward."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

import batchnorm_ext
from activations import MODULES, C
from situations.parts import numbered
from support import assert_bitwise

pytestmark = pytest.mark.only("cpu", reason="of calls alone")

SIZES = {
    "BatchNormAct1d": (4, C, 7),
    "BatchNormAct2d": (3, C, 5, 4),
    "BatchNormAct3d": (2, C, 3, 4, 5),
    "GroupNormAct": (3, C, 5, 4),
}
# float32 on a few dozen elements of order 1: a few roundings
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

every_kind = pytest.mark.parametrize("kind", SIZES)
with_and_without_residual = pytest.mark.parametrize("has_residual", [False, True])


def _pair(kind, activation="relu", **options):
    """The layer, and a native one with the same state."""
    groups = (2,) if kind == "GroupNormAct" else ()
    layer = numbered(getattr(batchnorm_ext, kind)(*groups, C, activation, **options))
    native = getattr(nn, kind.replace("Act", ""))(*groups, C, **options)
    native.load_state_dict(layer.state_dict())
    return layer, native


def _inputs(kind, has_residual):
    x = torch.randn(SIZES[kind])
    return (x, torch.randn(SIZES[kind])) if has_residual else (x,)


def _apart(native, module, x, residual=None):
    y = native(x)
    return copy.copy(module)(y if residual is None else y + residual)


@every_kind
@with_and_without_residual
@pytest.mark.parametrize("name", MODULES)
def test_is_norm_add_and_activation(name, has_residual, kind):
    layer, native = _pair(kind, MODULES[name])
    for training in (True, True, False):
        layer.train(training), native.train(training)
        inputs = [t.requires_grad_() for t in _inputs(kind, has_residual)]
        y, expected = layer(*inputs), _apart(native, MODULES[name], *inputs)
        torch.testing.assert_close(y, expected, **CLOSE)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)
        wanted = torch.autograd.grad(expected, [*inputs, *native.parameters()], dy)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums of a hundred terms
    for key, value in native.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value, **CLOSE)


@every_kind
def test_state_is_that_of_the_norm(kind):
    layer, native = _pair(kind)
    assert layer.state_dict().keys() == native.state_dict().keys()
    assert isinstance(layer, type(native))
    layer.load_state_dict(native.state_dict())
    for options in ({"affine": False}, {"eps": 0.1}, {"dtype": torch.float64}):
        layer, native = _pair(kind, **options)
        assert [p.dtype for p in layer.parameters()] == [p.dtype for p in native.parameters()]
        assert layer.eps == native.eps
    if kind != "GroupNormAct":
        layer, native = _pair(kind, momentum=None, track_running_stats=False)
        assert layer.state_dict().keys() == native.state_dict().keys()


@every_kind
def test_repr_names_the_activation(kind):
    for activation, shown in [("identity", "identity"), (nn.LeakyReLU(0.1), "leaky_relu(0.1)")]:
        layer, native = _pair(kind, activation)
        norm = repr(native).removesuffix(")").replace(type(native).__name__, kind)
        assert repr(layer) == f"{norm}, activation={shown})"


@every_kind
@with_and_without_residual
def test_copies_compute_the_same(has_residual, kind):
    layer, _ = _pair(kind, "silu")
    inputs = _inputs(kind, has_residual)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    y = layer(*inputs)
    for other in copies:
        assert_bitwise("y", other(*inputs), y)
        for key, value in layer.state_dict().items():
            assert_bitwise(key, other.state_dict()[key], value)


@every_kind
@with_and_without_residual
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_exported_graphs_hold_the_operators_of_pytorch(has_residual, kind, fresh_dynamo):
    layer, _ = _pair(kind, "hardswish")
    layer.eval()
    inputs = _inputs(kind, has_residual)
    exported = torch.export.export(layer, inputs)
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert called and all(name.startswith("aten.") for name in called)
    traced = torch.jit.trace(layer, inputs)
    assert "batchnorm_ext::" not in str(traced.inlined_graph)
    for module in (exported.module(), traced):
        torch.testing.assert_close(module(*inputs), layer(*inputs), **CLOSE)


@every_kind
def test_scripting_says_no(kind):
    """A script of the layer of torch.nn alone would leave the activation out."""
    layer, _ = _pair(kind)
    with pytest.raises(RuntimeError, match="if-expression|NotSupported"):
        torch.jit.script(layer)


class _Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.norm, _ = _pair(kind)

    def forward(self, x):
        return self.norm(self.norm(x), x)


@every_kind
def test_fx_traces_one_node(kind):
    model = _Block(kind).eval()
    graph = fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 2
    (x,) = _inputs(kind, False)
    assert_bitwise("y", graph(x), model(x))


@every_kind
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend, kind, fresh_dynamo):
    model, twin = _Block(kind), _Block(kind)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    (x,) = _inputs(kind, False)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = compiled(leaves[0]), twin(leaves[1])
    torch.testing.assert_close(y, expected, **CLOSE)
    y.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, **CLOSE)


@every_kind
def test_conversions_leave_the_layer(kind):
    layer, _ = _pair(kind)
    model = nn.Sequential(layer)
    batchnorm_ext.convert(model)
    assert type(layer) is getattr(batchnorm_ext, kind)
    if kind != "GroupNormAct":
        folded = batchnorm_ext.fold(nn.Sequential(nn.Conv2d(3, C, 1), layer).eval())
        assert type(folded[1]) is getattr(batchnorm_ext, kind)


@every_kind
def test_a_call_that_fails_changes_nothing(kind):
    layer, _ = _pair(kind)
    before = copy.deepcopy(layer.state_dict())
    (x,) = _inputs(kind, False)
    with pytest.raises(ValueError, match="expected residual of the shape of input"):
        layer(x, x[:1])
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(1, C + 1, 1, 1, 1, 1))
    for key, value in layer.state_dict().items():
        assert_bitwise(key, value, before[key])


def test_hooks_see_what_the_layer_is_given():
    layer, _ = _pair("BatchNormAct2d")
    seen = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs)))
    x, residual = _inputs("BatchNormAct2d", True)
    layer(x), layer(x, residual), layer(x, residual=residual)
    assert seen == [1, 2, 1]


def test_a_replaced_function_of_pytorch_is_called(monkeypatch):
    layer, _ = _pair("BatchNormAct2d", "relu")
    inputs = _inputs("BatchNormAct2d", True)
    monkeypatch.setattr(nn.functional, "batch_norm", lambda x, *rest, **options: 2 * x)
    assert_bitwise("y", layer(*inputs), (2 * inputs[0] + inputs[1]).relu())


def test_checkpointing_moves_the_statistics_once():
    layer, twin = (_pair("BatchNormAct2d")[0] for _ in range(2))
    x, residual = (t.requires_grad_() for t in _inputs("BatchNormAct2d", True))
    y = torch.utils.checkpoint.checkpoint(layer, x, residual, use_reentrant=False)
    expected = twin(x, residual)
    wanted = torch.autograd.grad(expected.pow(2).sum(), (x, residual))
    found = torch.autograd.grad(y.pow(2).sum(), (x, residual))
    for a, b in zip(found, wanted, strict=True):
        assert_bitwise("gradient", a, b)
    for key, value in twin.state_dict().items():
        assert_bitwise(key, layer.state_dict()[key], value)
