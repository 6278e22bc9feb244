"""The contract of the operators with PyTorch: schemas, fake kernels, autograd registration."""

from itertools import product

import pytest
import torch
from torch._subclasses import FakeTensorMode

from cases import LAYOUTS, Case
from support import batch_norm, batch_norm_backward, forward_call, make_problem, ops

CASES = [
    Case((4, 3)),
    Case((2, 3, 4, 5), "channels_last"),
    Case((2, 3, 4, 5), "channel_slice"),
    Case((2, 3, 4), "last_two_swapped", torch.bfloat16),
    Case((2, 3, 4, 5), dtype=torch.float16, affine="weight", param_dtype=None),
    Case((2, 3, 2, 2, 2), dtype=torch.float64, affine="none", track=False),
    Case((2, 3, 4), affine="bias", momentum=None),
    Case((2, 3, 4), momentum=0.0),
]


def _requiring_grad(problem):
    for tensor in (problem.x, problem.weight, problem.bias):
        if tensor is not None:
            tensor.requires_grad_()
    return problem


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_operator(case, device):
    for training in (True, False):
        if training or case.track:
            problem = _requiring_grad(make_problem(case, device))
            torch.library.opcheck(*forward_call(*problem.arguments(training)))


def test_forward_operator_without_gradients(device):
    torch.library.opcheck(*forward_call(*make_problem(CASES[0], device).arguments(True)))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mask", list(product([True, False], repeat=3)), ids=str)
def test_backward_operator(mask, case, device):
    problem = make_problem(case, device)
    for training in (True, False):
        if training or case.track:
            _, stats = problem.clone().forward(training)
            arguments = problem.dy, problem.x, problem.weight, stats, training, list(mask)
            torch.library.opcheck(batch_norm_backward, arguments)


def test_backward_operator_with_gradients(device):
    problem = make_problem(CASES[1], device)
    _, stats = problem.clone().forward(True)
    leaves = (
        problem.dy.requires_grad_(),
        problem.x.requires_grad_(),
        problem.weight.requires_grad_(),
    )
    torch.library.opcheck(batch_norm_backward, (*leaves, stats, True, [True] * 3))


def test_empty_batch(device):
    """Its statistics are NaN in training, which opcheck takes for a difference between two runs."""
    problem = _requiring_grad(make_problem(Case((0, 3, 4)), device))
    torch.library.opcheck(*forward_call(*problem.arguments(False)))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(*forward_call(*problem.arguments(True)), test_utils=tests)


def test_schema_names_what_it_writes():
    """Evaluation and calls that track nothing have a schema without aliases."""
    for op in (ops.batch_norm_update, ops.apply_update, ops.sync_batch_norm):
        written = {
            argument.name
            for argument in op.default._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        assert written == {"running_mean", "running_var", "num_batches_tracked"}
    for op in (ops.batch_norm, ops.batch_norm_backward, ops.apply, ops.moments):
        assert not op.default._schema.is_mutable
    for op in (ops.grad_moments, ops.grad_apply, ops.activated_grad_apply):
        assert not op.default._schema.is_mutable


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_have_the_sizes_and_strides_of_real_ones(layout, device):
    problem = make_problem(Case((3, 17, 7, 9), layout, torch.bfloat16), device)
    _, stats = real = problem.clone().forward(True)
    backward = problem.dy, problem.x, problem.weight, stats, True, [True] * 3
    real += batch_norm_backward(*backward)
    with FakeTensorMode() as mode:

        def fake(arguments):
            is_tensor = torch.is_tensor
            return [mode.from_tensor(a) if is_tensor(a) else a for a in arguments]

        faked = batch_norm(*fake(problem.arguments(True)))
        faked += batch_norm_backward(*fake(backward))
    for a, b in zip(faked, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
