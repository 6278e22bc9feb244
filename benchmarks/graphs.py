"""Timing on a GPU: graphs of calls on more memory than its L2 cache holds, between two events."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from timing import Call, no_gc

MOST_SETS = 128  # of the smallest tensors; they are bound by the launches, not by memory


def working_sets(bytes_per_call: int) -> int:
    """How many sets of buffers to use in turn so that each has left the L2 when it comes again."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(1 + ceil(3 * l2 / max(bytes_per_call, 1)), MOST_SETS)


@dataclass(frozen=True)
class Replay:
    """What the calls read has to stay in memory, and they hold it."""

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
            # Held until the end: the output of one call would be the memory of the next.
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
