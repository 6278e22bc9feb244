"""Normalization, residual and activation in one pass, against float64 and against PyTorch."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from activations import (
    ACTIVATIONS,
    INPUTS,
    NORMS,
    PIECEWISE,
    C,
    bound,
    fused,
    gradients,
    make_problem,
    oracle,
)
from batchnorm_ext import functional
from cases import DTYPES, LAYOUTS
from support import assert_bitwise, assert_within, ops

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
with_and_without_residual = pytest.mark.parametrize("has_residual", [False, True])


# All but one: after the other, and after groups of (N, C), the activation is PyTorch's function.
FUSED = [*product((False, True), ACTIVATIONS)]
FUSED.remove((True, "leaky_relu(-0.5)"))


def is_fused(size, norm, activation, has_residual):
    return (has_residual, activation) in FUSED and (len(size) > 2 or norm.startswith("batch"))


def check(p, norm, activation):
    dtype = p.x.dtype
    y = fused(p, norm, activation)
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(p.x).stride()
    # a piecewise linear one after a residual looks at its output, which is rounded
    rounds = p.residual is not None and activation in PIECEWISE
    exact = p.double()
    expected = oracle(exact, norm, activation, dtype if rounds else None)
    # the value is that of the z that is not rounded
    value = oracle(exact, norm, activation, None)
    assert_within(f"y, {norm}", y, value, bound(value, dtype, 1.0))
    wanted = gradients(expected, exact)
    for name, found in gradients(y, p).items():
        out = found.dtype
        assert out == p.leaves[name.removeprefix("gradient of ")].dtype
        assert_within(f"{name}, {norm}", found, wanted[name], bound(wanted[name], out, 1.0))


@every_activation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, layout", INPUTS, ids=str)
def test_forward_and_gradients(size, layout, dtype, activation, device):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("there are no kernels for these")
    for has_residual in (False, True):
        for norm in NORMS:
            if not is_fused(size, norm, activation, has_residual):
                continue
            check(make_problem(size, layout, dtype, has_residual, device), norm, activation)


@pytest.mark.only("cpu", reason="of its caches")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_outputs_that_the_caches_do_not_hold(layout):
    """36 MB each. In channels_last, the sums already write the residual's gradient past them."""
    check(make_problem((8, 16, 264, 264), layout, torch.float32, True), "batch, training", "silu")


@every_activation
def test_derivatives_of_any_order(activation):
    """Away from the kinks, where finite differences tell nothing."""
    for has_residual in (False, True):
        for norm in NORMS:
            p = make_problem((3, C, 5), "contiguous", torch.float64, has_residual)

            def function(*leaves, p=p, norm=norm):
                for name, leaf in zip(p.leaves, leaves, strict=True):
                    setattr(p, name, leaf)
                return fused(p, norm, activation)

            assert gradcheck(function, tuple(p.leaves.values()), fast_mode=True)
            assert gradgradcheck(function, tuple(p.leaves.values()), fast_mode=True)


@with_and_without_residual
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_operators(activation, has_residual, device):
    p = make_problem((2, C, 5, 3), "channels_last", torch.float32, has_residual, device)
    arguments = (p.x, p.weight, p.bias, None, None, True, 1e-5, 2, True, 1)
    torch.library.opcheck(ops.batch_norm, (*arguments, p.residual, activation))
    stats = torch.stack([p.mean, p.var]).double()
    for training in (True, False):
        for mask in ([True] * 3, [True, False, False], [False, True, False], [False] * 3):
            options = (stats, training, mask, p.bias.dtype, 0, activation)
            arguments = (p.dy, p.x, p.weight, p.bias, p.residual, *options)
            tests = ["test_schema", "test_faketensor"]
            torch.library.opcheck(ops.batch_norm_activated_backward, arguments, test_utils=tests)


def test_operators_refuse_residuals_that_they_would_ignore(device):
    p = make_problem((6, C), "contiguous", torch.float32, True, device)
    stats = torch.stack([p.mean, p.var]).double()
    options = (None, None, True, 1e-5)
    groups = p.x, p.residual, 2, 1
    rows = p.x[None], p.residual[None], 6, 2
    for x, residual, count, dim in (groups, rows):
        with pytest.raises(NotImplementedError, match="each element of a statistic has a weight"):
            ops.batch_norm(x, p.weight, p.bias, *options, count, True, dim, residual)
    with pytest.raises(RuntimeError, match="expected no residual without an activation"):
        arguments = (p.dy, p.x, p.weight, p.bias, p.residual, stats, True, [True] * 3, None, 0, "")
        ops.batch_norm_activated_backward(*arguments)


@pytest.mark.only("cuda", reason="a CPU has kernels for it")
def test_float64_is_refused():
    x = torch.randn(6, C, dtype=torch.float64, device="cuda")
    with pytest.raises(NotImplementedError, match="neither residual nor activation for float64"):
        ops.batch_norm(x, None, None, None, None, True, 1e-5, activation="relu")


def test_operators_in_half_precision(device):
    p = make_problem((2, C, 5, 3), "channels_last", torch.bfloat16, True, device)
    state = (p.mean, p.var, torch.tensor(3, device=device), 0.1, 1e-5, 0)
    arguments = (p.x, p.weight, p.bias, *state, p.residual, "elu(0.7)")
    torch.library.opcheck(ops.batch_norm_update, arguments)


