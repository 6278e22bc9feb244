"""momentum, eps and the flags of the layers, given at construction or changed afterwards."""

import torch

from situations.arguments import call
from situations.harness import attempt, caught, situation
from situations.parts import batch, numbered, state, step

MOMENTA = [0.0, 1.0, -0.5, 1.5, float("nan"), float("inf"), 1, True]


@situation("momentum: numbers")
def _(lib):
    return [
        step(numbered(lib.BatchNorm1d(3, momentum=momentum)), batch(4, 3)) for momentum in MOMENTA
    ]


@situation("momentum: a tensor")
def _(lib):
    return [
        caught(step, numbered(lib.BatchNorm1d(3, momentum=momentum)), batch(4, 3))
        for momentum in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(1))
    ]


@situation("momentum: no number")
def _(lib):
    return [
        caught(attempt, lib.BatchNorm1d(3, momentum=momentum), batch(4, 3))
        for momentum in ("0.1", [0.1], 1j, torch.ones(2))
    ]


@situation("momentum: no number, in evaluation")
def _(lib):
    return [
        caught(attempt, lib.BatchNorm1d(3, momentum=momentum).eval(), batch(4, 3))
        for momentum in ("0.1", [0.1], torch.ones(2), None)
    ]


@situation("momentum: no number, without running statistics")
def _(lib):
    return [
        caught(
            attempt, lib.BatchNorm1d(3, momentum=momentum, track_running_stats=False), batch(4, 3)
        )
        for momentum in ("0.1", None)
    ]


@situation("momentum: None averages all batches")
def _(lib):
    layer = lib.BatchNorm1d(3, momentum=None)
    return [step(layer, batch(4, 3) * i + i) for i in range(1, 4)]


@situation("momentum: None with a counter that was set back")
def _(lib):
    layer = lib.BatchNorm1d(3, momentum=None)
    layer(batch(4, 3))
    layer.num_batches_tracked.zero_()
    return step(layer, 2 * batch(4, 3))


@situation("momentum: None with a counter of -1, which divides by zero")
def _(lib):
    layer = lib.BatchNorm1d(3, momentum=None)
    layer.num_batches_tracked.fill_(-1)
    return step(layer, batch(4, 3))


@situation("momentum: None without a counter")
def _(lib):
    layer = numbered(lib.BatchNorm1d(3, momentum=None))
    layer.num_batches_tracked = None
    return step(layer, batch(4, 3))


@situation("momentum: batch_norm does not take None")
def _(lib):
    return [caught(lambda t=t: call(lib, momentum=None, training=t)) for t in (True, False)]


@situation("momentum: batch_norm with other types")
def _(lib):
    return [
        caught(lambda m=m: call(lib, momentum=m))
        for m in (1, True, "0.1", torch.tensor(0.25), torch.tensor([0.25]), 1j)
    ]


@situation("momentum: changed after construction")
def _(lib):
    layer = numbered(lib.BatchNorm1d(3))
    results = [step(layer, batch(4, 3))]
    for momentum in (0.9, None, 0.5):
        layer.momentum = momentum
        results.append(step(layer, batch(4, 3)))
    return results


@situation("eps: numbers")
def _(lib):
    return {
        (eps, training): caught(
            attempt, numbered(lib.BatchNorm1d(3, eps=eps)).train(training), batch(4, 3)
        )
        for eps in (0.0, -1.0, -1e-30, 1e-30, 1.0, 1, 0, True, float("inf"))
        for training in (True, False)
    }


@situation("eps: NaN")
def _(lib):
    return {
        training: caught(
            attempt, numbered(lib.BatchNorm1d(3, eps=float("nan"))).train(training), batch(4, 3)
        )
        for training in (True, False)
    }


@situation("eps: a tensor")
def _(lib):
    return {
        (str(eps), training): caught(
            attempt, numbered(lib.BatchNorm1d(3, eps=eps)).train(training), batch(4, 3)
        )
        for eps in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(-1.0), torch.ones(3))
        for training in (True, False)
    }


