"""What is written to between forward and backward, views, and operations in place."""

import torch

from situations.harness import caught, situation
from situations.parts import batch, both_modes, gradients, numbered, step, weights_of

for target in ("input", "weight", "bias", "running_mean", "running_var", "output"):

    @situation(f"{target} written to between forward and backward")
    def _(lib, target=target):
        def run(layer):
            x = batch(4, 3, 2, 2).requires_grad_().clone()
            y = layer(x)
            tensors = {"input": x, "output": y}
            with torch.no_grad():
                tensors.get(target, getattr(layer, target, None)).mul_(1.0)
            y.backward(weights_of(y))
            return gradients(layer)

        return both_modes(lib, lambda layer: caught(run, layer))


@situation("output written to by autograd's own operations")
def _(lib):
    def run(layer):
        x = batch(4, 3, 2, 2).requires_grad_()
        y = layer(x).mul_(2)
        y[0] = 0
        y.backward(weights_of(y))
        return y, x.grad, gradients(layer)

    return both_modes(lib, run)


@situation("a ReLU in place after the layer")
def _(lib):
    return step(
        torch.nn.Sequential(numbered(lib.BatchNorm2d(3)), torch.nn.ReLU(True)), batch(4, 3, 2, 2)
    )


@situation("views of the output, and of the input, as arguments")
def _(lib):
    x = batch(4, 6, 2, 2).requires_grad_()
    layer = numbered(lib.BatchNorm2d(3))
    y = layer(x[:, 3:])[:2]
    y.backward(weights_of(y))
    return y, x.grad, gradients(layer)


@situation("input written to before the forward")
def _(lib):
    x = batch(4, 3, 2, 2).requires_grad_()
    y = x * 2
    y.add_(1)
    z = numbered(lib.BatchNorm2d(3))(y)
    z.backward(weights_of(z))
    return z, x.grad
