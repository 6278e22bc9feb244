"""Which forwards move the running statistics.

A forward tracks its batch as in ``torch.nn``, with two exceptions. One that fails tracks nothing.
One within a backward pass that repeats one which has tracked the same batch, as activation
checkpointing does, does not track it again. What repeats is told by the statistics: the same batch
gives the same bits.
"""

from collections import deque
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm_ext._ops import STAND_INS

# Fingerprints of the batches tracked last, for each running mean: only of forwards that something
# may repeat. Enough for a layer that is used many times before the backward, as over micro-batches.
_REMEMBERED = 64
_tracked = WeakTensorKeyDictionary()


def track(
    update: Callable[..., tuple[Tensor, Tensor]],
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    *options,
) -> Tensor:
    """Call an operator that moves the running statistics, unless it repeats what has been done."""
    state = (running_mean, running_var, num_batches_tracked)
    arguments = (input, weight, bias, *state, *options)
    if torch.compiler.is_compiling():  # the compilers repeat no writes
        return update(*arguments)[0]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    in_backward = torch._C._current_graph_task_id() != -1
    remembered = _tracked.get(running_mean) if in_backward else None
    if hooks is None and not remembered:
        output, stats = update(*arguments)
        # a backward may repeat what leaves no graph
        if not in_backward and not torch.is_grad_enabled():
            _remember(running_mean, stats)
        return output
    # hooks see what autograd saves when the operator has written, and may fail
    with _stop_deferred(hooks if in_backward else None), undone_on_error(*state) as before:
        output, stats = update(*arguments)
        if not in_backward:
            _remember(running_mean, stats)
        elif remembered:
            _undo_repetition(stats, remembered, before)
    return output


def _remember(running_mean: Tensor, stats: Tensor) -> None:
    remembered = _tracked.get(running_mean)
    if remembered is None:
        remembered = _tracked[running_mean] = deque(maxlen=_REMEMBERED)
    remembered.append(torch.hash_tensor(stats))


@torch.no_grad()
def _undo_repetition(stats: Tensor, remembered: deque, before: list) -> None:
    """Restore the state if the batch is remembered: on the device, which nobody waits for."""
    seen = torch.stack(list(remembered)).view(torch.int64)
    repeats = (seen == torch.hash_tensor(stats).view(torch.int64)).any()
    for tensor, value in before:
        tensor.copy_(torch.where(repeats, value, tensor))


@contextmanager
def _stop_deferred(hooks: tuple[Callable, Callable] | None):
    """Checkpointing stops a forward by an exception as soon as all that it needs has been saved,
    which may be within the operator: let it finish first, for its statistics."""
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


@contextmanager
def undone_on_error(*written: Tensor | None):
    """What fails may have written before: then these tensors get their values and versions back.

    Yields the tensors, each with a copy of its value.
    """
    written = [t for t in written if isinstance(t, Tensor)]
    before = [(tensor, tensor.detach().clone()) for tensor in written]
    versions = [0 if tensor.is_inference() else tensor._version for tensor in written]
    try:
        yield before
    except Exception:
        for (tensor, value), version in zip(before, versions, strict=True):
            # comparing first: what is expanded, or captured by torch.func, lets nobody copy into it
            if _has_data(value) and not torch.equal(tensor, value):
                tensor.data.copy_(value)
            if not tensor.is_inference():
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        raise


def _has_data(tensor: Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, STAND_INS))
