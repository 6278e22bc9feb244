"""Autograd: which gradients there are, and of which order."""

import itertools

import torch

from situations.harness import caught, situation
from situations.parts import (
    affine,
    batch,
    both_modes,
    gradients,
    numbered,
    state,
    statistics,
    weights_of,
)


@situation("every combination of what requires a gradient")
def _(lib):
    def run(x_grad, weight_grad, bias_grad, training):
        x = batch(4, 3, 2, 2).requires_grad_(x_grad)
        weight, bias = affine()
        weight.requires_grad_(weight_grad), bias.requires_grad_(bias_grad)
        y = lib.batch_norm(x, *statistics(), weight, bias, training)
        if y.requires_grad:
            y.backward(weights_of(y))
        return y, x.grad, weight.grad, bias.grad

    return {needs: run(*needs) for needs in itertools.product([True, False], repeat=4)}


@situation("a gradient of zero")
def _(lib):
    def run(layer):
        x = batch(4, 3, 2, 2).requires_grad_()
        y = layer(x)
        return torch.autograd.grad(y, [x, layer.weight, layer.bias], torch.zeros_like(y))

    return both_modes(lib, run)


@situation("an undefined gradient of the output")
def _(lib):
    class Dropping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    x = batch(4, 3, 2, 2).requires_grad_()
    layer = numbered(lib.BatchNorm2d(3))
    (Dropping.apply(layer(x)) + x).sum().backward()
    return x.grad, gradients(layer)


@situation("autograd.grad: unused inputs, with and without allow_unused")
def _(lib):
    layer, other = numbered(lib.BatchNorm2d(3)), torch.ones(3, requires_grad=True)
    y = layer(batch(4, 3, 2, 2)).pow(2).sum()
    unused = caught(torch.autograd.grad, y, [layer.weight, other])
    y = layer(batch(4, 3, 2, 2)).pow(2).sum()
    return unused, torch.autograd.grad(y, [layer.weight, other], allow_unused=True)


@situation("autograd.grad: some of the gradients")
def _(lib):
    def run(layer, *wanted):
        x = batch(4, 3, 2, 2).requires_grad_()
        tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
        y = layer(x)
        return torch.autograd.grad(y, [tensors[w] for w in wanted], weights_of(y))

    names = ["x", "weight", "bias"]
    return {
        wanted: both_modes(lib, lambda layer, w=wanted: run(layer, *w))
        for count in (1, 2)
        for wanted in itertools.combinations(names, count)
    }


@situation("backward(inputs=...) of the bias alone")
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
    layer(x).pow(2).sum().backward(inputs=[layer.bias])
    return x.grad, gradients(layer)


@situation("a second backward without and with retain_graph")
def _(lib):
    def run(layer, retain):
        x = batch(4, 3, 2, 2).requires_grad_()
        y = layer(x)
        y.backward(weights_of(y), retain_graph=retain)
        y.backward(weights_of(y))
        return x.grad, gradients(layer)

    return {
        retain: both_modes(lib, lambda layer, r=retain: caught(run, layer, r))
        for retain in (True, False)
    }


@situation("double backward", scale=64)
def _(lib):
    def run(layer):
        x = batch(4, 3, 2, 2).requires_grad_()
        dy = batch(4, 3, 2, 2).cos().requires_grad_()
        inputs = [x, layer.weight, layer.bias]
        first = torch.autograd.grad(layer(x), inputs, dy, create_graph=True)
        loss = sum(g.sin().sum() for g in first)
        second = torch.autograd.grad(loss, [x, dy, layer.weight, layer.bias], allow_unused=True)
        return first, second

    return both_modes(lib, run)


@situation("double backward: of the gradient of the weight alone", scale=64)
def _(lib):
    def run(layer):
        x = batch(4, 3, 2, 2).requires_grad_()
        y = layer(x)
        (dw,) = torch.autograd.grad(y, layer.weight, weights_of(y), create_graph=True)
        return torch.autograd.grad(dw.pow(2).sum(), [x, layer.bias], allow_unused=True)

    return both_modes(lib, run)


@situation("double backward without affine parameters", scale=64)
def _(lib):
    x = batch(4, 3, 2, 2).requires_grad_()
    y = lib.BatchNorm2d(3, affine=False)(x)
    (dx,) = torch.autograd.grad(y, x, weights_of(y), create_graph=True)
    return torch.autograd.grad(dx.pow(2).sum(), x)


@situation("a gradient penalty, trained with", scale=64)
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    (dx.norm() - 1).pow(2).backward()
    return x.grad, gradients(layer)


@situation("third derivative", scale=64)
def _(lib):
    x = batch(4, 2).double().requires_grad_()
    y = lib.batch_norm(x, None, None, training=True).sin().sum()
    results = []
    for _ in range(3):
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        y = (g * weights_of(g).detach()).sin().sum()
        results.append(y.detach())
    return results


@situation("gradcheck and gradgradcheck")
def _(lib):
    def run(training):
        x = batch(3, 2, 2).double().requires_grad_()
        weight = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)
        bias = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
        mean, var = torch.zeros(2).double(), torch.ones(2).double()

        def call(x, weight, bias):
            return lib.batch_norm(x, mean.clone(), var.clone(), weight, bias, training)

        arguments = (x, weight, bias)
        return [
            check(call, arguments, fast_mode=True)
            for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck)
        ]

    return run(True), run(False)


@situation("create_graph leaves a gradient that requires one")
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
    y = layer(x)
    torch.autograd.backward(y, weights_of(y), create_graph=True)
    result = x.grad.requires_grad, layer.weight.grad.requires_grad, layer.bias.grad.requires_grad
    x.grad = layer.weight.grad = layer.bias.grad = None
    return result


@situation("retain_grad on the output and on the input")
def _(lib):
    x = batch(4, 3, 2, 2).requires_grad_()
    inner = x * 2
    y = numbered(lib.BatchNorm2d(3))(inner)
    inner.retain_grad(), y.retain_grad()
    y.pow(2).sum().backward()
    return inner.grad, y.grad, x.grad


@situation("gradient of another dtype, size or device")
def _(lib):
    def run(dy):
        layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
        layer(x).backward(dy)
        return x.grad

    size = (4, 3, 2, 2)
    return [
        caught(run, dy)
        for dy in (
            batch(*size).double(),
            batch(*size).half(),
            batch(4, 3),
            torch.ones(size, device="meta"),
            batch(*size).to_sparse(),
            batch(*size).cfloat(),
        )
    ]


@situation("gradient that is sparse, from an operation behind")
def _(lib):
    class Sparse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy.to_sparse()

    def run():
        layer, x = numbered(lib.BatchNorm1d(3)), batch(4, 3).requires_grad_()
        y = Sparse.apply(layer(x))
        y.backward(weights_of(y))
        return x.grad

    return caught(run)


@situation("backward in another thread")
def _(lib):
    import threading

    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
    y = layer(x)
    thread = threading.Thread(target=lambda: y.backward(weights_of(y)))
    thread.start()
    thread.join()
    return x.grad, gradients(layer)


@situation("two forwards before one backward")
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
    (layer(x) * layer(2 * x)).sum().backward()
    return x.grad, gradients(layer), state(layer)


@situation("training in the forward, evaluation before the backward")
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2).requires_grad_()
    y = layer(x)
    layer.eval()
    layer.eps = 1.0
    y.backward(weights_of(y))
    return x.grad, gradients(layer)
