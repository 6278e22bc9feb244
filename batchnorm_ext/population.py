"""Population statistics: what batch normalization uses in evaluation, measured over a data set."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_ext._streams import Moments
from batchnorm_ext.sync import SyncBatchNorm

__all__ = ["as_affine", "update_population_stats"]

_METHODS = ("pooled", "paper")


@torch.no_grad()
def update_population_stats(
    model: nn.Module,
    loader: Iterable,
    num_batches: int | None = None,
    method: str = "pooled",
    process_group: "dist.ProcessGroup | None" = None,
) -> None:
    r"""Set the running statistics of batch normalization to those of a data set.

    The moving average that training leaves follows the last batches, seen by weights that still
    moved. This measures the statistics again with the weights as they are: the model runs forward
    over the batches, and each layer that tracks statistics and is in training mode gets:

    - ``"pooled"``: mean and unbiased variance of all values that it has seen. Batches may differ in
      size, and lie on several ranks. Computed by Chan, Golub & LeVeque, *Updating formulae and a
      pairwise algorithm for computing sample variances*, 1979, equation 2.1.
    - ``"paper"``: the average of the batches' means and of their unbiased variances, as in Ioffe &
      Szegedy, *Batch Normalization*, 2015, algorithm 2, line 10. Each batch counts the same.

    Layers in evaluation mode and those that saw no value stay as they are, and so do the modes of
    all modules, all other buffers and ``num_batches_tracked``.

    Args:
        model: any module; call ``model.train()`` before, for the layers that are to be updated.
        loader: gives batches: a tensor, a tuple or list whose first item is the input, or a dict of
            keyword arguments. A DataLoader shows a progress bar if tqdm is installed.
        num_batches: how many batches to use. Default: all.
        method: "pooled" or "paper".
        process_group: the ranks whose batches belong together; each calls this with its own. A
            ``SyncBatchNorm`` uses its own group. Default: this process alone.

    Raises:
        ValueError: an unknown method; no layer that is in training mode and tracks statistics; a
            loader without batches. If anything raises, the model is as before.

    Example::

        >>> model = nn.Sequential(batchnorm_ext.BatchNorm1d(2))
        >>> batchnorm_ext.update_population_stats(model, [torch.randn(8, 2) + 3 for _ in range(50)])
        >>> (model[0].running_mean - 3).abs().max() < 0.3
        tensor(True)
    """
    if method not in _METHODS:
        raise ValueError(f"expected method to be one of {_METHODS}, got {method!r}")
    records = {
        layer: _Record(layer, method, process_group)
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
    }
    if not records:
        raise ValueError(
            "expected a batch normalization layer that tracks statistics and is in training mode, "
            "got none: call model.train() first"
        )
    with _buffers_restored(model), _recording(records):
        used = 0
        for batch in _with_progress(loader, num_batches):
            _run(model, batch)
            used += 1
    if used == 0:
        raise ValueError("expected loader to give at least one batch, got none")
    results = {layer: record.result() for layer, record in records.items()}
    for layer, (mean, variance) in results.items():
        layer.running_mean.copy_(mean.where(~mean.isnan(), layer.running_mean))
        layer.running_var.copy_(variance.where(~variance.isnan(), layer.running_var))


class _Record:
    """What one layer has seen."""

    def __init__(self, layer: _BatchNorm, method: str, group: "dist.ProcessGroup | None") -> None:
        self.method, self.group = method, group
        if isinstance(layer, SyncBatchNorm):
            self.group = None  # its moments are those of all ranks already
        nothing = Moments.none(layer.num_features, layer.running_mean.device)
        self.total = nothing  # pooled
        self.batches, self.means, self.variances = nothing  # paper: number and sums

    def hook(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        moments = Moments.of(inputs[0].detach())
        if isinstance(layer, SyncBatchNorm):
            moments = moments.over_ranks(layer._group())
        if self.method == "pooled":
            self.total = self.total.merged(moments)
        elif (moments.count > 1).all():
            self.batches = self.batches + 1
            self.means = self.means + moments.mean
            self.variances = self.variances + moments.m2 / (moments.count - 1)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance; NaN where there is none."""
        if self.method == "pooled":
            total = self.total.over_ranks(self.group)
            seen = total.mean.where(total.count > 0, torch.nan)
            return seen, (total.m2 / (total.count - 1)).where(total.count > 1, torch.nan)
        sums = torch.stack([self.batches, self.means, self.variances])
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        return sums[1] / sums[0], sums[2] / sums[0]


@contextmanager
def _recording(records: dict[nn.Module, _Record]) -> Iterator[None]:
    handles = [layer.register_forward_hook(record.hook) for layer, record in records.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _run(model: nn.Module, batch: object) -> None:
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    if isinstance(batch, dict):
        model(**{name: _on(device, value) for name, value in batch.items()})
    else:
        model(_on(device, batch[0] if isinstance(batch, tuple | list) else batch))


def _on(device: torch.device | None, value: object) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


def _with_progress(loader: Iterable, num_batches: int | None) -> Iterable:
    batches = islice(loader, num_batches)
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    total = len(loader) if hasattr(loader, "__len__") else num_batches
    if total is not None and num_batches is not None:
        total = min(total, num_batches)
    return tqdm(batches, total=total, desc="population statistics", unit="batch", leave=False)


def as_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a normalization in evaluation: ``y = x * scale + shift`` per channel.

    Source: Ioffe & Szegedy, *Batch Normalization*, 2015, algorithm 2, line 11.

    Args:
        norm: a batch or instance normalization with running statistics, of ``torch.nn`` or of this
            library, in any mode.

    Returns:
        scale, shift: ``(C,)``, in the dtype of the running statistics, computed in float64 and
        differentiable with respect to weight and bias.

    Raises:
        ValueError: a layer without running statistics: it depends on its input in evaluation, too.

    Example::

        >>> norm = batchnorm_ext.BatchNorm2d(3).eval()
        >>> scale, shift = batchnorm_ext.as_affine(norm)
        >>> x = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(norm(x), x * scale[:, None, None] + shift[:, None, None])
        True
    """
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if mean is None or variance is None:
        raise ValueError(
            "expected norm to be a batch or instance normalization with running statistics, got "
            f"{norm}"
        )
    scale, shift = float64_affine(norm)
    return scale.to(mean.dtype), shift.to(mean.dtype)


def float64_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm that has running statistics, not yet rounded."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift
