"""Tensors on other devices, launches that fail, memory that runs out: an error, nothing changed."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import tolerances
from cases import Case
from gpu_cases import SHORT
from support import (
    assert_bitwise,
    assert_within,
    batch_norm_backward,
    make_problem,
)

pytestmark = pytest.mark.only("cuda", reason="a test of the GPU")

FORWARD = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def _elsewhere(name, found, expected):
    if name == "num_batches_tracked":
        return f"expected {name}.*{expected}.*got.*{found}"
    return f"Tensor on device {found} is not on the expected device {expected}! This is {name}"


@pytest.mark.parametrize("name", FORWARD)
def test_error_names_the_tensor_on_another_device(name, device):
    problem = make_problem(SHORT[0], device)
    setattr(problem, name, getattr(problem, name).cpu())
    before = problem.state
    with pytest.raises(RuntimeError, match=_elsewhere(name, "cpu", "cuda:0")):
        problem.forward(training=True)
    for key, value in problem.state.items():
        assert_bitwise(key, value, before[key])


def test_error_where_the_input_is_not_on_the_gpu(device):
    problem = make_problem(SHORT[0], device)
    problem.x = problem.x.cpu()
    with pytest.raises(RuntimeError, match=_elsewhere("running_mean", "cuda:0", "cpu")):
        problem.forward(training=True)


@pytest.mark.parametrize("name", ["dy", "weight", "stats"])
def test_error_names_the_tensor_on_another_device_in_the_backward(name, device):
    problem = make_problem(SHORT[0], device)
    _, stats = problem.forward(training=True)
    arguments = {"dy": problem.dy, "x": problem.x, "weight": problem.weight, "stats": stats}
    arguments[name] = arguments[name].cpu()
    expected = f"expected {name}.*cuda.*got.*cpu"
    if name == "weight":
        expected = _elsewhere(name, "cpu", "cuda:0")
    with pytest.raises(RuntimeError, match=expected):
        batch_norm_backward(**arguments, training=True, output_mask=[True] * 3)


BROKEN = """
import torch
import batchnorm_ext

x, weight = torch.randn(16, 64, 28, 28, device="cuda"), torch.ones(64, device="cuda")
normalize = lambda: torch.ops.batchnorm_ext.batch_norm(
    x, weight, None, None, None, True, 1e-5
)
normalize()  # memory and code are there from now on
try:
    torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")]  # a device-side assertion
    torch.cuda.synchronize()
except Exception:
    pass
try:
    normalize()
except RuntimeError as error:
    print("raised", type(error).__name__)
"""


def test_failed_launch_raises_at_the_call():
    """A GPU that has failed refuses every launch after; in a process of its own, it is lost."""
    command = [sys.executable, "-c", BROKEN]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "raised" in done.stdout, done.stdout + done.stderr


def test_memory_runs_out(device):
    """Whatever is left, 512 bytes or 8 MB: either the result, or an exception and nothing changed.

    A stream that is new has no workspace yet, and the room for the output is there.
    """
    problem = make_problem(Case((64, 32, 56, 56)), device)
    expected = problem.oracle(training=True)
    bound = tolerances.output(expected.y, torch.float32, problem.mean_over_std(expected.stats))
    problem.forward(training=False)
    succeeded = []
    for blocks in (0, 1, 4, 64, 1024, 16384):
        attempt = problem.clone()
        before = attempt.state
        torch.cuda.empty_cache()  # what is cached would be given back for more blocks to fill
        with torch.cuda.stream(torch.cuda.Stream()):
            y, filling = None, []
            try:
                room = torch.empty_like(problem.x)
                free = [torch.empty(512, dtype=torch.uint8, device=device) for _ in range(blocks)]
                _limit_memory(device, torch.cuda.memory_reserved(device))
                with pytest.raises(torch.OutOfMemoryError):
                    while True:
                        filling.append(torch.empty(512, dtype=torch.uint8, device=device))
                del room, free
                y, _ = attempt.forward(training=True)
                torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                pass
            finally:
                filling.clear()
                _limit_memory(device, None)
        succeeded.append(y is not None)
        if y is None:
            for name, value in attempt.state.items():
                assert_bitwise(name, value, before[name])
        else:
            assert_within(f"y with {blocks} blocks", y, expected.y, bound)
    # a plan of one block a group shares nothing with others, and little between its two launches
    assert all(succeeded[2:]), succeeded


def _limit_memory(device, limit):
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else limit / total)


def test_wrong_plan_is_an_error_and_leaves_the_old_one(device):
    override_plan = torch.ops.batchnorm_ext._override_cuda_plan
    before = override_plan("policy=split")
    try:
        with pytest.raises(
            ValueError, match="expected ranks to be an integer from 1 to 65535, got '0'"
        ):
            override_plan("ranks=0")
        assert override_plan("margin=1000000") == "policy=split"
        with pytest.raises(ValueError, match="expected margin to be less than .*, got '1000000'"):
            make_problem(SHORT[0], device).forward(training=True)
    finally:
        override_plan(before)


PLANNED = """
import os, torch
import batchnorm_ext

x = torch.randn(4, 3, 5, 5, device="cuda")
normalize = lambda: torch.ops.batchnorm_ext.batch_norm(
    x, None, None, None, None, True, 1e-5
)
try:
    normalize()
except ValueError as error:
    print("refused:", error)
else:
    os.environ["BATCHNORM_EXT_CUDA_PLAN"] = "nonsense"
    normalize()
    print("read once")
"""


@pytest.mark.parametrize(
    "plan, printed",
    [("policy=split", "read once"), ("policy=splt", "refused: .* got 'splt'")],
)
def test_environment_is_read_once(plan, printed):
    command = [sys.executable, "-c", PLANNED]
    environment = os.environ | {"BATCHNORM_EXT_CUDA_PLAN": plan}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert re.match(printed, done.stdout), done.stdout + done.stderr


# Fails for the counters of a stream, 64 KB, as often as it is told.
FAILING_ALLOCATION = """
#include <dlfcn.h>
#include <cstdlib>
extern "C" int cudaMalloc(void** memory, size_t bytes) {
  static int failures = std::atoi(std::getenv("FAILURES"));
  constexpr int out_of_memory = 2;
  if (bytes == 64 << 10 && failures-- > 0) return out_of_memory;
  return reinterpret_cast<int (*)(void**, size_t)>(dlsym(RTLD_NEXT, "cudaMalloc"))(memory, bytes);
}
"""

COUNTED = """
import torch
import batchnorm_ext

x = torch.randn(4, 3, 5, 5, device="cuda")
try:
    y, _ = torch.ops.batchnorm_ext.batch_norm(x, None, None, None, None, True, 1e-5)
    print("finite" if y.isfinite().all() else "wrong")
except torch.OutOfMemoryError:
    print("out of memory")
"""


@pytest.mark.parametrize("failures, printed", [(0, "finite"), (1, "finite"), (2, "out of memory")])
def test_memory_for_counters_runs_out(failures, printed, tmp_path):
    """It comes from CUDA itself: what PyTorch holds without need is given back for it, once."""
    source, library = tmp_path / "failing.cpp", tmp_path / "failing.so"
    source.write_text(FAILING_ALLOCATION)
    compiler = shlex.split(os.environ.get("CXX") or "c++")  # which has built the kernels
    subprocess.run([*compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "FAILURES": str(failures)}
    command = [sys.executable, "-c", COUNTED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == printed, done.stdout + done.stderr
