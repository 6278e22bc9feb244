"""Running statistics that are strided, shared, parameters, or have a gradient."""

import torch
from torch import nn

from situations.harness import attempt, caught, situation
from situations.parts import batch, numbered, statistics, step, weights_of

BUFFERS = ["running_mean", "running_var", "num_batches_tracked"]


for name in BUFFERS[:2]:

    @situation(f"{name} strided")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        owner = torch.arange(1.0, 13.0)
        setattr(layer, name, owner[1::4])
        return step(layer, batch(4, 3, 2, 2)), owner, step(layer.eval(), batch(4, 3, 2, 2))

    @situation(f"{name} expanded from one value")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        owner = torch.tensor([1.5])
        setattr(layer, name, owner.expand(3))
        return caught(attempt, layer.eval(), batch(4, 3, 2, 2))

    @situation(f"{name} is a parameter")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        delattr(layer, name)
        setattr(layer, name, nn.Parameter(torch.ones(3)))
        return caught(step, layer.eval(), batch(4, 3, 2, 2)), caught(
            step, layer.train(), batch(4, 3, 2, 2)
        )

    @situation(f"{name} is a plain tensor, no buffer")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        delattr(layer, name)
        setattr(layer, name, torch.ones(3))
        return step(layer, batch(4, 3, 2, 2)), getattr(layer, name)

    @situation(f"{name} requires a gradient")
    def _(lib, name=name):
        results = []
        for training in (True, False):
            mean, var = statistics()
            tracked = {"running_mean": mean, "running_var": var}
            tracked[name].requires_grad_()
            x = batch(4, 3, 2, 2).requires_grad_()

            def run(x=x, tracked=tracked, training=training):
                y = lib.batch_norm(x, **tracked, training=training)
                y.backward(weights_of(y))
                return y, x.grad, tracked[name].grad, tracked[name]

            results.append(caught(run))
        return results

    @situation(f"{name} is a result of autograd, in evaluation")
    def _(lib, name=name):
        mean, var = statistics()
        source = torch.ones(3, requires_grad=True)
        tracked = {"running_mean": mean, "running_var": var}
        tracked[name] = tracked[name] * source
        x = batch(4, 3, 2, 2).requires_grad_()
        y = lib.batch_norm(x, **tracked)
        return y, caught(torch.autograd.grad, y.sum(), source), torch.autograd.grad(y.sum(), x)

    @situation(f"{name} alone requires a gradient, in evaluation")
    def _(lib, name=name):
        mean, var = statistics()
        tracked = {"running_mean": mean, "running_var": var}
        tracked[name].requires_grad_()
        y = lib.batch_norm(batch(4, 3, 2, 2), **tracked)
        return y.requires_grad, y.grad_fn is None, caught(y.sum().backward), tracked[name].grad


@situation("running statistics written to by hand between steps")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    first = step(layer, batch(4, 3, 2, 2))
    layer.running_mean.mul_(2)
    layer.running_var = layer.running_var + 1
    layer.num_batches_tracked += 5
    return first, step(layer, batch(4, 3, 2, 2)), step(layer.eval(), batch(4, 3, 2, 2))


@situation("running statistics: versions and identity after a step")
def _(lib):
    layer = lib.BatchNorm2d(3)
    before = {name: getattr(layer, name) for name in BUFFERS}
    layer(batch(4, 3, 2, 2))
    return {n: (getattr(layer, n) is t, t._version) for n, t in before.items()}
