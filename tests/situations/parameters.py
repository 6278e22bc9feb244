"""Parameters that were replaced, shared, deleted, strided, or made of something else."""

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from situations.harness import attempt, caught, situation
from situations.parts import affine, batch, gradients, numbered, state, statistics, step, weights_of

PARAMETERS = ["weight", "bias"]
BUFFERS = ["running_mean", "running_var", "num_batches_tracked"]


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return 2 * x


@situation("parameter replaced by another one")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.weight = nn.Parameter(torch.tensor([3.0, -2.0, 0.0]))
    return step(layer, batch(4, 3, 2, 2))


for name in PARAMETERS:

    @situation(f"{name} set to None")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        setattr(layer, name, None)
        return step(layer, batch(4, 3, 2, 2)), step(layer.eval(), batch(4, 3, 2, 2))

    @situation(f"{name} deleted")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        delattr(layer, name)
        return caught(attempt, layer, batch(4, 3, 2, 2))

    @situation(f"{name} deleted and set to a plain tensor")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        delattr(layer, name)
        plain = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        setattr(layer, name, plain)
        return step(layer, batch(4, 3, 2, 2)), plain.grad

    @situation(f"{name} set to a plain tensor")
    def _(lib, name=name):
        return caught(setattr, lib.BatchNorm2d(3), name, torch.ones(3))

    @situation(f"{name} computed from another tensor")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        delattr(layer, name)
        source = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        setattr(layer, name, source.sin())
        return step(layer, batch(4, 3, 2, 2)), source.grad

    @situation(f"{name} without requires_grad")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        getattr(layer, name).requires_grad_(False)
        return step(layer, batch(4, 3, 2, 2))

    @situation(f"{name} expanded from one value")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        setattr(layer, name, nn.Parameter(torch.tensor([1.5]).expand(3)))
        return step(layer, batch(4, 3, 2, 2))

    @situation(f"{name} strided")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        setattr(layer, name, nn.Parameter(torch.arange(12.0)[1::4]))
        return step(layer, batch(4, 3, 2, 2))

    @situation(f"{name} of size (1, C)")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        setattr(layer, name, nn.Parameter(torch.tensor([[1.0, 2.0, 3.0]])))
        return caught(step, layer, batch(4, 3, 2, 2)), caught(
            attempt, layer.eval(), batch(4, 3, 2, 2)
        )

    @situation(f"{name} of size (C, 1), strided")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        setattr(layer, name, nn.Parameter(torch.arange(6.0).view(3, 2)[:, :1]))
        return caught(attempt, layer, batch(4, 3, 2, 2))

    @situation(f"{name} of another dtype than the other parameter, in training")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach().half()))
        return [
            caught(step, layer, batch(4, 3, 2, 2, dtype=dtype))
            for dtype in (torch.float32, torch.float16)
        ]

    @situation(f"{name} is sparse")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        setattr(layer, name, nn.Parameter(torch.ones(3).to_sparse()))
        return caught(attempt, layer, batch(4, 3, 2, 2))

    @situation(f"{name} is quantized")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        delattr(layer, name)
        setattr(layer, name, torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
        return caught(attempt, layer, batch(4, 3, 2, 2))

    @situation(f"{name} is uninitialized")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        setattr(layer, name, nn.parameter.UninitializedParameter())
        return caught(layer, batch(4, 3, 2, 2))

    @situation(f"{name} parametrized")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        parametrize.register_parametrization(layer, name, Doubled())
        result = step(layer, batch(4, 3, 2, 2))
        parametrize.remove_parametrizations(layer, name)
        return result, type(layer).__name__, step(layer, batch(4, 3, 2, 2))


@situation("a model with a parametrized layer, switched afterwards")
def _(lib):
    layer = numbered(nn.BatchNorm2d(3))
    parametrize.register_parametrization(layer, "weight", Doubled())
    model = lib.switch(nn.Sequential(layer))
    return repr(model), step(model, batch(4, 3, 2, 2))


@situation("parametrize.cached")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    parametrize.register_parametrization(layer, "weight", Doubled())
    with parametrize.cached():
        return step(layer, batch(4, 3, 2, 2)), step(layer, batch(4, 3, 2, 2))


@situation("running_mean parametrized")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    parametrize.register_parametrization(layer, "running_mean", Doubled())
    return [step(layer.train(training), batch(4, 3, 2, 2)) for training in (True, False)]


@situation("weight_norm and spectral_norm of a vector")
def _(lib):
    normed = parametrizations.weight_norm(numbered(lib.BatchNorm2d(3)), dim=None)
    return step(normed, batch(4, 3, 2, 2)), caught(
        lambda: repr(parametrizations.spectral_norm(lib.BatchNorm2d(3)))
    )


@situation("weight_norm by hooks")
def _(lib):
    layer = torch.nn.utils.weight_norm(numbered(lib.BatchNorm2d(3)), dim=0)
    return step(layer, batch(4, 3, 2, 2)), step(layer.eval(), batch(4, 3, 2, 2))


@situation("pruned weight")
def _(lib):
    import torch.nn.utils.prune as prune

    layer = prune.l1_unstructured(numbered(lib.BatchNorm2d(3)), "weight", amount=1)
    return step(layer, batch(4, 3, 2, 2))


@situation("weight.data replaced, by another dtype too")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.weight.data = torch.tensor([3.0, -2.0, 0.0])
    first = step(layer, batch(4, 3, 2, 2))
    layer.weight.grad = None
    layer.weight.data = layer.weight.data.double()
    return first, caught(attempt, layer, batch(4, 3, 2, 2))


@situation("weight is a part of the input")
def _(lib):
    x = batch(4, 3, 2, 2).requires_grad_()
    y = lib.batch_norm(x, None, None, x[0, :, 0, 0], x[1, :, 0, 0], True)
    y.backward(weights_of(y))
    return y, x.grad


@situation("one layer used twice in a model")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    return step(nn.Sequential(layer, nn.ReLU(), layer), batch(4, 3, 2, 2))


@situation("two layers that share parameters and buffers")
def _(lib):
    layer, other = numbered(lib.BatchNorm2d(3)), lib.BatchNorm2d(3)
    other.weight, other.bias = layer.weight, layer.bias
    for name in BUFFERS:
        setattr(other, name, getattr(layer, name))
    return step(nn.Sequential(layer, nn.ReLU(), other), batch(4, 3, 2, 2))


@situation("weight and bias are one parameter")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.bias = layer.weight
    return step(layer, batch(4, 3, 2, 2))


@situation("running_mean and running_var are one tensor")
def _(lib):
    x, shared = batch(4, 3, 2, 2), torch.ones(3)
    y = lib.batch_norm(x, shared, shared, training=False)
    return y


@situation("running_mean and weight are one tensor")
def _(lib):
    shared, (_, var) = torch.ones(3), statistics()
    y = lib.batch_norm(batch(4, 3, 2, 2), shared, var, shared, None, True)
    return y, shared


@situation("parameters: versions after a step and an evaluation")
def _(lib):
    layer = lib.BatchNorm2d(3)
    x = batch(4, 3, 2, 2)
    layer(x)
    layer.eval()(x)
    return x._version, layer.weight._version, layer.bias._version


@situation("parameters from a flat buffer, as optimizers make them")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    flat = nn.Parameter(nn.utils.parameters_to_vector(layer.parameters()).detach())
    del layer.weight, layer.bias
    layer.weight, layer.bias = flat[:3], flat[3:]
    return step(layer, batch(4, 3, 2, 2)), flat.grad


@situation("optimizer made before a step")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        y = layer(batch(4, 3, 2, 2))
        y.backward(weights_of(y))
        optimizer.step()
    return state(layer)


@situation("functional with affine parameters that are leaves")
def _(lib):
    weight, bias = (t.requires_grad_() for t in affine())
    y = lib.batch_norm(batch(4, 3, 2, 2), *statistics(), weight, bias, training=True)
    y.backward(weights_of(y))
    return y, weight.grad, bias.grad


@situation("gradients are accumulated over two backwards")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    for scale in (1, 2):
        y = layer(scale * batch(4, 3, 2, 2))
        y.backward(weights_of(y))
    return gradients(layer)
