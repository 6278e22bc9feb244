"""Functions of torch that a program has replaced."""

from unittest import mock

import torch.nn.functional as F

from situations.family import IMAGE
from situations.harness import attempt, caught, situation
from situations.parts import batch, numbered


def _allow(size):
    pass


def _refuse(size):
    raise ValueError(f"refused: {tuple(size)}")


LAYERS = {
    "BatchNorm2d": (lambda lib: lib.BatchNorm2d(6), "_verify_batch_size"),
    "SyncBatchNorm": (lambda lib: lib.SyncBatchNorm(6), "_verify_batch_size"),
    "GroupNorm": (lambda lib: lib.GroupNorm(6, 6), "_verify_batch_size"),
    "InstanceNorm2d": (
        lambda lib: lib.InstanceNorm2d(6, track_running_stats=True),
        "_verify_spatial_size",
    ),
}
FUNCTIONS = {
    "batch_norm": (lambda f, x: f(x, None, None, training=True), "_verify_batch_size"),
    "group_norm": (lambda f, x: f(x, 6), "_verify_batch_size"),
    "instance_norm": (lambda f, x: f(x), "_verify_spatial_size"),
}

for check in (_allow, _refuse):
    for name, (make, verifier) in LAYERS.items():

        @situation(f"{name}: its check of sizes replaced by {check.__name__}")
        def _(lib, make=make, verifier=verifier, check=check):
            layer, found = numbered(make(lib)), []
            with mock.patch.object(F, verifier, check):
                for training in (True, False):
                    for size in (IMAGE, (1, 6, 1, 1)):
                        found.append(caught(attempt, layer.train(training), batch(*size)))
            return found

    for name, (call, verifier) in FUNCTIONS.items():

        @situation(f"{name}: its check of sizes replaced by {check.__name__}")
        def _(lib, name=name, call=call, verifier=verifier, check=check):
            with mock.patch.object(F, verifier, check):
                sizes = (IMAGE, (1, 6, 1, 1))
                return [caught(call, getattr(lib, name), batch(*size)) for size in sizes]
