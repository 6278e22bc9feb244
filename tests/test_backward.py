"""Gradients against the oracle, over the table of cases, and which of them are computed."""

from itertools import product

import pytest
import torch

import batchnorm_ext.functional as ours
from cases import EVAL_CASES, LAYOUTS, TRAINING_CASES, Case
from support import (
    assert_bitwise,
    batch_norm_backward,
    check_backward,
    check_gradients,
    make_problem,
)


@pytest.mark.parametrize("case", TRAINING_CASES, ids=str)
def test_training(case, device):
    problem = make_problem(case, device)
    _, stats = problem.clone().forward(training=True)
    check_backward(problem, True, stats)


@pytest.mark.parametrize("case", EVAL_CASES, ids=str)
def test_evaluation(case, device):
    problem = make_problem(case, device)
    _, stats = problem.forward(training=False)
    check_backward(problem, False, stats)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_mask(dtype, layout, training, device):
    """What is asked for does not depend, bit by bit, on what else is; the rest is None."""
    problem = make_problem(Case((3, 17, 7, 9), layout, dtype), device)
    _, stats = problem.clone().forward(training)
    arguments = problem.dy, problem.x, problem.weight, stats, training
    whole = batch_norm_backward(*arguments, [True] * 3)
    for mask in product([True, False], repeat=3):
        some = batch_norm_backward(*arguments, mask)
        for name, wanted, a, b in zip(["dx", "dweight", "dbias"], mask, some, whole, strict=True):
            if wanted:
                assert_bitwise(name, a, b)
            else:
                assert a is None, f"{name} was not asked for"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last", "channel_slice"])
def test_gradient_in_another_layout_than_the_input(x_layout, dy_layout, training, device):
    problem = make_problem(Case((3, 17, 7, 9), x_layout), device)
    problem.dy = LAYOUTS[dy_layout](problem.dy.contiguous())
    _, stats = problem.clone().forward(training)
    check_backward(problem, training, stats)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", list(product([True, False], repeat=3)), ids=str)
def test_autograd_gives_the_gradients_that_are_wanted(wanted, training, device):
    problem = make_problem(Case((3, 17, 7, 9)), device)
    leaves = {"x": problem.x, "weight": problem.weight, "bias": problem.bias}
    for leaf, want in zip(leaves.values(), wanted, strict=True):
        leaf.requires_grad_(want)
    running = problem.running_mean.clone(), problem.running_var.clone()
    y = ours.batch_norm(problem.x, *running, problem.weight, problem.bias, training)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.backward(problem.dy)
    for (name, leaf), want in zip(leaves.items(), wanted, strict=True):
        assert (leaf.grad is not None) == want, name
    check_gradients(problem, training, *(leaf.grad for leaf in leaves.values()))


def test_gradient_that_is_expanded(device):
    """``sum().backward()`` hands the backward a gradient of stride 0."""
    problem = make_problem(Case((3, 17, 7, 9), "channels_last"), device)
    problem.x.requires_grad_()
    problem.dy = torch.ones((), device=device).expand_as(problem.x)
    ours.batch_norm(problem.x, None, None, problem.weight, problem.bias, True).sum().backward()
    check_gradients(problem, True, problem.x.grad, None, None)


def test_two_forwards_before_one_backward(device):
    first, second = (make_problem(Case((4, 5, 6, 7)), device, seed) for seed in (1, 2))
    running = first.running_mean.clone(), first.running_var.clone()
    second.weight, second.bias = first.weight, first.bias
    outputs = []
    for problem in (first, second):
        problem.x.requires_grad_()
        outputs.append(ours.batch_norm(problem.x, *running, first.weight, first.bias, True))
    torch.autograd.backward(outputs, [first.dy, second.dy])
    check_gradients(first, True, first.x.grad, None, None)
    check_gradients(second, True, second.x.grad, None, None)


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_may_change_before_the_backward(training, device):
    problem = make_problem(Case((4, 5, 6, 7)), device)
    leaves = [t.requires_grad_() for t in (problem.x, problem.weight, problem.bias)]
    running = problem.running_mean.clone(), problem.running_var.clone()
    y = ours.batch_norm(problem.x, *running, problem.weight, problem.bias, training)
    for tensor in running:
        tensor.add_(1)
    y.backward(problem.dy)
    check_gradients(problem, training, *(leaf.grad for leaf in leaves))


def test_backward_twice_through_one_graph(device):
    problem = make_problem(Case((4, 5, 6, 7)), device)
    leaves = [t.requires_grad_() for t in (problem.x, problem.weight, problem.bias)]
    y = ours.batch_norm(problem.x, None, None, problem.weight, problem.bias, True)
    y.backward(problem.dy, retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    y.backward(problem.dy)
    for name, leaf, grad in zip(["dx", "dweight", "dbias"], leaves, once, strict=True):
        assert_bitwise(name, leaf.grad, 2 * grad)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(problem.dy)


@pytest.mark.parametrize("changed", ["x", "weight"])
def test_overwriting_what_the_backward_needs_is_an_error(changed, device):
    problem = make_problem(Case((4, 5, 6, 7)), device)
    x = problem.x.requires_grad_() * 1
    weight = problem.weight.requires_grad_() * 1
    y = ours.batch_norm(x, None, None, weight, problem.bias, True)
    with torch.no_grad():
        {"x": x, "weight": weight}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(problem.dy)


def test_output_may_be_overwritten(device):
    problem = make_problem(Case((4, 5, 6, 7)), device)
    problem.x.requires_grad_()
    y = ours.batch_norm(problem.x, None, None, problem.weight, problem.bias, True)
    positive = y.detach() > 0
    y.relu_().backward(problem.dy)
    problem.dy = problem.dy * positive
    check_gradients(problem, True, problem.x.grad, None, None)
