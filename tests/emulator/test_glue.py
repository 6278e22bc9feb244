"""The CUDA side of the operators, tensors in and pointers out, on the host and the emulator."""

from __future__ import annotations

import pytest
import torch

import support
from cases import EVAL_CASES, TRAINING_CASES
from emulator.glue_cases import EPS, needs_glue, ops
from support import assert_bitwise, check_backward, check_forward, make_problem

MOST_ELEMENTS = 20_000  # the emulator takes a second for some of these

pytestmark = needs_glue


@pytest.fixture
def _support_calls_cuda(monkeypatch):
    monkeypatch.setattr(support, "ops", ops)
    monkeypatch.setattr(support, "batch_norm_backward", ops.batch_norm_backward)


def small(cases: list) -> list:
    return [case for case in cases if torch.Size(case.size).numel() <= MOST_ELEMENTS]


@pytest.mark.usefixtures("_support_calls_cuda")
@pytest.mark.parametrize(
    ("training", "case"),
    [(True, case) for case in small(TRAINING_CASES)]
    + [(False, case) for case in small(EVAL_CASES)],
    ids=str,
)
def test_batch_norm(training, case):
    problem = make_problem(case)
    _, stats = check_forward(problem, training)
    check_backward(problem, training, stats)


def test_empty():
    x = torch.empty(2, 4, 0, 3)
    y, stats = ops.batch_norm(x, None, None, None, None, True, EPS)
    assert y.shape == x.shape and stats.isnan().all()
    dx, dweight, dbias = ops.batch_norm_backward(x, x, None, stats, True, [True] * 3)
    assert dx.shape == x.shape
    for name, value in [("dweight", dweight), ("dbias", dbias)]:
        assert_bitwise(name, value, torch.zeros(4))
    with pytest.raises(NotImplementedError, match="refused by batchnorm_ext"):
        ops.batch_norm(x, None, None, None, None, True, EPS, 2)


def test_root_mean_squares_are_refused():
    x = torch.randn(2, 4, 5)
    with pytest.raises(NotImplementedError, match="refused by batchnorm_ext"):
        ops.batch_norm(x, None, None, None, None, True, EPS, 4, False)
