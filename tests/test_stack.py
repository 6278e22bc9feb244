"""Threads with a small stack, such as musl gives to all and OMP_STACKSIZE to those of OpenMP.

PyTorch's own batch norm survives with half of what is tested here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_instruction_sets import IN_USE, LOWER

pytestmark = pytest.mark.only("cpu", reason="the stack is that of threads of the CPU")

STACK_KIB = 128
PROGRAM = """
import threading
import torch
from cases import DTYPES, Case
from support import batch_norm_backward, make_problem
from test_halves import _apply, _backward

CASES = [  # every pattern
    ("row", (4, 3, 40, 33), "contiguous"),
    ("one long row", (1, 2, 300, 300), "contiguous"),
    ("column", (40, 300, 3, 5), "channels_last"),
    ("column, whole blocks for each thread", (300, 2048), "contiguous"),
    ("column, as wide as a block can be, with a ragged end", (300, 2043), "contiguous"),
    ("column, several blocks", (40, 5000), "contiguous"),
    ("folded column, with rows left over", (3001, 7), "contiguous"),
    ("folded column of one channel", (30011, 1), "contiguous"),
    ("column of short runs", (32, 512, 7, 7), "contiguous"),
    ("column of short runs, with a ragged end", (40, 41, 7, 7), "contiguous"),
]


def run():
    torch.set_num_threads(3)
    for name, size, layout in CASES:
        for dtype in DTYPES:
            print(name, dtype, flush=True)
            problem = make_problem(Case(size, layout, dtype))
            for training in (False, True):
                _, stats = problem.forward(training)
                arguments = problem.dy, problem.x, problem.weight, stats, training, [True] * 3
                batch_norm_backward(*arguments)
            sums = torch.ops.batchnorm_ext.moments(problem.x)
            _apply(problem, sums)
            _backward(problem, stats, sums[-1:])
    print("survived", flush=True)


threading.stack_size({kib} << 10)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("name", [*LOWER, IN_USE])
def test_column_kernels_overflow_a_small_stack(name):
    here = Path(__file__).parent
    environment = os.environ | {
        "OMP_STACKSIZE": f"{STACK_KIB}k",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    if name != IN_USE:
        environment["ATEN_CPU_CAPABILITY"] = name
    program = PROGRAM.replace("{kib}", str(STACK_KIB))
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.returncode} after\n{done.stdout}{done.stderr}"
    assert done.stdout.endswith("survived\n"), done.stdout + done.stderr
