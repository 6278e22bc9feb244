"""The debug mode of SyncBatchNorm: ranks compare what they are about to send, and who is alive.

They talk through the store of the process group, which works where a collective would hang or fail.
"""

import itertools
import threading
import time
import weakref
from datetime import timedelta

import torch.distributed as dist

__all__ = ["compare"]

# Seconds. A rank that computes, compiles or waits gives its signs all the same, by a thread; only
# an extension that keeps the interpreter's lock for long could be taken for dead.
BETWEEN_SIGNS = 1.0
SILENCE = 10.0
LONGEST_PAUSE = 0.1  # between two looks at the store


def compare(group: "dist.ProcessGroup", layer: str, message: str, timeout: timedelta) -> None:
    """Raise unless all ranks of the group are about to send the same message.

    Args:
        group: the ranks; all of them call this before every message.
        layer: what errors call the layer.
        message: describes what this rank is about to send.
        timeout: how long to wait for a rank that is alive.

    Raises:
        RuntimeError: tells which ranks are elsewhere, don't come or are dead, and where they were.
    """
    if group not in _peers:
        _peers[group] = _Peers(group)
    try:
        _peers[group].compare(layer, message, timeout)
    except dist.DistError as error:
        raise RuntimeError(
            f"SyncBatchNorm {layer}: the store of the process group does not answer on rank "
            f"{group.rank()}, at the {message}; the rank that keeps it may have ended: {error}"
        ) from error


class _Peers:
    """What this rank leaves in the store for the others of its group, and reads there."""

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self.rank, self.size = group.rank(), group.size()
        # by a connection of its own: one that a thread waits on is locked for the others
        self.store = dist.PrefixStore("batchnorm_ext", group.get_group_store().clone())
        self.number = 0  # of messages so far
        self.signs: dict[int, tuple[bytes, float]] = {}  # the last of a rank, and since when
        stopped = threading.Event()
        arguments = self.store, f"alive/{self.rank}", stopped
        thread = threading.Thread(target=_give_signs, args=arguments, daemon=True)
        thread.start()
        weakref.finalize(group, _stop, stopped, thread)  # at exit too, while threads can end

    def compare(self, layer: str, message: str, timeout: timedelta) -> None:
        self.number += 1
        self.store.set(f"{self.number}/{self.rank}", message)
        self._await_all(layer, message, timeout)
        notes = [self._note(self.number, other) for other in range(self.size)]
        # every rank that has come this far has read the ones before
        self.store.delete_key(f"{self.number - 1}/{self.rank}")
        if len(set(notes)) > 1:
            at = "; ".join(f"rank {other}: {note}" for other, note in enumerate(notes))
            raise RuntimeError(f"SyncBatchNorm {layer}: the ranks are at different messages: {at}")

    def _await_all(self, layer: str, message: str, timeout: timedelta) -> None:
        self.signs.clear()
        deadline = time.monotonic() + timeout.total_seconds()
        missing = [other for other in range(self.size) if other != self.rank]
        pause = 1e-3
        while True:
            missing = [r for r in missing if not self.store.check([f"{self.number}/{r}"])]
            if not missing:
                return
            late = missing if time.monotonic() > deadline else []
            for other in late or filter(self._is_silent, missing):
                what = (
                    f"has not come within {timeout}"
                    if late
                    else f"has given no sign of life for {SILENCE:.0f} s and does not come"
                )
                raise RuntimeError(
                    f"SyncBatchNorm {layer}: rank {other} {what} to the {message}, where rank "
                    f"{self.rank} is; it was last at: {self._note(self.number - 1, other)}"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _note(self, number: int, other: int) -> str:
        key = f"{number}/{other}"
        return self.store.get(key).decode() if self.store.check([key]) else "no message yet"

    def _is_silent(self, other: int) -> bool:
        """A rank that has not begun to give signs may be on its way to its first message."""
        key = f"alive/{other}"
        if not self.store.check([key]):
            return False
        sign, now = self.store.get(key), time.monotonic()
        if self.signs.get(other, (None,))[0] != sign:
            self.signs[other] = sign, now
        return now - self.signs[other][1] > SILENCE


_peers: "weakref.WeakKeyDictionary[dist.ProcessGroup, _Peers]" = weakref.WeakKeyDictionary()


def _give_signs(store: "dist.Store", key: str, stopped: threading.Event) -> None:
    for number in itertools.count():
        try:
            store.set(key, str(number))
        except RuntimeError:  # the store has gone, and the group with it
            return
        if stopped.wait(BETWEEN_SIGNS):
            return


def _stop(stopped: threading.Event, thread: threading.Thread) -> None:
    stopped.set()
    if thread is not threading.current_thread():
        thread.join(BETWEEN_SIGNS)
