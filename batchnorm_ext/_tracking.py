"""Which forwards move the running statistics.

A forward tracks its batch as in ``torch.nn``, with one exception: a forward within a backward pass
that repeats one which has tracked the same batch, as activation checkpointing does, does not track
it again. What repeats is told by the statistics: the same batch gives the same bits.
"""

from collections import deque
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError
from torch.utils.weak import WeakTensorKeyDictionary

# Statistics of the batches tracked last, for each running mean: only of forwards that something may
# repeat. Enough for a layer that is used many times before the backward, as over micro-batches.
_REMEMBERED = 64
_tracked = WeakTensorKeyDictionary()


def track(
    update: Callable[..., tuple[Tensor, Tensor]],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    *options,
) -> Tensor:
    """Call an operator that moves the running statistics, unless it repeats what has been done."""
    state = (running_mean, running_var, num_batches_tracked)
    if torch.compiler.is_compiling():  # the compilers repeat no writes
        return update(input, weight, bias, *state, *options)[0]
    if torch._C._current_graph_task_id() == -1:
        output, stats = update(input, weight, bias, *state, *options)
        if _may_be_repeated():
            _tracked.setdefault(running_mean, deque(maxlen=_REMEMBERED)).append(stats)
        return output
    remembered = _tracked.get(running_mean)
    if not remembered:
        return update(input, weight, bias, *state, *options)[0]
    before = [None if tensor is None else tensor.clone() for tensor in state]
    with _stop_deferred():
        output, stats = update(input, weight, bias, *state, *options)
        _undo_repetition(stats, remembered, before, state)
    return output


@contextmanager
def _stop_deferred():
    """Checkpointing stops a forward by an exception as soon as all that it needs has been saved,
    which may be within the operator: let it finish first, for its statistics."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        yield
        return
    pack, unpack = hooks
    stopped = []

    def pack_or_stop(tensor: Tensor) -> object:
        if not stopped:
            try:
                return pack(tensor)
            except _StopRecomputationError as stop:
                stopped.append(stop)
        return tensor  # of a graph that nobody will use

    with torch.autograd.graph.saved_tensors_hooks(pack_or_stop, unpack):
        yield
    if stopped:
        raise stopped[0]


def _may_be_repeated() -> bool:
    """Whether a backward may run this forward again: it leaves no graph, or one under hooks."""
    return (
        not torch.is_grad_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


@torch.no_grad()
def _undo_repetition(stats, remembered, before, state) -> None:
    """Restore the state if the statistics are remembered: on the device, which nobody waits for."""
    bits = stats.view(torch.int64)
    seen = [s.view(torch.int64) for s in remembered if s.shape == stats.shape]
    if not seen:
        return
    repeats = (torch.stack(seen) == bits).flatten(1).all(1).any()
    for old, tensor in zip(before, state, strict=True):
        if tensor is not None:
            tensor.copy_(torch.where(repeats, old, tensor))
