"""First and second derivatives against finite differences, and the contract of the operators."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cases import LAYOUTS
from support import batch_norm, batch_norm_backward, ops

INPUTS = [((4, 3), "contiguous"), ((2, 3, 2, 3), "contiguous"), ((2, 3, 2, 3), "channels_last")]


def _leaves(device, size, layout="contiguous", weight=True, bias=True):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device)

    x = LAYOUTS[layout](leaf(*size)).requires_grad_()
    parameters = [leaf(size[1]).requires_grad_() if given else None for given in (weight, bias)]
    return x, *parameters


def _function(training, device):
    mean, var = torch.tensor([0.1, -0.5, 1.0]), torch.tensor([1.5, 0.5, 2.0])
    tracked = (None, None) if training else (mean.double().to(device), var.double().to(device))

    def normalize(x, weight, bias):
        return batch_norm(x, weight, bias, *tracked, None, training, 0.1, 1e-5)[0]

    return normalize


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "weight, bias", [(True, True), (True, False), (False, True), (False, False)]
)
@pytest.mark.parametrize("size, layout", INPUTS, ids=str)
def test_derivatives(size, layout, weight, bias, training, check, device):
    assert check(_function(training, device), _leaves(device, size, layout, weight, bias))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "x and bias", "weight and bias"])
def test_derivatives_where_some_are_not_wanted(frozen, training, check, device):
    leaves = _leaves(device, (3, 3, 2, 2))
    for name, leaf in zip(["x", "weight", "bias"], leaves, strict=True):
        leaf.requires_grad_(name not in frozen.split())
    if check is gradgradcheck and frozen == "x and bias" and not training:
        # the gradient of the weight is then linear in dy, and depends on nothing else
        assert check(_function(training, device), leaves, check_undefined_grad=False)
    else:
        assert check(_function(training, device), leaves)


@pytest.mark.parametrize("training", [True, False])
def test_third_derivative(training, device):
    leaves = _leaves(device, (3, 3, 2))

    def gradient(x, weight, bias):
        y = _function(training, device)(x, weight, bias)
        return torch.autograd.grad(y.pow(3).sum(), (x, weight), create_graph=True)

    assert gradgradcheck(gradient, leaves)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (True, True, True)])
@pytest.mark.parametrize("training", [True, False])
def test_derivative_of_the_backward_operator(training, mask, device):
    """The statistics are constants to the operator, but for what they owe to x in training."""
    x, weight, _ = _leaves(device, (4, 3, 2))
    dy = torch.randn(4, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    frozen = torch.randn(2, 3, dtype=torch.float64, device=device).abs() + 0.5

    def gradients(dy, x, weight):
        stats = frozen
        if training:
            _, stats = batch_norm(x.detach(), None, None, None, None, None, True, 0.1, 1e-5)
        results = batch_norm_backward(dy, x, weight, stats, training, list(mask))
        return tuple(r for r, wanted in zip(results, mask, strict=True) if wanted)

    assert gradcheck(gradients, (dy, x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivative_in_low_precision(dtype, device):
    """The dtypes of the inputs come back, with the value of float64 but for the rounding."""
    leaves = _leaves(device, (4, 3, 5))
    low = [leaf.detach().to(dtype if leaf is leaves[0] else torch.float32) for leaf in leaves]
    exact = [leaf.double().requires_grad_() for leaf in low]
    low = [leaf.requires_grad_() for leaf in low]

    def penalty_gradients(leaves):
        y = _function(True, device)(*leaves)
        (dx,) = torch.autograd.grad(y.pow(4).sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), leaves)

    for leaf, grad, wanted in zip(
        low, penalty_gradients(low), penalty_gradients(exact), strict=True
    ):
        assert grad.dtype == leaf.dtype
        # every intermediate gradient is rounded to the dtype of x: some ten roundings
        bound = 10 * torch.finfo(dtype).eps * wanted.abs().max().item()
        torch.testing.assert_close(grad.double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "dtype, scale, eps",
    [
        (torch.float32, 1.0, 1e-5),
        (torch.float32, 1e25, 1e-5),  # the variance overflows
        (torch.float32, 2e37, 1e-5),  # nearly the whole range: so does x - mean
        (torch.float32, 1e-25, 1e-60),  # invstd ** -2 underflows
        (torch.bfloat16, 1e25, 1e-5),
        (torch.float64, 1e200, 1e-5),
        (torch.float64, 1e-200, 5e-324),
    ],
    ids=str,
)
def test_gradient_of_a_graph_is_finite_where_the_plain_one_is(dtype, scale, eps, device):
    x = torch.randn(50, 2, dtype=torch.float64)
    x[0], x[1] = -15.0, 15.0
    x = (x * scale).to(dtype).to(device).requires_grad_()
    weight = torch.full((2,), scale, dtype=torch.promote_types(dtype, torch.float32), device=device)
    dy = torch.randn(50, 2, device=device).to(dtype)
    y, _ = batch_norm(x, weight, None, None, None, None, True, 0.1, eps)
    (plain,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (graph,) = torch.autograd.grad(y, x, dy, create_graph=True)
    # some ten roundings: of the terms in float32 or float64, and of the result to the dtype of x
    bound = 10 * torch.finfo(dtype).eps * plain.abs().max().item()
    torch.testing.assert_close(graph.detach(), plain, rtol=0, atol=bound)


@pytest.mark.parametrize("groups, centred", [(0, True), (2, True), (2, False)])
def test_gradient_of_a_graph_of_channels_far_from_zero(groups, centred, device):
    """The mean was rounded to float32: at a million standard deviations 2% of the values."""
    if not centred and device.type == "cuda":
        pytest.skip("there are no kernels for root mean squares on CUDA")
    x = (1e6 + torch.randn(8, 4, 6, 6, dtype=torch.float64)).float().to(device)
    weight, dy, other = (torch.randn(size, device=device) for size in (4, x.shape, x.shape))

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, dy)]
        y, _ = ops.batch_norm(*leaves[:2], None, None, None, True, 1e-5, groups, centred)
        dx, dweight = torch.autograd.grad(y, leaves[:2], leaves[2], create_graph=True)
        return dx, dweight, *torch.autograd.grad((dx * other).sum(), leaves)

    for found, wanted in zip(run(torch.float32), run(torch.float64), strict=True):
        # some ten roundings of terms, of which hundreds are added up
        bound = 20 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound)