@situation("eps: no number")
def _(lib):
    return [
        caught(attempt, lib.BatchNorm1d(3, eps=eps).train(training), batch(4, 3))
        for eps in ("1e-5", None, [1e-5])
        for training in (True, False)
    ]


@situation("eps: zero where a running variance is zero")
def _(lib):
    layer = lib.BatchNorm1d(3, eps=0.0).eval()
    layer.running_var[1] = 0
    return attempt(layer, batch(4, 3))


@situation("a negative running variance gives NaN")
def _(lib):
    layer = lib.BatchNorm1d(3).eval()
    layer.running_var[1] = -1
    return attempt(layer, batch(4, 3))


@situation("eps: batch_norm with other types")
def _(lib):
    return [
        caught(lambda e=e, t=t: call(lib, eps=e, training=t))
        for e in (1, 0, True, "1e-5", None, torch.tensor(0.25), -1.0, 0.0, 1j)
        for t in (True, False)
    ]


@situation("training: batch_norm with other types")
def _(lib):
    return [
        caught(lambda t=t: call(lib, training=t))
        for t in (1, 0, None, "yes", torch.tensor(True), torch.tensor([True, False]), 1.5)
    ]


@situation("training: the flag of a layer of another type")
def _(lib):
    def run(flag):
        layer = numbered(lib.BatchNorm1d(3))
        layer.training = flag
        return step(layer, batch(4, 3))

    return [caught(run, flag) for flag in (1, 0, None, "yes", torch.tensor(True))]


@situation("train() and eval() in turns")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    x = batch(4, 3, 2, 2)
    return [step(layer.train(mode), x + i) for i, mode in enumerate([True, False, True, False])]


@situation("train() with something that is no bool")
def _(lib):
    return caught(lib.BatchNorm2d(3).train, 1), caught(lib.BatchNorm2d(3).train, "yes")


@situation("without affine parameters")
def _(lib):
    return step(lib.BatchNorm2d(3, affine=False), batch(4, 3, 2, 2))


@situation("without a bias from construction on")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3, bias=False))
    return repr(layer), list(state(layer)), step(layer, batch(4, 3, 2, 2))


@situation("without running statistics, in training and evaluation")
def _(lib):
    layer = lib.BatchNorm2d(3, track_running_stats=False)
    x = batch(4, 3, 2, 2)
    return step(layer, x), step(layer.eval(), x), list(state(layer))


@situation("track_running_stats: turned off after construction")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.track_running_stats = False
    x = batch(4, 3, 2, 2)
    return step(layer, x), step(layer.eval(), x)


@situation("track_running_stats: turned on after construction")
def _(lib):
    layer = lib.BatchNorm2d(3, track_running_stats=False)
    layer.track_running_stats = True
    x = batch(4, 3, 2, 2)
    return caught(step, layer, x), caught(step, layer.eval(), x), caught(layer.reset_running_stats)


@situation("affine: turned off after construction")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.affine = False
    result = step(layer, batch(4, 3, 2, 2))
    layer.reset_parameters()
    return result, state(layer)


for missing in (["running_mean"], ["running_var"], ["running_mean", "running_var"]):

    @situation(f"buffers set to None: {' and '.join(missing)}")
    def _(lib, missing=missing):
        def run(training):
            layer = numbered(lib.BatchNorm2d(3)).train(training)
            for name in missing:
                setattr(layer, name, None)
            attempt(layer, batch(4, 3, 2, 2))
            return step(layer, batch(4, 3, 2, 2))

        return caught(run, True), caught(run, False)


@situation("buffers deleted")
def _(lib):
    def run(name, training):
        layer = numbered(lib.BatchNorm2d(3)).train(training)
        delattr(layer, name)
        return attempt(layer, batch(4, 3, 2, 2))

    return {
        (name, training): caught(run, name, training)
        for name in ("running_mean", "running_var", "num_batches_tracked")
        for training in (True, False)
    }
