"""Switching the normalization layers of an existing model over to this library, and back."""

import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from batchnorm_ext import modules
from batchnorm_ext._layer import LAYERS
from batchnorm_ext._rewrite import unfuse
from batchnorm_ext.modules_act import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    SyncBatchNormAct,
)
from batchnorm_ext.sync import SyncBatchNorm

__all__ = ["convert", "convert_sync_batchnorm", "revert"]

Module = TypeVar("Module", bound=nn.Module)

_OURS = {getattr(nn, name): getattr(modules, name) for name in modules.__all__}
_NATIVE = {ours: native for native, ours in _OURS.items()}
_BATCH_NORMS = [
    kind
    for kind in (*_OURS, *_NATIVE)
    if issubclass(kind, _BatchNorm) and not issubclass(kind, LazyModuleMixin)
]
_SYNC = (SyncBatchNorm, SyncBatchNormAct)
_SYNCHRONIZED = dict.fromkeys([*_BATCH_NORMS, nn.SyncBatchNorm], SyncBatchNorm)
_SYNCHRONIZED |= dict.fromkeys([BatchNormAct1d, BatchNormAct2d, BatchNormAct3d], SyncBatchNormAct)


def convert(module: Module, norms: Iterable[type[nn.Module]] | None = None) -> Module:
    """Make the normalization layers in ``module`` run on the fused kernels.

    ``module`` itself and the lazy forms are included. In place and lossless: only the class of each
    layer changes. The module objects, their parameters and buffers (shared ones stay shared),
    hooks, training flags, dtypes, devices and parametrizations are untouched, and an optimizer that
    holds the parameters goes on. Only the exact ``torch.nn`` types are converted: a subclass may
    have its own ``forward`` and is left as it is.

    Args:
        module: any module; converting twice is harmless.
        norms: the classes of ``torch.nn`` to convert, as ``(nn.BatchNorm2d, nn.GroupNorm)``.
            Default: all that this library has a layer for.

    Returns:
        ``module``.

    Raises:
        ValueError: a class in ``norms`` that this library has no layer for.

    Warns:
        UserWarning: names the subclasses of these classes that were not converted.

    Example::

        >>> model = batchnorm_ext.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> type(model[1])
        <class 'batchnorm_ext.modules.BatchNorm2d'>
    """
    chosen = tuple(_OURS) if norms is None else tuple(norms)
    if unknown := [kind for kind in chosen if kind not in _OURS]:
        known = ", ".join(native.__name__ for native in _OURS)
        raise ValueError(f"expected norms to be classes of torch.nn among {known}, got {unknown}")
    return _swap(
        module,
        "converted",
        lambda layer, kind, name: _OURS[kind] if kind in chosen else None,
        lambda layer: isinstance(layer, chosen) and not _is_ours(layer),
    )


def convert_sync_batchnorm(
    module: Module, process_group: "dist.ProcessGroup | None" = None
) -> Module:
    """Make every batch normalization in ``module`` one over all ranks, a :class:`SyncBatchNorm`.

    Takes the layers of ``torch.nn``, ``SyncBatchNorm`` included, and those of this library, of
    which ``BatchNormAct1d/2d/3d`` become :class:`SyncBatchNormAct`; in place and as lossless as
    :func:`convert`. Each layer remembers the class it comes from.

    Args:
        module: any module; converting twice is harmless.
        process_group: the ranks to synchronize with. With None a layer that synchronizes already
            keeps its own, and the others synchronize with all.

    Returns:
        ``module``.

    Warns:
        UserWarning: names the subclasses of batch normalization that were not converted, and the
            lazy layers, which have to see an input first.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> type(batchnorm_ext.convert_sync_batchnorm(model)[1])  # then DistributedDataParallel
        <class 'batchnorm_ext.sync.SyncBatchNorm'>
    """

    def become_sync(layer: nn.Module, kind: type, name: str) -> type | None:
        if kind in _SYNC and process_group is not None:
            layer.process_group = process_group
            return kind
        if kind not in _SYNCHRONIZED:
            return None
        own_group = getattr(layer, "process_group", None)
        layer.process_group = own_group if process_group is None else process_group
        layer._batchnorm_ext_name = name or kind.__name__
        layer._batchnorm_ext_origin = kind, own_group
        return _SYNCHRONIZED[kind]

    return _swap(
        module,
        "converted",
        become_sync,
        lambda layer: isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm),
    )


