"""Fused, accurate normalization for PyTorch.

    import batchnorm_ext
    model = batchnorm_ext.convert(model)   # its normalization layers now run on the fused kernels

``BatchNorm1d/2d/3d``, ``InstanceNorm1d/2d/3d``, their lazy forms, ``GroupNorm``, ``LayerNorm`` and
``RMSNorm`` are drop-ins for the ``torch.nn`` classes, ``functional`` for the functions and
``weight_norm`` for the parametrization. ``BatchNormAct1d/2d/3d`` and ``GroupNormAct`` add a
residual and apply an activation in the same pass. ``convert_sync_batchnorm`` makes layers normalize
over all ranks (``SyncBatchNorm``, ``SyncBatchNormAct``), ``revert`` undoes both conversions.
``preprocessing`` scales features, ``update_population_stats`` and ``as_affine`` prepare a model for
evaluation, ``fold`` merges norms into the layers next to them, ``fuse`` with the additions and
activations after them. ``recompute_activations`` keeps less memory for the backward.
``show_config`` tells how the library was built, ``python -m batchnorm_ext`` prints what a bug
report needs and tests it.
"""

from batchnorm_ext import functional, preprocessing
from batchnorm_ext._library import show_config
from batchnorm_ext._recompute import recompute_activations
from batchnorm_ext.convert import convert, convert_sync_batchnorm, revert
from batchnorm_ext.fold import fold
from batchnorm_ext.fuse import fuse
from batchnorm_ext.fusion import fuse_graph
from batchnorm_ext.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
    RMSNorm,
)
from batchnorm_ext.modules_act import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    GroupNormAct,
    SyncBatchNormAct,
)
from batchnorm_ext.parametrizations import weight_norm
from batchnorm_ext.population import as_affine, update_population_stats
from batchnorm_ext.sync import SyncBatchNorm

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "GroupNorm",
    "GroupNormAct",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "RMSNorm",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "as_affine",
    "convert",
    "convert_sync_batchnorm",
    "fold",
    "functional",
    "fuse",
    "fuse_graph",
    "preprocessing",
    "recompute_activations",
    "revert",
    "show_config",
    "update_population_stats",
    "weight_norm",
]
