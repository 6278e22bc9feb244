"""Residual and activation in the CUDA side of the operators."""

from __future__ import annotations

import random

import pytest
import torch

from activations import ACTIVATIONS, INPUTS, NORMS, PIECEWISE, C, gradients, make_problem, oracle
from batchnorm_ext._activations import activation_name
from emulator.glue_cases import EPS, needs_glue, ops
from support import assert_within

PLANS = ["", "policy=grid,ranks=2", "policy=split,ranks=3,width=16"]
GROUPS = {"instance": C, "group": 2}

pytestmark = needs_glue


@pytest.fixture
def override_plan():
    yield torch.ops.batchnorm_ext._override_cuda_plan
    torch.ops.batchnorm_ext._override_cuda_plan("")


def bound(exact, dtype):
    """As for the CPU: some roundings of each term of float32 sums, and that of the result."""
    largest = max(exact.abs().max().item(), 1.0)
    return exact.abs() * torch.finfo(dtype).eps / 2 + 64 * torch.finfo(torch.float32).eps * largest


def by_operators(p, norm: str, activation: str):
    """y and the gradients, by the names of the oracle's."""
    groups, training = GROUPS.get(norm, 0), norm != "batch, evaluation"
    state = (None, None) if training else (p.mean, p.var)
    options = (training, EPS, groups, True, 1, p.residual, activation)
    y, stats = ops.batch_norm(p.x, p.weight, p.bias, *state, *options)
    reads_output = p.residual is not None and activation.partition("(")[0] in PIECEWISE
    rest = y if reads_output else p.residual
    options = (training, [True] * 3, p.bias.dtype, groups, activation)
    found = ops.batch_norm_activated_backward(p.dy, p.x, p.weight, p.bias, rest, stats, *options)
    return y, {f"gradient of {name}": g for name, g in zip(p.leaves, found, strict=False)}


SMALL = [case for case in INPUTS if len(case[0]) > 2 and torch.Size(case[0]).numel() < 2000]


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_forward_and_gradients(dtype, activation, override_plan):
    draw = random.Random(f"{dtype} {activation}")
    for norm in NORMS:
        override_plan(draw.choice(PLANS))
        size, layout = draw.choice(SMALL)
        has_residual = draw.choice([True, False]) and activation != "leaky_relu(-0.5)"
        p = make_problem(size, layout, dtype, has_residual)
        y, found = by_operators(p, norm, activation_name(activation))
        rounds = has_residual and activation in PIECEWISE
        exact = p.double()
        with torch.enable_grad():
            expected = oracle(exact, norm, activation, dtype if rounds else None)
            wanted = gradients(expected, exact)
        value = oracle(exact, norm, activation, None)
        assert_within(f"y, {norm}", y, value, bound(value, dtype))
        for name, gradient in wanted.items():
            assert_within(
                f"{name}, {norm}", found[name], gradient, bound(gradient, found[name].dtype)
            )


def test_residual_without_an_activation():
    p = make_problem((3, C, 9, 7), "contiguous", torch.float32, True)
    y, _ = ops.batch_norm(p.x, p.weight, p.bias, None, None, True, EPS, 0, True, 1, p.residual)
    plain, _ = ops.batch_norm(p.x, p.weight, p.bias, None, None, True, EPS)
    torch.testing.assert_close(y, plain + p.residual, rtol=1e-6, atol=1e-6)


def test_float64_has_no_kernels():
    """The operators refuse it on a GPU; a tensor that gets past that is not left unwritten."""
    p = make_problem((3, C, 9, 7), "contiguous", torch.float64, False)
    with pytest.raises(RuntimeError, match="float64 has no kernels with an activation"):
        ops.batch_norm(p.x, p.weight, p.bias, None, None, True, EPS, activation="relu")


@torch.no_grad()
def test_gradients_of_sums_that_leave_float32():
    """Products of these overflow in float32, and are summed again in float64."""
    p = make_problem((5, C, 9, 7), "contiguous", torch.float32, False)
    p.x, p.dy = (p.x * 1e25).requires_grad_(), p.dy * 1e25
    _, found = by_operators(p, "batch, training", "silu")
    exact = p.double()
    with torch.enable_grad():
        wanted = gradients(oracle(exact, "batch, training", "silu", None), exact)
    gradient = wanted["gradient of weight"]
    assert_within("gradient of weight", found["gradient of weight"], gradient, 1e-5 * 1e25)
