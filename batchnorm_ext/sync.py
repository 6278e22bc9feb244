"""Batch normalization over all ranks of a process group."""

import itertools
import os
import weakref

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_ext import _ops
from batchnorm_ext._tracking import track
from batchnorm_ext.modules import _FusedForward, _parameter, _statistics, counted

__all__ = ["SyncBatchNorm"]

_DEBUG = os.environ.get("BATCHNORM_EXT_SYNC_DEBUG") == "1"


class SyncBatchNorm(_FusedForward, _BatchNorm):
    r"""Batch normalization with the statistics of the batches of all ranks, as in
    :class:`torch.nn.SyncBatchNorm`, on CPU and GPU.

    In training, the ranks of ``process_group`` add up ``[n * mean, M2 + n * mean^2, n]`` of their
    inputs (``M2`` is the sum of squared deviations from the mean), ``2 C + 1`` values in float64,
    by one all-reduce, and normalize with the mean and variance of the sum; the backward all-reduces
    ``2 C`` values. Batches of different sizes, empty ones among them, count by their elements, and
    the dtypes of the inputs may differ. The gradients of weight and bias are those of this rank,
    for ``DistributedDataParallel`` to average. In evaluation, without an initialized process group
    and in a group of one there is no communication: the layer is a plain batch normalization.

    It derives from the base of the batch normalization classes and not from
    ``torch.nn.SyncBatchNorm``, whose instances ``DistributedDataParallel`` refuses on the CPU.

    Activation checkpointing repeats the forward's message along with the forward, and leaves the
    running statistics alone. ``BATCHNORM_EXT_SYNC_DEBUG=1``, set before the import, compares over
    the store of the group before every message that all ranks are at the same layer, with the same
    number of channels, and names layer and ranks where they are not or one does not come;
    compiled code is not checked.

    Source: Ioffe & Szegedy, *Batch Normalization*, 2015, algorithm 1 over the union of the batches;
    the sums are those of Chan, Golub & LeVeque, *Updating formulae and a pairwise algorithm for
    computing sample variances*, 1979, taken about zero.

    Args:
        num_features: C, of inputs ``(N, C)`` to ``(N, C, D, H, W)`` in float32, float64, bfloat16
            or float16 and any memory format.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`.
        process_group: the ranks to synchronize with; None for all.
        device, dtype, kwargs: as in :class:`torch.nn.BatchNorm2d`.

    Raises:
        ValueError: an input of less than 2 or more than 5 dimensions; a process group that this
            rank is not in.
        RuntimeError: names the layer, the rank and the input if the message fails, as when a rank
            dies or does not come within the timeout of the group; the running statistics are then
            as before. Gloo may end a process whose message has another size than that of its
            neighbour: which layers and channels these were, the debug mode tells.
        NotImplementedError: an input that the operators do not take while there are ranks to
            synchronize with.

    Example::

        >>> dist.init_process_group("gloo")  # under torchrun
        >>> norm = batchnorm_ext.SyncBatchNorm(64)
        >>> norm(torch.randn(2, 64, 56, 56)).shape
        torch.Size([2, 64, 56, 56])
    """

    _serial = itertools.count()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs
        )
        self.process_group = process_group
        # what errors call the layer: its number, or its path in the model that was converted
        self.name = f"{next(self._serial)}"
        self.origin = None  # the class and the process group before the conversion

    def forward(self, input: Tensor) -> Tensor:
        group = self._group() if self.training else None
        if group is None or isinstance(input, fx.Proxy):
            return super().forward(input)
        weight, bias = _parameter(self, "weight"), _parameter(self, "bias")
        mean, var, batches = _statistics(self)
        if not _ops.takes(input, mean, var, weight, bias, exports_native=False):
            reason = _ops.refusal(input, mean, var, weight, bias, exports_native=False)
            raise NotImplementedError(
                f"{self._described(input, group)}: cannot synchronize: {reason}"
            )
        self._check_input_dim(input)
        batches, momentum = counted(batches, self.momentum, tracks=mean is not None)
        if _DEBUG and not torch.compiler.is_compiling():
            _check_ranks(self, group, "forward", input)
        name = f"SyncBatchNorm {self.name}, on rank {group.rank()} of {group.size()}"
        options = (momentum, self.eps, group.group_name, name)
        if mean is not None:
            state = (mean, var, batches)
            output = track(_ops.sync_batch_norm, input, weight, bias, *state, *options)
        else:
            output = _ops.sync_batch_norm(input, weight, bias, None, None, None, *options)[0]
        if _DEBUG and output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(lambda _: _check_ranks(self, group, "backward", input))
        return output

    def _group(self) -> "dist.ProcessGroup | None":
        """The group to synchronize with, if it has other ranks."""
        group = self.process_group
        if group is None:
            if not (dist.is_available() and dist.is_initialized()):
                return None
            group = dist.group.WORLD
        elif group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"SyncBatchNorm {self.name}: rank {dist.get_rank()} is not in the process group"
            )
        return group if group.size() > 1 else None

    def _described(self, input: Tensor, group: "dist.ProcessGroup") -> str:
        return (
            f"SyncBatchNorm {self.name}, on rank {group.rank()} of {group.size()} with an input of "
            f"size {tuple(input.shape)} in {input.dtype}"
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input)")


# How many messages each group has been asked for, in debug mode.
_messages: "weakref.WeakKeyDictionary[dist.ProcessGroup, int]" = weakref.WeakKeyDictionary()


def _check_ranks(layer: SyncBatchNorm, group, direction: str, input: Tensor) -> None:
    """Raise unless all ranks of the group are about to send the same message.

    Each rank leaves a note in the store, which works where a collective would hang or fail.
    """
    number = _messages[group] = _messages.get(group, 0) + 1
    rank, size = group.rank(), group.size()
    timeout = group._get_backend(input.device).options._timeout
    store = dist.PrefixStore("batchnorm_ext", group.get_group_store())
    message = f"{direction} of {layer.name} with {input.size(1)} channels"
    store.set(f"{number}/{rank}", message)
    notes = []
    for other in range(size):
        try:
            store.wait([f"{number}/{other}"], timeout)
        except RuntimeError:
            last = f"{number - 1}/{other}"
            before = store.get(last).decode() if store.check([last]) else "no message yet"
            raise RuntimeError(
                f"SyncBatchNorm {layer.name}: rank {other} has not come within {timeout} to the "
                f"{message}, where rank {rank} is; it was last at: {before}"
            ) from None
        notes.append(store.get(f"{number}/{other}").decode())
    store.delete_key(f"{number - 1}/{rank}")  # every rank that is here has read it
    if len(set(notes)) > 1:
        at = "; ".join(f"rank {other}: {note}" for other, note in enumerate(notes))
        raise RuntimeError(f"SyncBatchNorm {layer.name}: the ranks are at different messages: {at}")
