"""Timing on a GPU: CUDA graphs of calls on more memory than the L2 cache holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from timing import Call, Timing, interleaved, no_gc

MOST_SETS = 128  # of the smallest tensors, which are bound by launches and not by memory
SAMPLE_SECONDS = 3e-3


def working_sets(bytes_per_call: int) -> int:
    """How many sets of buffers to use in turn, so that each has left the L2 when it comes again."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(1 + ceil(3 * l2 / max(bytes_per_call, 1)), MOST_SETS)


@dataclass(frozen=True)
class Replay:
    """A graph, and the calls: they keep the memory that the graph reads."""

    graph: torch.cuda.CUDAGraph
    calls: Sequence[Call]

    def __call__(self) -> None:
        self.graph.replay()


def capture(calls: Sequence[Call]) -> Replay:
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
    return Replay(graph, calls)


def sample(call: Call, repetitions: int) -> float:
    """Mean seconds of one call on the current stream, without the gaps before and after."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repetitions):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repetitions


def time_graphs(calls: dict[str, Sequence[Call]], rounds: int) -> Timing:
    """The time of one call of each contestant, from graphs of all its calls."""
    replays = {name: capture(each) for name, each in calls.items()}
    timing = interleaved(replays, rounds, SAMPLE_SECONDS, sample=sample)
    return Timing({name: s / len(calls[name]) for name, s in timing.seconds.items()}, 0.0)
