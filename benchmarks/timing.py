"""Interleaved timing: every contestant meets the same moods of the machine."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter

STAT = Path("/proc/stat")
DISTURBED = 0.1  # above it, a measurement is taken again

Call = Callable[[], object]
Sample = Callable[[Call, int], float]  # mean seconds of a call, from so many


@dataclass(frozen=True)
class Timing:
    """Median seconds per call by contestant, and the part of the processors' time others took.

    With as many threads as cores, anything else that runs makes each parallel loop wait for a
    slice of the scheduler: milliseconds, where a small layer takes microseconds.
    """

    seconds: dict[str, float]
    disturbance: float


@contextmanager
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def processor_seconds() -> tuple[float, float]:
    """(all time of all processors, time that others than this process used); zeros if unknown."""
    if not STAT.exists():
        return 0.0, 0.0
    # user nice system idle iowait irq softirq steal; what follows is part of user and nice.
    ticks = [int(field) for field in STAT.read_text().splitlines()[0].split()[1:9]]
    hertz = os.sysconf("SC_CLK_TCK")
    own = os.times()
    busy = (sum(ticks) - ticks[3] - ticks[4]) / hertz
    return sum(ticks) / hertz, busy - own.user - own.system


def sample(call: Call, repetitions: int) -> float:
    """Mean seconds of one call; what it returns is freed before the next, as in training."""
    start = perf_counter()
    for _ in range(repetitions):
        call()
    return (perf_counter() - start) / repetitions


def repetitions_for(call: Call, seconds: float, sample: Sample) -> int:
    """How many calls fill `seconds`; found by doubling, so that one slow call does not mislead."""
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
    """Times the contestants in turn.

    Every round samples each contestant once; the order rotates from round to round, so that nobody
    always runs on the caches and the heap that the same neighbour left. A sample repeats a short
    call until it lasts `sample_seconds`.
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
        total, others = processor_seconds()
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(sample(calls[name], repetitions[name]))
                after_sample()
        total, others = (b - a for a, b in zip((total, others), processor_seconds(), strict=True))
    seconds = {name: median(times) for name, times in samples.items()}
    return Timing(seconds, max(others / total, 0.0) if total else 0.0)


def undisturbed(measure: Callable[[], Timing], attempts: int = 3) -> Timing:
    """The first measurement disturbed by at most DISTURBED, else the least disturbed one.

    Which one is kept depends on what others did, never on what was measured.
    """
    timings = []
    for _ in range(attempts):
        timings.append(measure())
        if timings[-1].disturbance <= DISTURBED:
            break
    return min(timings, key=lambda timing: timing.disturbance)
