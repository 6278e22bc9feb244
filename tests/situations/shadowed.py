"""Attributes that stand before the parameters and buffers of their names."""

import torch
from torch import nn

from situations.harness import situation
from situations.parts import batch, numbered, step


@situation("shadowed: an attribute of the layer stands before its weight")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.__dict__["weight"] = torch.full((3,), 9.0)
    return step(layer, batch(4, 3, 2, 2))


@situation("shadowed: an attribute of the layer stands before its running mean")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3)).eval()
    layer.__dict__["running_mean"] = torch.full((3,), 9.0)
    return step(layer, batch(4, 3, 2, 2))


@situation("shadowed: a subclass has a property of the weight's name", of_classes=True)
def _(lib):
    class Exponential(lib.BatchNorm2d):
        def __init__(self, features):
            super().__init__(features)
            self.scale = nn.Parameter(torch.full((features,), 3.0))

        @property
        def weight(self):
            return self.scale.exp()

        @weight.setter
        def weight(self, value):
            self.__dict__["ignored"] = value

    return Exponential(3)(batch(4, 3, 2, 2))


@situation("shadowed: a subclass looks the weight up by itself", of_classes=True)
def _(lib):
    class Positive(lib.BatchNorm2d):
        def __getattr__(self, name):
            value = super().__getattr__(name)
            return value.abs() if name == "weight" else value

    layer = numbered(Positive(3))
    with torch.no_grad():
        layer._parameters["weight"].neg_()
    return layer(batch(4, 3, 2, 2))
