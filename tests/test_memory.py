"""Large outputs take over the memory of those that were freed."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor

from batchnorm_ext.functional import batch_norm

pytestmark = [
    pytest.mark.only("cpu", reason="on a GPU the memory is PyTorch's"),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux only"),
]

MB = 1 << 20
SIZE = (2, 16, 512, 1024)
BYTES = 64 * MB
SMALL = 2 * MB  # of others, who may use MADV_FREE too


def normalize(x: Tensor) -> Tensor:
    return batch_norm(x, None, None, training=True)


def pages() -> int:
    """Of 4 KB, those that faults have brought in so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def lazily_freed() -> int:
    """Bytes that the system may take."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"LazyFree:\s+(\d+) kB", rollup)[1])


def test_output_takes_over_freed_memory():
    x = torch.randn(SIZE)
    y = normalize(x)
    address, expected = y.data_ptr(), y.clone()
    del y
    before = pages()
    again = normalize(x)
    assert again.data_ptr() == address
    assert pages() - before < 16  # of 16384 that the output has
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_gradient_takes_over_freed_memory():
    x = torch.randn(SIZE, requires_grad=True)
    normalize(x).sum().backward()
    address = x.grad.data_ptr()
    x.grad = None
    normalize(x).sum().backward()
    assert x.grad.data_ptr() == address


def test_living_outputs_share_nothing():
    inputs = [torch.full(SIZE, float(i)) + torch.arange(1024.0) for i in range(4)]
    outputs = [normalize(x) for x in inputs]
    spans = sorted((y.data_ptr(), y.data_ptr() + y.nbytes) for y in outputs)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    for y in outputs:
        torch.testing.assert_close(y, outputs[0])


def test_slightly_smaller_output_fits_and_much_smaller_one_does_not():
    address = normalize(torch.randn(SIZE)).data_ptr()
    kept = [normalize(torch.randn(2, 16, 480, 1024))]
    assert kept[0].data_ptr() == address
    del kept[0]
    kept.append(normalize(torch.randn(2, 16, 300, 1024)))
    assert kept[0].data_ptr() != address


def test_system_may_take_what_waits():
    y = normalize(torch.randn(SIZE))
    before = lazily_freed()
    del y
    assert lazily_freed() - before >= BYTES


def waiting_after(sizes: list[tuple[int, ...]], **environment: str) -> int:
    """Bytes that wait in a process after outputs of these sizes, one at a time."""
    code = f"""
import sys
sys.path.insert(0, "tests")
import torch
from test_memory import lazily_freed, normalize
for size in {sizes}:
    normalize(torch.randn(size))
print(lazily_freed())
"""
    command = [sys.executable, "-c", code]
    environment = os.environ | environment
    return int(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


def test_blocks_add_up_to_no_more_than_was_used_at_once():
    rows = [512, 800, 1200, 1800]  # each too large for the block of the one before, or too small
    waiting = waiting_after([(2, 16, r, 1024) for r in rows + rows[::-1]])
    assert BYTES <= waiting <= 2 * 16 * max(rows) * 1024 * 4 + SMALL


def test_nothing_is_kept_where_the_user_wants_so():
    assert waiting_after([SIZE]) >= BYTES
    assert waiting_after([SIZE], BATCHNORM_EXT_KEEP_MEMORY="0") <= SMALL


def test_output_can_be_resized():
    y = normalize(torch.randn(SIZE))
    expected = y.flatten()[:100].clone()
    y.resize_(3, *SIZE[1:])
    torch.testing.assert_close(y.flatten()[:100], expected, rtol=0, atol=0)
    assert y.untyped_storage().nbytes() == BYTES // 2 * 3


def test_threads_take_and_give():
    x = torch.randn(SIZE)
    expected = normalize(x)
    wrong = []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(normalize(x), expected):
                wrong.append(1)

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_forked_child_takes_and_gives():
    script = f"""
import os, signal, torch
from batchnorm_ext.functional import batch_norm
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
x = torch.randn{SIZE}
expected = batch_norm(x, None, None, training=True)
waiting = batch_norm(x, None, None, training=True).data_ptr()
child = os.fork()
signal.alarm(60)  # for a child that waits for a lock for ever
y = batch_norm(x, None, None, training=True)
right = y.data_ptr() == waiting and torch.equal(y, expected)
del y
if child == 0:
    os._exit(0 if right else 1)
assert right and os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_profiler_knows_the_memory():
    x = torch.randn(SIZE)
    with torch.profiler.profile(profile_memory=True) as profiler:
        normalize(x)
    (event,) = [e for e in profiler.events() if e.name == "batchnorm_ext::batch_norm"]
    assert event.cpu_memory_usage >= BYTES
