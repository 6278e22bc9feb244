"""SyncBatchNorm in one process, and PyTorch's own conversion applied to the layers."""

import torch
import torch.distributed as dist
from torch import nn

from situations.harness import attempt, caught, situation
from situations.parts import batch, numbered, state, step


@situation("sync: repr, state dict, isinstance of the base")
def _(lib):
    layer = lib.SyncBatchNorm(3, eps=1e-3)
    base = nn.modules.batchnorm._BatchNorm
    return repr(layer), state(layer), isinstance(layer, base), layer.process_group


@situation("sync: every argument by position and keyword")
def _(lib):
    layer = lib.SyncBatchNorm(3, 1e-3, 0.2, True, True, None, "cpu", torch.float64)
    plain = lib.SyncBatchNorm(3, affine=False, track_running_stats=False)
    return step(layer, batch(4, 3).double()), step(plain, batch(4, 3)), repr(plain)


@situation("sync: without a bias, momentum None")
def _(lib):
    layer = lib.SyncBatchNorm(3, momentum=None, bias=False)
    return step(layer, batch(4, 3)), step(layer, 2 * batch(4, 3)), step(layer.eval(), batch(4, 3))


@situation("sync: without a counter in training")
def _(lib):
    layer = lib.SyncBatchNorm(3)
    layer.num_batches_tracked = None
    evaluated = attempt(layer.eval(), batch(4, 3))
    return evaluated, caught(attempt, layer.train(), batch(4, 3))


@situation("sync: wrong sizes and dtypes")
def _(lib):
    sizes = [(4, 5), (4, 0), (1, 3), (0, 3), (3,), ()]
    dtypes = [torch.int64, torch.float64, torch.complex64]
    return [
        *(caught(attempt, lib.SyncBatchNorm(3), batch(*size)) for size in sizes),
        *(caught(attempt, lib.SyncBatchNorm(3), batch(4, 3).to(dtype)) for dtype in dtypes),
    ]


@situation("sync: a group of one process")
def _(lib):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = numbered(lib.SyncBatchNorm(3))
        evaluated = step(layer.eval(), batch(4, 3))
        return evaluated, caught(step, layer.train(), batch(4, 3))
    finally:
        dist.destroy_process_group()


@situation("sync: state dict from and to a plain layer")
def _(lib):
    layer, plain = lib.SyncBatchNorm(3), numbered(nn.BatchNorm2d(3))
    layer.load_state_dict(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    return state(layer), state(plain)


@situation("torch.nn.SyncBatchNorm.convert_sync_batchnorm of a model with the layers")
def _(lib):
    model = nn.Sequential(numbered(lib.BatchNorm2d(3)), nn.ReLU(), lib.BatchNorm2d(3, affine=False))
    model[0](batch(4, 3, 2, 2))
    weight = model[0].weight
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model.eval())
    same = converted[0].weight is weight
    names = [type(m).__name__ for m in converted]
    return names, same, converted[0].training, step(converted, batch(4, 3, 2, 2))
