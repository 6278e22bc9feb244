"""What programs do with the layers of the family besides training them."""

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from situations.family import SCALE, SIZES, for_each_kind
from situations.harness import attempt, caught, situation
from situations.parts import batch, numbered, state, step


@for_each_kind("parameters written to between forward and backward")
def _(lib, make, size):
    layer, x = make(), batch(*size).requires_grad_()
    y = layer(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    return caught(lambda: torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))


@for_each_kind("input written to between forward and backward")
def _(lib, make, size):
    x = batch(*size).requires_grad_()
    between = x * 1
    y = make()(between)
    between.add_(1)
    return caught(y.sum().backward)


@for_each_kind("output written to before the backward")
def _(lib, make, size):
    x = batch(*size).requires_grad_()
    y = make()(x).mul_(2).relu_()
    y.sum().backward()
    return y, x.grad


@for_each_kind("channels_last")
def _(lib, make, size):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    x = batch(*size).to(memory_format=formats.get(len(size), torch.contiguous_format))
    return step(make(), x), step(make().half(), x.half())["y"]


@situation("LayerNorm and RMSNorm: permuted to the last dimension, back, and viewed", scale=SCALE)
def _(lib):
    x = batch(4, 6, 3, 2)
    layers = numbered(lib.LayerNorm(6)), numbered(lib.RMSNorm(6))
    return [
        caught(layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).view, 4, 36) for layer in layers
    ]


@for_each_kind("images without pixels or channels")
def _(lib, make, size):
    def run(size, training):
        return step(make().train(training), batch(*size))

    sizes = [(*size[:2], *[0] * len(size[2:])), (size[0], 0, *size[2:])]
    return [caught(run, size, training) for size in sizes for training in (True, False)]


@for_each_kind("infinity in the input")
def _(lib, make, size):
    x = batch(*size)
    x.view(-1)[-1] = torch.inf
    return step(make(), x)


@for_each_kind("fake tensors of every size")
def _(lib, make, size):
    def run(size, training):
        with FakeTensorMode():
            layer = make().train(training)
            y = layer(torch.empty(size))
            return y.shape, y.stride(), y.dtype, y.device

    return [caught(run, size, training) for size in SIZES for training in (True, False)]


@for_each_kind("load_state_dict(assign=True), onto a layer on meta too")
def _(lib, make, size):
    values = {name: 2 * value for name, value in make().state_dict().items()}
    layers = make(), make().to("meta")
    for layer in layers:
        layer.load_state_dict(values, assign=True)
    return [(step(layer, batch(*size)), state(layer)) for layer in layers]


@for_each_kind("parameters and buffers deleted")
def _(lib, make, size):
    def run(name, training):
        layer = make().train(training)
        delattr(layer, name)
        return attempt(layer, batch(*size))

    names = ("weight", "bias", "running_mean", "num_batches_tracked")
    return [caught(run, name, training) for name in names for training in (True, False)]


@for_each_kind("flags switched after construction")
def _(lib, make, size):
    def run(name, training):
        layer = make().train(training)
        setattr(layer, name, not getattr(layer, name))
        return attempt(layer, batch(*size)), repr(layer)

    flags = ("affine", "elementwise_affine", "track_running_stats")
    return [caught(run, name, training) for name in flags for training in (True, False)]


@for_each_kind("momentum of every kind")
def _(lib, make, size):
    def run(momentum):
        layer = make()
        layer.momentum = momentum
        return attempt(layer, batch(*size)), attempt(layer, 2 * batch(*size)), state(layer)

    values = (None, 0, 1.0, 2.0, -0.5, True, "0.1", torch.tensor(0.25), float("nan"))
    return [caught(run, momentum) for momentum in values]


@for_each_kind("parametrized and expanded parameters")
def _(lib, make, size):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrized, expanded = make(), make()
    for name, parameter in list(expanded.named_parameters()):
        nn.utils.parametrize.register_parametrization(parametrized, name, Doubled())
        setattr(expanded, name, nn.Parameter(torch.ones(1).expand(parameter.shape)))
    return step(parametrized, batch(*size)), caught(step, expanded, batch(*size))


@for_each_kind("compiled without a break")
def _(lib, make, size):
    torch._dynamo.reset()
    found = []
    for training in (True, False):
        layer = make().train(training)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        found.append([step(compiled, batch(*size) + i) for i in range(2)])
    return found


@for_each_kind("averaged by AveragedModel")
def _(lib, make, size):
    layer = numbered(make())
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    for _ in range(2):
        layer(batch(*size))
        averaged.update_parameters(layer)
    return averaged(batch(*size)), state(averaged)
