"""Where no gradients are recorded: no_grad, inference mode, detached tensors."""

import torch

from situations.harness import attempt, caught, situation
from situations.parts import batch, both_modes, numbered, state, step


@situation("detached output and detached input")
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
    return layer(x).detach(), layer(x.detach()), layer(x.data)


@situation("no_grad")
def _(lib):
    def run(layer):
        with torch.no_grad():
            return layer(batch(4, 3, 2, 2).requires_grad_()), state(layer)

    return both_modes(lib, run)


@situation("enable_grad within no_grad")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    with torch.no_grad():
        with torch.enable_grad():
            result = step(layer, batch(4, 3, 2, 2))
        return result, layer(batch(4, 3, 2, 2))


@situation("inference_mode")
def _(lib):
    def run(layer):
        with torch.inference_mode():
            y = layer(batch(4, 3, 2, 2))
            return y, y.is_inference(), state(layer)

    return both_modes(lib, run)


@situation("training in inference_mode, then with no_grad, then with gradients")
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2)
    with torch.inference_mode():
        found = [layer(x) for _ in range(3)]
    with torch.no_grad():
        found.append(layer(x + 1))
    return found, step(layer, x)


@situation("inference tensors used outside")
def _(lib):
    def run(training):
        layer = numbered(lib.BatchNorm2d(3)).train(training)
        with torch.inference_mode():
            x = batch(4, 3, 2, 2)
        return caught(layer, x), caught(layer.requires_grad_(False), x)

    return run(True), run(False)


@situation("inference buffers used outside")
def _(lib):
    def run(training):
        with torch.inference_mode():
            layer = numbered(lib.BatchNorm2d(3)).train(training)
        return caught(attempt, layer, batch(4, 3, 2, 2)), caught(step, layer, batch(4, 3, 2, 2))

    return run(True), run(False)


@situation("a layer made in inference mode, its statistics tracked there")
def _(lib):
    with torch.inference_mode():
        layer = numbered(lib.BatchNorm2d(3))
        y = layer(batch(4, 3, 2, 2))
    return y, {n: b.clone() for n, b in layer.named_buffers()}


@situation("set_grad_enabled as a decorator around the layer")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    return torch.set_grad_enabled(False)(layer.forward)(batch(4, 3, 2, 2))
