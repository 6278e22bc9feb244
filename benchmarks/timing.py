"""Interleaved timing on a CPU."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter

from results import DISTURBED

STAT = Path("/proc/stat")

Call = Callable[[], object]
Sample = Callable[[Call, int], float]  # mean seconds of a call, from so many


@dataclass(frozen=True)
class Timing:
    """Median seconds per call, and the share of processor time that other processes used.

    With as many threads as cores, another process makes each parallel loop wait for a time slice:
    milliseconds, where a small layer takes microseconds.
    """

    seconds: dict[str, float]
    disturbance: float

    def row(self) -> dict[str, float]:
        return {name: 1e3 * s for name, s in self.seconds.items()} | {
            "disturbance": self.disturbance
        }


@contextmanager
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def processor_seconds() -> tuple[float, float]:
    """Processor time of the machine, and the part that other processes used; 0 if unknown."""
    if not STAT.exists():
        return 0.0, 0.0
    # user nice system idle iowait irq softirq steal; the fields after them are included in user
    ticks = [int(field) for field in STAT.read_text().splitlines()[0].split()[1:9]]
    hertz = os.sysconf("SC_CLK_TCK")
    own = os.times()
    busy = (sum(ticks) - ticks[3] - ticks[4]) / hertz
    return sum(ticks) / hertz, busy - own.user - own.system


def disturbance(before: tuple[float, float], after: tuple[float, float]) -> float:
    total, others = (b - a for a, b in zip(before, after, strict=True))
    return max(others / total, 0.0) if total else 0.0


def sample(call: Call, repetitions: int) -> float:
    """Mean seconds of one call. Its result is freed before the next call, as in training."""
    start = perf_counter()
    for _ in range(repetitions):
        call()
    return (perf_counter() - start) / repetitions


def repetitions_for(call: Call, seconds: float, sample: Sample) -> int:
    """How many calls take `seconds`. Found by doubling, so that one slow call does not mislead."""
    repetitions = 1
    while (elapsed := sample(call, repetitions) * repetitions) < seconds / 2:
        repetitions *= 2
    return ceil(seconds / (elapsed / repetitions))


def interleaved(
    calls: dict[str, Call],
    rounds: int,
    sample_seconds: float = 0.0,
    warmup: int = 2,
    after_sample: Call = lambda: None,
    sample: Sample = sample,
) -> Timing:
    """Time the contestants in turn.

    Every round samples each contestant once. The order rotates, so that no contestant always runs
    on the caches and the heap of the same neighbour. A sample repeats a short call until it lasts
    `sample_seconds`.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
            after_sample()
    repetitions = {
        name: repetitions_for(call, sample_seconds, sample) if sample_seconds else 1
        for name, call in calls.items()
    }
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with no_gc():
        before = processor_seconds()
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(sample(calls[name], repetitions[name]))
                after_sample()
        disturbed = disturbance(before, processor_seconds())
    return Timing({name: median(times) for name, times in samples.items()}, disturbed)


def undisturbed(measure: Callable[[], Timing], attempts: int = 3) -> Timing:
    """The first measurement disturbed by at most DISTURBED, else the least disturbed one."""
    timings = []
    for _ in range(attempts):
        timings.append(measure())
        if timings[-1].disturbance <= DISTURBED:
            break
    return min(timings, key=lambda timing: timing.disturbance)
