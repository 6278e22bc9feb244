"""Which forwards move the running statistics.

A forward tracks its batch as in ``torch.nn``, with two exceptions. One that fails tracks nothing.
One within a backward pass that repeats one which has tracked the same batch, as activation
checkpointing does, does not track it again. What repeats is told by the statistics: the same batch
gives the same bits.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch._C import _current_graph_task_id
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import _StopRecomputationError
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm_ext._ops import STAND_INS
from batchnorm_ext._recompute import note_compiler, recomputes

_LEAST, _MOST = 64, 1 << 16  # batches remembered: the last ones of a layer that is used more often
_WAITING = 8192  # values of statistics that wait, so that the operations of a hash serve several


class _History:
    """Fingerprints of the batches that have moved a running mean, and that something may repeat."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self.count = 0
        with _aside():
            self.fingerprints = torch.zeros(_LEAST, dtype=torch.int64, device=device)
        self.waiting: list[Tensor] = []  # statistics without a fingerprint so far, all of one size
        # other devices give memory back before all their streams have read it
        self.room = _WAITING if device.type == "cpu" else 0

    def add(self, stats: Tensor) -> None:
        if not _has_data(stats):
            return
        if self.waiting and self.waiting[0].shape != stats.shape:
            self._remember()
        self.waiting.append(stats)
        if len(self.waiting) * stats.numel() >= self.room:
            self._remember()

    def has(self, stats: Tensor) -> Tensor:
        """A truth value on the device, which nobody waits for."""
        self._remember()
        return (self.fingerprints[: self.count] == _fingerprints(stats[None])).any()

    def _remember(self) -> None:
        if not self.waiting:
            return
        with _aside():
            after = self.count + len(self.waiting)
            while after > len(self.fingerprints) < _MOST:
                new = torch.zeros_like(self.fingerprints)
                self.fingerprints = torch.cat([self.fingerprints, new])
            places = torch.arange(self.count, after, device=self.fingerprints.device)
            places %= len(self.fingerprints)
            self.fingerprints[places] = _fingerprints(torch.stack(self.waiting))
        self.count = after
        self.waiting.clear()


_histories: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@contextmanager
def _aside():
    """Unseen by dispatch modes, as selective checkpointing wants the operators of the forward; and
    not in inference mode, whose tensors nobody can write to later."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield


def _fingerprints(stats: Tensor) -> Tensor:
    """A hash for each of several statistics, of all bits and their places: channels that are alike
    do not cancel out."""
    bits = stats.flatten(1).view(torch.int64)
    odd = torch.arange(1, 2 * bits.size(1), 2, device=bits.device)
    return (bits * (odd * 0x1E3779B97F4A7C15)).sum(1)


def track(
    update: Callable[..., tuple[Tensor, Tensor]],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    counted: Tensor | None,
    *options,
) -> Tensor:
    """Call an operator that moves the running statistics, unless it repeats what has been done.

    It raises ``num_batches_tracked``; ``counted`` is a counter that is to be raised here.
    """
    arguments = (input, weight, bias, running_mean, running_var, num_batches_tracked, *options)
    if torch.compiler.is_compiling():  # the compilers repeat no writes
        note_compiler()
        if counted is not None:
            counted.add_(1)
        return update(*arguments)[0]
    # the hooks of recompute_activations repeat no forward, and do not fail
    hooks = None if recomputes() else _top_saved_tensors_default_hooks(True)
    in_backward = _current_graph_task_id() != -1
    # a backward may repeat what leaves no graph, or one under hooks
    adds = not in_backward and (hooks is not None or not torch.is_grad_enabled())
    history = _history_of(running_mean, adds) if adds or in_backward else None
    if hooks is None and counted is None and history is None:
        return update(*arguments)[0]
    if hooks is None and counted is None and adds:
        with history.lock:  # nothing fails once the operator has written
            output, stats = update(*arguments)
            history.add(stats)
        return output
    state = (running_mean, running_var, num_batches_tracked, counted)
    # hooks see what autograd saves when the operator has written, and may fail
    with (
        nullcontext() if history is None else history.lock,
        _stop_deferred(hooks if in_backward else None),
        undone_on_error(*state) as before,
    ):
        if counted is not None:
            counted.add_(1)
        output, stats = update(*arguments)
        if adds:
            history.add(stats)
        elif history is not None:
            with _aside():
                _undo_repetition(stats, history, before)
    return output


def _history_of(running_mean: Tensor, make: bool) -> _History | None:
    history = _histories.get(running_mean)
    if history is None and make:
        history = _histories.setdefault(running_mean, _History(running_mean.device))
    return history


def _undo_repetition(stats: Tensor, history: _History, before: list) -> None:
    """Restore the state if the batch is remembered."""
    repeats = history.has(stats)
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
    with _disable_current_modes():
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
