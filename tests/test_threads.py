"""The same bits for any number of threads."""

import pytest
import torch

from cases import Case
from support import assert_bitwise, batch_norm_backward, make_problem

pytestmark = pytest.mark.only("cpu", reason="threads are those of the CPU kernels")
NAMES = ["y", "stats", "running_mean", "running_var", "dx", "dweight", "dbias"]
CASES = [
    *(
        Case(size, layout, dtype)
        for size in [(8, 64, 14, 14), (4, 3, 150, 150), (2, 2048, 7, 7), (32, 1, 64, 64)]
        for layout in ["contiguous", "channels_last"]
        for dtype in [torch.float32, torch.bfloat16, torch.float64]
    ),
    Case((30011, 3)),
    Case((100000, 1)),
    Case((1000, 500)),
    Case((1, 2, 700, 500)),
]


def _run(case, training):
    problem = make_problem(case)
    y, stats = problem.forward(training)
    gradients = batch_norm_backward(
        problem.dy, problem.x, problem.weight, stats, training, [True] * 3
    )
    return y, stats, problem.running_mean, problem.running_var, *gradients


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_does_not_depend_on_the_number_of_threads(case, training, set_num_threads):
    set_num_threads(1)
    expected = _run(case, training)
    for count in (2, 3, 4, 1):
        set_num_threads(count)
        for name, a, b in zip(NAMES, _run(case, training), expected, strict=True):
            assert_bitwise(f"{name} with {count} threads", a, b)
