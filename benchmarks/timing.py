"""Interleaved timing of calls on a CPU, and of CUDA graphs of calls on a GPU."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

CPU_SECONDS, GPU_SECONDS = 5e-3, 3e-3  # of a sample
MOST_SETS = 128  # of the smallest tensors, which are bound by launches and not by memory

Call = Callable[[], object]
Sample = Callable[[Call, int], float]  # mean seconds of a call, from so many


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
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    # user nice system idle iowait irq softirq steal; the fields after them are included in user
    ticks = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
    hertz = os.sysconf("SC_CLK_TCK")
    own = os.times()
    busy = (sum(ticks) - ticks[3] - ticks[4]) / hertz
    return sum(ticks) / hertz, busy - own.user - own.system


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
    after_sample: Call = lambda: None,
    sample: Sample = sample,
) -> dict[str, float]:
    """Median milliseconds of each call, and the share of the processors that others used.

    Every round samples each call once, in an order that rotates and turns around: no call always
    finds in the caches what the same other one has left. A sample repeats a short call until it
    lasts `sample_seconds`.
    """
    repetitions = {}
    for name, call in calls.items():
        for _ in range(2):  # the first call compiles and allocates
            call()
            after_sample()
        repetitions[name] = repetitions_for(call, sample_seconds, sample) if sample_seconds else 1
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with no_gc():
        before = processor_seconds()
        for i in range(rounds):
            first = i % len(names)
            order = names[first:] + names[:first]
            for name in order if i % 2 == 0 else reversed(order):
                samples[name].append(sample(calls[name], repetitions[name]))
                after_sample()
        total, others = (b - a for a, b in zip(before, processor_seconds(), strict=True))
    disturbance = max(others / total, 0.0) if total else 0.0
    times = {name: 1e3 * median(seconds) for name, seconds in samples.items()}
    return times | {"disturbance": disturbance}


def working_sets(bytes_per_call: int) -> int:
    """How many sets of buffers to use in turn, so that each has left the L2 when it comes again."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(1 + ceil(3 * l2 / max(bytes_per_call, 1)), MOST_SETS)


def capture(calls: Sequence[Call]) -> Call:
    """A replay of all calls, each with an output of its own."""
    calls[0]()  # compiles, and allocates what is allocated once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with no_gc():
        graph.capture_begin()
        try:
            # Kept until the end: otherwise calls would share the memory of one output.
            outputs = [call() for call in calls]
        finally:
            graph.capture_end()
    del outputs

    def replay(calls=calls) -> None:  # the calls keep the memory that the graph reads
        graph.replay()

    return replay


def gpu_sample(call: Call, repetitions: int) -> float:
    """Mean seconds of one call on the current stream, without the gaps before and after."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repetitions):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repetitions


def time_graphs(graphs: dict[str, Call], calls: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of one call of each contestant, from graphs of so many."""
    times = interleaved(graphs, rounds, GPU_SECONDS, sample=gpu_sample)
    return {name: value / calls for name, value in times.items()}
