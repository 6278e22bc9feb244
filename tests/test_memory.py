"""Large outputs are PyTorch's memory: given back when freed, and faulted in by huge pages."""

import json
import subprocess
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

# In a process of its own: the heap of this one may hold a free block of that size already. Resident
# memory is counted page by page, since the numbers in /proc/self/status may be late.
MEASURE = f"""
import json, re, resource, torch
from batchnorm_ext.functional import batch_norm

def resident():
    rollup = open("/proc/self/smaps_rollup").read()
    return 1024 * int(re.search(r"Rss:\\s+(\\d+) kB", rollup)[1])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x = torch.randn({SIZE})
batch_norm(x, None, None, training=True)
resident_before, faults_before = resident(), faults()
y = batch_norm(x, None, None, training=True)
faults_after, held = faults(), resident()
del y
kept = resident()
result = dict(held=held - resident_before, kept=kept - resident_before)
print(json.dumps(result | dict(faults=faults_after - faults_before)))
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, int]:
    """Bytes held by an output, bytes kept when it is freed, page faults of making it."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _normalize(x: torch.Tensor) -> torch.Tensor:
    return batch_norm(x, None, None, training=True)


def test_freed_outputs_are_given_back(measured):
    """They used to wait for the next output, which monitors of memory counted as in use."""
    assert measured["held"] > 0.9 * BYTES
    assert measured["kept"] < 4 * MB


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages"
)
def test_a_fresh_output_takes_few_faults(measured):
    """One for 2 MB, and for 4 KB only before the first and after the last huge page."""
    assert measured["faults"] < 2 * 512 + BYTES // (2 * MB) + 100


@pytest.mark.parametrize("rows", [256, 255, 257])
def test_output_around_the_size_of_advice(rows):
    """32 MB and a little less or more: the pages that are touched first are those of the output."""
    x = torch.randn(2, 16, rows, 1024)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(_normalize(x), expected, rtol=0, atol=2e-6)
