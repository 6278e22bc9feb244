"""The debug mode of SyncBatchNorm: the ranks compare what they are about to send.

They use the store of the process group, which works where a collective would hang or fail. A thread
of each rank sends heartbeats there, so that the others notice within seconds that it has died.
"""

import itertools
import threading
import time
import weakref
from datetime import timedelta

import torch.distributed as dist

__all__ = ["compare"]

# Seconds. The thread sends heartbeats while its rank computes, compiles or waits; only an extension
# that keeps the interpreter's lock for longer than the timeout is taken for dead.
HEARTBEAT_INTERVAL = 1.0
HEARTBEAT_TIMEOUT = 10.0
LONGEST_PAUSE = 0.1  # between two queries of the store


def compare(group: "dist.ProcessGroup", layer: str, message: str, timeout: timedelta) -> None:
    """Raise unless all ranks of the group are about to send the same message.

    Args:
        group: the ranks; all of them call this before every message.
        layer: what errors call the layer.
        message: describes what this rank is about to send.
        timeout: how long to wait for a rank that is alive.

    Raises:
        RuntimeError: names the ranks that are at another message, late or dead, and their last one.
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
    """What this rank writes to the store for the others of its group, and reads from them."""

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self.rank, self.size = group.rank(), group.size()
        # a connection of its own, because a thread that waits on a connection locks it
        self.store = dist.PrefixStore("batchnorm_ext", group.get_group_store().clone())
        self.number = 0  # of messages so far
        self.heartbeats: dict[int, tuple[bytes, float]] = {}  # by rank: the last, when it was seen
        stopped = threading.Event()
        arguments = self.store, f"alive/{self.rank}", stopped
        thread = threading.Thread(target=_send_heartbeats, args=arguments, daemon=True)
        thread.start()
        weakref.finalize(group, _stop, stopped, thread)  # at exit too, while threads can end

    def compare(self, layer: str, message: str, timeout: timedelta) -> None:
        self.number += 1
        self.store.set(f"{self.number}/{self.rank}", message)
        self._await_all(layer, message, timeout)
        notes = [self._note(self.number, other) for other in range(self.size)]
        # every rank that has reached this message has read the previous ones
        self.store.delete_key(f"{self.number - 1}/{self.rank}")
        if len(set(notes)) > 1:
            at = "; ".join(f"rank {other}: {note}" for other, note in enumerate(notes))
            raise RuntimeError(f"SyncBatchNorm {layer}: the ranks are at different messages: {at}")

    def _await_all(self, layer: str, message: str, timeout: timedelta) -> None:
        self.heartbeats.clear()
        deadline = time.monotonic() + timeout.total_seconds()
        missing = [other for other in range(self.size) if other != self.rank]
        pause = 1e-3
        while True:
            missing = [r for r in missing if not self.store.check([f"{self.number}/{r}"])]
            if not missing:
                return
            late = missing if time.monotonic() > deadline else []
            for other in late or filter(self._is_dead, missing):
                what = (
                    f"has not arrived within {timeout}"
                    if late
                    else f"seems to be dead (no heartbeat for {HEARTBEAT_TIMEOUT:.0f} s)"
                )
                raise RuntimeError(
                    f"SyncBatchNorm {layer}: rank {other} {what}. Rank {self.rank} is waiting for "
                    f"it at: {message}. Last message of rank {other}: "
                    f"{self._note(self.number - 1, other)}"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _note(self, number: int, other: int) -> str:
        key = f"{number}/{other}"
        return self.store.get(key).decode() if self.store.check([key]) else "no message yet"

    def _is_dead(self, other: int) -> bool:
        """Not if it has sent no heartbeat yet: it may be on its way to its first message."""
        key = f"alive/{other}"
        if not self.store.check([key]):
            return False
        heartbeat, now = self.store.get(key), time.monotonic()
        if self.heartbeats.get(other, (None,))[0] != heartbeat:
            self.heartbeats[other] = heartbeat, now
        return now - self.heartbeats[other][1] > HEARTBEAT_TIMEOUT


_peers: "weakref.WeakKeyDictionary[dist.ProcessGroup, _Peers]" = weakref.WeakKeyDictionary()


def _send_heartbeats(store: "dist.Store", key: str, stopped: threading.Event) -> None:
    for number in itertools.count():
        try:
            store.set(key, str(number))
        except RuntimeError:  # the store is gone, and the group with it
            return
        if stopped.wait(HEARTBEAT_INTERVAL):
            return


def _stop(stopped: threading.Event, thread: threading.Thread) -> None:
    stopped.set()
    if thread is not threading.current_thread():
        thread.join(HEARTBEAT_INTERVAL)
