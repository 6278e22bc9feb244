"""How fused activations may be asked for: names, modules, contexts, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from activations import MODULES, NORMS, C, fused, gradients, make_problem
from batchnorm_ext import functional
from batchnorm_ext._activations import ACTIVATIONS
from support import assert_bitwise, ops

pytestmark = pytest.mark.only("cpu", reason="of calls alone")


@pytest.mark.parametrize("name", MODULES)
def test_modules_stand_for_their_names(name):
    p = make_problem((3, C, 5), "contiguous", torch.float32, False)
    y = fused(p, "batch, training", MODULES[name])
    assert_bitwise("y", y, fused(p, "batch, training", name))


@pytest.mark.parametrize(
    "activation",
    ["swish", "relu(1)", "leaky_relu()", "leaky_relu(1, 2)", "hardtanh(1, -1)", "elu(x)", "gelu(1)"]
    + [torch.nn.Softplus(), torch.nn.Linear, "relu ", None, 3],
    ids=str,
)
def test_unknown_activations_are_refused(activation):
    x, mean = torch.randn(4, C, 3), torch.zeros(C)
    with pytest.raises(ValueError, match="expected activation to be one of .*relu, .*hardswish"):
        functional.batch_norm_act(x, mean, mean + 1, training=True, activation=activation)
    assert not mean.any()


@torch.no_grad()
def test_the_tables_of_python_and_of_the_operators_agree():
    x = torch.randn(5, C) * 3
    norm = (x, None, None, None, None, True, 1e-5)
    with pytest.raises(ValueError) as error:
        ops.batch_norm(*norm, activation="unknown")
    names = str(error.value).partition("expected activation to be one of ")[2]
    assert names.partition(", some with")[0].split(", ") == list(ACTIVATIONS)
    for name, row in ACTIVATIONS.items():
        numbers = [value for value in row.parameters.values() if not isinstance(value, str)]
        full = f"{name}({', '.join(map(str, numbers))})" if numbers else name
        found, expected = (ops.batch_norm(*norm, activation=text)[0] for text in (full, name))
        assert_bitwise(name, found, expected)


def test_residuals_that_do_not_fit_are_refused():
    x, mean = torch.randn(4, C, 3), torch.zeros(C)
    for residual, message in [
        (torch.randn(4, C, 1), r"shape of input, \(4, 8, 3\), got shape \(4, 8, 1\)"),
        (torch.randn(4, C, 3).double(), "dtype of input, torch.float32, got dtype torch.float64"),
        (torch.randn(4, C, 3, device="meta"), "device of input, cpu, got device meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            functional.batch_norm_act(x, mean, mean + 1, training=True, residual=residual)
    with pytest.raises(TypeError, match="expected residual to be a tensor or None, got 1.0"):
        functional.batch_norm_act(x, mean, mean + 1, training=True, residual=1.0)
    assert not mean.any()


@pytest.mark.parametrize("has_residual", [False, True])
def test_autocast(has_residual):
    """The input of the norm stays as it is, as without an activation."""
    p = make_problem((2, C, 9, 7), "contiguous", torch.bfloat16, has_residual)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for norm in NORMS:
            y = fused(p, norm, "gelu")
            assert y.dtype == torch.bfloat16 and y.grad_fn.name() == "batchnorm_ext::Norm"
            gradients(y, p)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.25)", "gelu"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_compiled_in_one_graph(has_residual, activation, norm, fresh_dynamo):
    p = make_problem((2, C, 9, 7), "contiguous", torch.float32, has_residual)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    y, expected = compiled(p, norm, activation), fused(p, norm, activation)
    assert_bitwise("y", y, expected)
    wanted = gradients(expected, p)
    for name, found in gradients(y, p).items():
        assert_bitwise(name, found, wanted[name])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_negative_views(activation):
    """The imaginary part of a conjugated tensor is a view that means the opposite of its memory."""
    values = torch.randn(2, 4, C, 5, dtype=torch.complex64)
    x, residual = values.conj().imag
    assert x.is_neg()
    y = functional.batch_norm_act(
        x, None, None, training=True, activation=activation, residual=residual
    )
    plain = [t.resolve_neg().clone() for t in (x, residual)]
    expected = functional.batch_norm_act(
        plain[0], None, None, training=True, activation=activation, residual=plain[1]
    )
    assert_bitwise("y", y, expected)


def test_empty_batch():
    x = torch.randn(0, C, 3, requires_grad=True)
    residual = torch.randn(0, C, 3, requires_grad=True)
    weight = torch.ones(C, requires_grad=True)
    y = functional.batch_norm_act(
        x, None, None, weight, training=True, activation="silu", residual=residual
    )
    assert y.shape == x.shape
    dx, dresidual, dweight = torch.autograd.grad(y.sum(), (x, residual, weight))
    assert dx.shape == dresidual.shape == x.shape and not dweight.any()


def test_activations_that_the_operators_do_not_take_follow_the_fused_norm():
    """(N, C) in groups, a slope below zero after a residual; written with spaces."""
    x, residual = torch.randn(2, 6, C)
    y = functional.group_norm_act(x, 2, activation="silu", residual=residual)
    assert_bitwise("groups", y, F.silu(functional.group_norm(x, 2) + residual))
    options = {"activation": "leaky_relu( -0.5 )", "residual": residual}
    y = functional.batch_norm_act(x, None, None, training=True, **options)
    expected = functional.batch_norm(x, None, None, training=True) + residual
    assert_bitwise("slope", y, F.leaky_relu(expected, -0.5))


def test_torch_func():
    x, residual = torch.randn(2, 3, C, 5)

    def total(x, residual):
        y = functional.batch_norm_act(x, None, None, training=True, residual=residual)
        return y.pow(2).sum()

    found = torch.func.grad(total, argnums=(0, 1))(x, residual)
    leaves = [t.clone().requires_grad_() for t in (x, residual)]
    for a, b in zip(found, torch.autograd.grad(total(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