def revert(module: Module) -> Module:
    """Undo :func:`fuse`, and of each layer the last conversion.

    What :func:`convert_sync_batchnorm` has converted gets the class back that it had before. Every
    other layer of this library becomes the ``torch.nn`` layer it stands for, a
    :class:`SyncBatchNorm` a ``torch.nn.SyncBatchNorm``; layers that went through both conversions
    get there by a second ``revert``. Modules whose forward :func:`fuse` has rewritten run their own
    again. In place and as lossless as :func:`convert`.

    Two sorts of layers are left as they are: subclasses of this library's layers, and those that
    ``torch.nn`` has no counterpart of, which are ``BatchNormAct1d/2d/3d``, ``GroupNormAct``, a
    :class:`SyncBatchNormAct` that was made as such, and ``LayerNorm`` with a ``channel_dim``.

    Args:
        module: any module, fused, converted or built with this library's classes.

    Returns:
        ``module``.

    Warns:
        UserWarning: names the layers of this library that were not reverted, and says why.

    Example::

        >>> model = batchnorm_ext.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> type(batchnorm_ext.revert(model)[1])  # to save it for where batchnorm_ext is not
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """

    def become_native(layer: nn.Module, kind: type, name: str) -> type | None:
        made_here = kind is SyncBatchNormAct and layer._batchnorm_ext_origin is None
        if kind not in _SYNC or made_here:
            return _NATIVE.get(kind)
        kind, layer.process_group = layer._batchnorm_ext_origin or (
            nn.SyncBatchNorm,
            layer.process_group,
        )
        added = ["_batchnorm_ext_name", "_batchnorm_ext_origin"]
        if kind is not nn.SyncBatchNorm:
            added.append("process_group")
        for attribute in added:
            delattr(layer, attribute)
        return kind

    unfuse(module)
    return _swap(module, "reverted", become_native, _is_ours)


def _is_ours(layer: nn.Module) -> bool:
    return isinstance(layer, (*_NATIVE, SyncBatchNorm))


def _swap(
    module: Module,
    done: str,
    become: Callable[[nn.Module, type, str], type | None],
    is_concerned: Callable[[nn.Module], bool],
) -> Module:
    """Change classes, and warn of the layers concerned that ``become`` has no class for.

    ``become(layer, its class, its path)`` gives the new class or None; ``done`` is what a layer is
    with a new class, for the warning.
    """
    skipped = []
    for name, layer in module.named_modules():
        kind = type(layer)
        if not isinstance(layer, (*_OURS, _BatchNorm)):
            continue
        if new := become(layer, kind, name):
            layer.__class__ = new
        elif parametrize.is_parametrized(layer) and (new := become(layer, kind.__base__, name)):
            # register_parametrization gave this layer a class of its own, which holds the
            # parametrized properties
            layer.__class__ = type(kind.__name__, (new,), dict(kind.__dict__))
        elif is_concerned(layer):
            skipped.append(f"{name or 'the module itself'} ({kind.__qualname__}: {_reason(layer)})")
    if skipped:
        warnings.warn(f"not {done}: " + ", ".join(skipped), stacklevel=3)
    return module


def _reason(layer: nn.Module) -> str:
    """Why a layer keeps its class."""
    if isinstance(layer, LazyModuleMixin):
        return "run it once first"
    kind = type(layer)
    if kind in LAYERS or (parametrize.is_parametrized(layer) and kind.__base__ in LAYERS):
        return "torch.nn has no such layer"
    return "a subclass, which may override forward"
