"""Lazy layers, before and after their first input."""

import copy
import pickle

import torch
from torch import nn

from situations.harness import attempt, caught, situation
from situations.parts import batch, numbered, state, step

KINDS = {"LazyBatchNorm1d": (4, 3, 5), "LazyBatchNorm2d": (4, 3, 2, 2)}
KINDS["LazyBatchNorm3d"] = (2, 3, 2, 2, 2)

for kind, size in KINDS.items():

    @situation(f"{kind}: first and second step, class and sizes before and after")
    def _(lib, kind=kind, size=size):
        layer = getattr(lib, kind)()
        before = repr(layer), layer.num_features, type(layer).__name__
        steps = step(layer, batch(*size)), step(layer, 2 * batch(*size))
        return before, steps, repr(layer), layer.num_features, type(layer).__name__

    @situation(f"{kind}: a first input of the wrong number of dimensions")
    def _(lib, kind=kind):
        layer = getattr(lib, kind)()
        wrong = batch(2, 3, 2, 2, 2, 2)
        return caught(layer, wrong), type(layer).__name__, layer.has_uninitialized_params()


@situation("lazy: every option")
def _(lib):
    layer = lib.LazyBatchNorm2d(1e-3, 0.5, dtype=torch.float64)
    plain = lib.LazyBatchNorm2d(affine=False, track_running_stats=False)
    x = batch(4, 3, 2, 2)
    return step(layer, x.double()), step(plain, x), repr(layer), repr(plain)


@situation("lazy: without a bias")
def _(lib):
    return step(lib.LazyBatchNorm2d(bias=False), batch(4, 3, 2, 2))


@situation("lazy: first input in evaluation")
def _(lib):
    return step(lib.LazyBatchNorm2d().eval(), batch(4, 3, 2, 2))


@situation("lazy: first input of one value per channel, then a good one")
def _(lib):
    layer = lib.LazyBatchNorm2d()
    return caught(layer, batch(1, 3, 1, 1)), step(layer, batch(4, 3, 2, 2))


@situation("lazy: first input of another dtype than the layer's")
def _(lib):
    layer = lib.LazyBatchNorm2d()
    return caught(layer, batch(4, 3, 2, 2).half()), layer.weight.dtype


@situation("lazy: first input is no tensor, or has no channels")
def _(lib):
    return caught(lib.LazyBatchNorm2d(), None), caught(lib.LazyBatchNorm1d(), batch(3))


@situation("lazy: first input on meta, and a layer on meta")
def _(lib):
    x = torch.empty(4, 3, 2, 2, device="meta")
    layer = lib.LazyBatchNorm2d(device="meta")
    return caught(lib.LazyBatchNorm2d(), x), layer(x), layer.weight


@situation("lazy: another number of channels afterwards")
def _(lib):
    layer = lib.LazyBatchNorm2d()
    layer(batch(4, 3, 2, 2))
    return caught(attempt, layer, batch(4, 5, 2, 2))


@situation("lazy: dtype changed before the first input")
def _(lib):
    return step(lib.LazyBatchNorm2d().double(), batch(4, 3, 2, 2).double())


@situation("lazy: state dict before the first input, loaded from a used layer and the reverse")
def _(lib):
    lazy, used = lib.LazyBatchNorm2d(), numbered(nn.BatchNorm2d(3))
    keys = list(lazy.state_dict()), type(lazy.state_dict()["weight"]).__name__
    reverse = caught(used.load_state_dict, lazy.state_dict())
    lazy.load_state_dict(used.state_dict())
    return keys, reverse, type(lazy).__name__, step(lazy, batch(4, 3, 2, 2))


@situation("lazy: copied and pickled before the first input")
def _(lib):
    layer = lib.LazyBatchNorm2d()
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    return [(type(c).__name__, step(c, batch(4, 3, 2, 2)), type(c).__name__) for c in copies]


@situation("lazy: what cannot be done before the first input")
def _(lib):
    layer = lib.LazyBatchNorm2d()
    return [
        caught(layer.share_memory),
        caught(lambda: layer.weight.shape),
        caught(lambda: layer.weight + 1),
        caught(layer.reset_parameters),
        caught(layer.reset_running_stats),
        caught(list, layer.parameters())[0].__class__.__name__,
    ]


@situation("lazy: in a model, with an optimizer made after a dry run")
def _(lib):
    model = nn.Sequential(nn.LazyConv2d(4, 1), lib.LazyBatchNorm2d(), nn.LazyConv2d(2, 1))
    model(batch(4, 3, 2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(4, 3, 2, 2)).pow(2).mean().backward()
    optimizer.step()
    return repr(model), state(model)


@situation("lazy: hooks registered before the first input")
def _(lib):
    layer, seen = lib.LazyBatchNorm2d(), []
    layer.register_forward_pre_hook(lambda m, a: seen.append(type(m).__name__))
    layer.register_forward_hook(lambda m, a, y: seen.append(type(m).__name__))
    layer(batch(4, 3, 2, 2))
    return seen, len(layer._forward_pre_hooks), len(layer._load_state_dict_pre_hooks)


@situation("lazy: switched before and after the first input")
def _(lib):
    model = lib.switch(nn.Sequential(nn.LazyBatchNorm2d()))
    first = step(model, batch(4, 3, 2, 2))
    return first, repr(model), step(lib.switch(model), batch(4, 3, 2, 2))


@situation("lazy: isinstance and cls_to_become", of_classes=True)
def _(lib):
    layer = lib.LazyBatchNorm2d()
    mixin = nn.modules.lazy.LazyModuleMixin
    return (
        isinstance(layer, nn.LazyBatchNorm2d),
        isinstance(layer, nn.BatchNorm2d),
        isinstance(layer, mixin),
        layer.cls_to_become.__name__,
    )


@situation("lazy: wrong arguments of the constructor")
def _(lib):
    return caught(lib.LazyBatchNorm2d, 1, 2, 3, 4, 5, 6, 7), caught(
        lambda: lib.LazyBatchNorm2d(num_features=3)
    )