@every_activation
def test_special_values_are_those_of_pytorch(activation, device):
    """NaN, infinities, zeros of both signs: those of what the norm gives, and of a residual.

    On a GPU PyTorch's own kernels give relu(-0) another sign than on a CPU, and NaN other
    derivatives: there ours follow the CPU.
    """
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0]
    special += [3.0, -3.0, 6.0, 6.5, -0.5, 1.25, 100.0, -100.0, 1e30, -1e30]
    if activation == "gelu":  # NaN at infinity in PyTorch's vectors, and infinity in its definition
        special = [value for value in special if value != torch.inf]
    special = torch.tensor(special, device=device)
    x = special.repeat(len(special), 1)[:, None].contiguous().requires_grad_()
    residual = x.detach().transpose(0, 2).contiguous().requires_grad_()
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    for given in (None, residual):
        z = functional.batch_norm(x, zero, one, one / 4, eps=0.0)  # -1e-45 becomes -0
        z = z.detach() if given is None else z.detach() + residual.detach()
        z.requires_grad_()
        native = F.hardsigmoid(z) if activation == "hardsigmoid" else ACTIVATIONS[activation](z)
        y = functional.batch_norm_act(
            x, zero, one, one / 4, eps=0.0, activation=activation, residual=given
        )
        if device.type == "cpu":
            signs = (torch.where(v == 0, v.signbit(), 2) for v in (y, native))
            assert_bitwise("signs of zeros", *signs)
        if activation in PIECEWISE:
            assert_bitwise("y", y, native)
        else:
            # PyTorch's gelu adds -1 and 1 for large negative values: some roundings of z / 2
            torch.testing.assert_close(y, native, rtol=1e-5, atol=1e-6, equal_nan=True)
        (wanted,) = torch.autograd.grad(native.sum(), z)
        (found,) = torch.autograd.grad(y.sum(), x if given is None else residual)
        factor = 0.25 if given is None else 1.0
        if device.type == "cuda":
            wanted, found = wanted[~z.isnan()], found[~z.isnan()]
        torch.testing.assert_close(found, wanted * factor, rtol=1e-5, atol=1e-6, equal_nan=True)


@every_activation
@with_and_without_residual
def test_same_bits_for_any_number_of_threads(has_residual, activation, set_num_threads):
    for layout in ("contiguous", "channels_last"):
        p = make_problem((8, C, 96, 49), layout, torch.float32, has_residual)
        results = []
        for threads in (1, 2):
            set_num_threads(threads)
            y = fused(p, "batch, training", activation)
            results.append({"y": y, **gradients(y, p)})
        for name, value in results[0].items():
            assert_bitwise(name, value, results[1][name])


@pytest.mark.parametrize("has_residual, activation", FUSED)
def test_nothing_is_saved_that_a_network_would_not_keep(has_residual, activation):
    """The input, the parameters, the statistics, and the residual or the output."""
    p = make_problem((2, C, 5, 3), "contiguous", torch.float32, has_residual)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = fused(p, "batch, training", activation)
    assert y.grad_fn.name() == "batchnorm_ext::Norm"
    large = [t for t in saved if t.numel() == p.x.numel()]
    kept = {p.x.data_ptr()}
    if has_residual and activation != "identity":
        reads_output = activation in PIECEWISE
        kept.add(y.data_ptr() if reads_output else p.residual.data_ptr())
    assert {t.data_ptr() for t in large} == kept
    assert sum(t.nbytes for t in saved if t.numel() != p.x.numel()) <= C * (8 + 2 * 8)


def test_residual_in_another_memory_format():
    p = make_problem((2, C, 9, 7), "contiguous", torch.float32, True)
    expected = fused(p, "batch, training", "silu")
    wanted = gradients(expected, p)
    p.residual = LAYOUTS["channels_last"](p.residual.detach()).requires_grad_()
    y = fused(p, "batch, training", "silu")
    assert_bitwise("y", y, expected)
    for name, found in gradients(y, p).items():
        assert_bitwise(name, found, wanted[name])


@pytest.mark.parametrize("activation", ["relu", "silu"])
@with_and_without_residual
def test_without_gradients(has_residual, activation):
    p = make_problem((2, C, 9, 7), "channels_last", torch.float32, has_residual)
    expected = fused(p, "batch, training", activation)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = fused(p, "batch, training", activation)
        assert not y.requires_grad
        assert_bitwise("y", y, expected)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_frozen_leaves_get_no_gradient(activation, device):
    """Every subset of what may be frozen gives the others the gradients that they have anyway."""
    for norm in NORMS:
        p = make_problem((2, C, 9, 7), "contiguous", torch.float32, True, device)
        y = fused(p, norm, activation)
        wanted = gradients(y, p)
        for name, leaf in p.leaves.items():
            others = [other for other in p.leaves.values() if other is not leaf]
            for other in others:
                other.requires_grad_(False)
            (found,) = torch.autograd.grad(fused(p, norm, activation), leaf, p.dy)
            for other in others:
                other.requires_grad_()
            # on CUDA in evaluation, without sums, weight * invstd is rounded as one
            exact = wanted[f"gradient of {name}"]
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_running_statistics_move_as_without_an_activation(activation, device):
    p = make_problem((4, C, 9, 7), "contiguous", torch.float32, True, device)
    states = [(p.mean.clone(), p.var.clone()) for _ in range(2)]
    functional.batch_norm_act(
        p.x, *states[0], p.weight, p.bias, True, activation=activation, residual=p.residual
    )
    functional.batch_norm(p.x, *states[1], p.weight, p.bias, True)
    for name, found, wanted in zip(("mean", "var"), *states, strict=True):
        if device.type == "cpu":
            assert_bitwise(name, found, wanted)
        else:  # that kernel has fewer loads under way, and adds in another order
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        assert not torch.equal(found, getattr(p, name))
