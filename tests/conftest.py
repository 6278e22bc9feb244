from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Threads that wait for work do not spin: the core is needed by the tests that run beside these.
# OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from programs import MODES, unsupported
from ranks import Ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device that the tests run on (cpu, cuda)")
    parser.addoption(
        "--require-sanitizers",
        action="store_true",
        help="an error, not skipped tests, where the compiler lacks a sanitizer of theirs",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "only(device, reason): skipped unless the tests run on that kind of device"
    )
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch finds no CUDA device")
    if device.type == "cuda":
        from batchnorm_ext import _native, _ops

        # Without them the layers would pass their tests on PyTorch's own function.
        if not _ops.takes(_native.BATCH_NORM, (torch.empty(2, 1, device=device),)):
            raise pytest.UsageError(
                f"--device {device}: batchnorm_ext was built without its kernels"
            )
        # Convolutions around the layers: in full float32, and the same algorithm every time.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    if config.getoption("--require-sanitizers"):
        if reasons := [reason for mode in MODES if (reason := unsupported(mode))]:
            raise pytest.UsageError("\n".join(reasons))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Programs of kernels need no GPU; where the tests run on one, they would only take time."""
    cuda = torch.device(config.getoption("--device")).type == "cuda"
    return True if cuda and collection_path.name in ("emulator", "cpu_kernels") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU, only tests that use it: the others pass or fail without one just the same."""
    if torch.device(config.getoption("--device")).type != "cuda":
        return

    def uses_device(item: pytest.Item) -> bool:
        return "device" in item.fixturenames or item.get_closest_marker("only") is not None

    config.hook.pytest_deselected(items=[item for item in items if not uses_device(item)])
    items[:] = filter(uses_device, items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    kind = torch.device(item.config.getoption("--device")).type
    for marker in item.iter_markers("only"):
        if marker.args[0] != kind:
            pytest.skip(f"{marker.kwargs['reason']}: runs with --device {marker.args[0]}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """For compilers and test programs, which are processes."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """For tests that compile: nothing cached before or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def set_num_threads():
    """Sets the number of threads and puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def plan(request):
    """A plan other than that of the rules, which decide where it is not possible."""
    override_plan = torch.ops.batchnorm_ext._override_cuda_plan
    before = override_plan(request.param)
    yield request.param
    override_plan(before)


@pytest.fixture(scope="session")
def ranks():
    """``ranks(n)``: n processes in a process group, the same ones in every test."""
    groups = {n: Ranks(n) for n in (1, 2, 3, 4)}
    yield groups.__getitem__
    for group in groups.values():
        group.stop()


@pytest.fixture
def no_hooks_are_left():
    yield
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
