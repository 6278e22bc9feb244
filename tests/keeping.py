"""What a graph keeps alive for its backward, in bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages(TorchDispatchMode):
    """The memory that operators have made, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, but: Iterable[Tensor]) -> int:
        gc.collect()
        given = {tensor.untyped_storage()._cdata for tensor in but}
        return sum(
            size
            for address, (storage, size) in self.made.items()
            if address not in given and not storage.expired()
        )


def kept_bytes(
    run: Callable[[], Tensor],
    given: Iterable[Tensor] = (),
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> int:
    """Of the storages that ``run`` makes, those that its result keeps; but for ``given``, such as
    parameters that are written to, and for the result itself."""
    with _Storages() as storages, context():
        result = run()
    return storages.alive([*given, result])


def saved_bytes(run: Callable[[], Tensor], given: Iterable[Tensor] = ()) -> int:
    """The storages of all that autograd saves while ``run`` runs, but for ``given``."""
    sizes: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        held.append(storage)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    but = {tensor.untyped_storage()._cdata for tensor in (*given, result)}
    return sum(size for address, size in sizes.items() if address not in but)
