"""Large outputs are PyTorch's memory: given back when freed, and faulted in by huge pages."""

import re
import resource
import sys
from pathlib import Path

import pytest
import torch

from batchnorm_ext.functional import batch_norm

pytestmark = [
    pytest.mark.only("cpu", reason="on a GPU the memory is PyTorch's"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

MB = 1 << 20
SIZE = (2, 16, 512, 1024)
BYTES = 64 * MB
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _normalize(x: torch.Tensor) -> torch.Tensor:
    return batch_norm(x, None, None, training=True)


def _resident() -> int:
    """Counted page by page: the numbers in /proc/self/status may be late."""
    return 1024 * int(re.search(r"Rss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_freed_outputs_are_given_back():
    """They used to wait for the next output, which monitors of memory counted as in use."""
    x = torch.randn(SIZE)
    _normalize(x)
    before = _resident()
    y = _normalize(x)
    assert _resident() - before > 0.9 * BYTES
    del y
    assert _resident() - before < 4 * MB


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages"
)
def test_a_fresh_output_takes_few_faults():
    """One for 2 MB, and for 4 KB only before the first and after the last huge page."""
    x = torch.randn(SIZE)
    _normalize(x)
    before = _faults()
    y = _normalize(x)
    assert _faults() - before < 2 * 512 + BYTES // (2 * MB) + 100
    assert y.nbytes == BYTES


@pytest.mark.parametrize("rows", [256, 255, 257])
def test_output_around_the_size_of_advice(rows):
    """32 MB and a little less or more: the pages that are touched first are those of the output."""
    x = torch.randn(2, 16, rows, 1024)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(_normalize(x), expected, rtol=0, atol=2e-6)
