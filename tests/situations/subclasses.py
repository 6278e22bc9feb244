"""Tensor subclasses, and modes that see every function or operator."""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from situations.harness import caught, situation
from situations.parts import affine, batch, numbered, state, statistics, step


class Labelled(Tensor):
    """Nothing of its own."""


class Recording(Tensor):
    """Notes the functions that see it."""

    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


class Refusing(Tensor):
    """Raises in every function but for those that show it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.batch_norm:
            return "intercepted", list(kwargs or {}), len(args)
        return super().__torch_function__(function, types, args, kwargs or {})


class Wrapped(Tensor):
    """Holds a tensor, and notes the operators that reach it."""

    seen: list[str] = []

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner.detach()

    def __repr__(self):
        return "Wrapped"

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        cls.seen.append(str(operator))
        args, kwargs = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapped, operator(*args, **kwargs))


@situation("subclass without functions of its own: input")
def _(lib):
    x = batch(4, 3, 2, 2).as_subclass(Labelled)
    layer = numbered(lib.BatchNorm2d(3))
    return layer(x), layer.eval()(x), lib.batch_norm(x, *statistics())


@situation("subclass with __torch_function__: input")
def _(lib):
    Recording.seen.clear()
    layer = numbered(lib.BatchNorm2d(3))
    y = layer(batch(4, 3, 2, 2).as_subclass(Recording))
    return list(Recording.seen), type(y).__name__, y.as_subclass(Tensor)


@situation("subclass that answers F.batch_norm itself")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    return layer(batch(4, 3, 2, 2).as_subclass(Refusing)), lib.batch_norm(
        batch(4, 3).as_subclass(Refusing), *statistics(), training=True, eps=1e-3
    )


for name in ("running_mean", "running_var", "weight", "bias"):

    @situation(f"subclass with __torch_function__: {name}")
    def _(lib, name=name):
        mean, var = statistics()
        weight, bias = affine()
        tensors = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
        tensors[name] = tensors[name].as_subclass(Refusing)
        plain = tensors | {name: tensors[name].as_subclass(Labelled)}
        return [
            lib.batch_norm(batch(4, 3, 2, 2), **given, training=training)
            for given in (tensors, plain)
            for training in (True, False)
        ]

    @situation(f"subclass with __torch_dispatch__: {name}")
    def _(lib, name=name):
        def run(training):
            layer = numbered(lib.BatchNorm2d(3)).train(training)
            value = getattr(layer, name).detach()
            delattr(layer, name)
            setattr(layer, name, Wrapped(value))
            y = layer(batch(4, 3, 2, 2))
            return type(y).__name__, y.inner

        return [caught(run, training) for training in (True, False)]

    @situation(f"subclass with __torch_function__: the layer's {name}")
    def _(lib, name=name):
        layer = numbered(lib.BatchNorm2d(3))
        value = getattr(layer, name).detach()
        delattr(layer, name)
        setattr(layer, name, value.as_subclass(Refusing))
        return layer(batch(4, 3, 2, 2))


@situation("subclass as counter")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.num_batches_tracked = layer.num_batches_tracked.as_subclass(Labelled)
    return type(layer(batch(4, 3, 2, 2))).__name__, type(layer.num_batches_tracked).__name__


@situation("subclass with __torch_dispatch__: input")
def _(lib):
    def run(training):
        layer = numbered(lib.BatchNorm2d(3)).train(training)
        Wrapped.seen.clear()
        y = layer(Wrapped(batch(4, 3, 2, 2)))
        return type(y).__name__, y.inner, list(Wrapped.seen), state(layer)

    return [caught(run, training) for training in (True, False)]


@situation("subclass with __torch_dispatch__: input, in training without statistics")
def _(lib):
    Wrapped.seen.clear()
    y = lib.batch_norm(Wrapped(batch(4, 3, 2, 2)), None, None, training=True)
    return y.inner, list(Wrapped.seen)


@situation("Parameter of a subclass")
def _(lib):
    class Tagged(nn.Parameter):
        """Nothing of its own."""

    layer = numbered(lib.BatchNorm2d(3))
    layer.weight = Tagged(layer.weight.detach())
    return (
        type(layer.weight).__name__,
        type(layer(batch(4, 3, 2, 2))).__name__,
        step(layer, batch(4, 3, 2, 2)),
    )


@situation("Parameter and Buffer as input")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    return layer(nn.Parameter(batch(4, 3, 2, 2))), layer(nn.Buffer(batch(4, 3, 2, 2)))


@situation("object with __torch_function__ that is no tensor")
def _(lib):
    class Stub:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function.__name__

    return lib.batch_norm(Stub(), None, None), caught(lib.BatchNorm2d(3), Stub())


@situation("TorchFunctionMode: the functions it sees")
def _(lib):
    class Mode(TorchFunctionMode):
        seen: list[str] = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen.append(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    Mode.seen = []
    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2)
    with Mode():
        y = layer(x)
    return "batch_norm" in Mode.seen, y, state(layer)


@situation("TorchFunctionMode: answers F.batch_norm itself")
def _(lib):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.batch_norm:
                return "intercepted"
            return function(*args, **(kwargs or {}))

    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2)
    with Mode():
        return layer(x), lib.batch_norm(x, *statistics())


@situation("TorchDispatchMode: the results, and that it sees the operator")
def _(lib):
    class Mode(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    Mode.seen = []
    layer = numbered(lib.BatchNorm2d(3))
    with Mode():
        result = step(layer, batch(4, 3, 2, 2))
    return result, any("batch_norm" in name for name in Mode.seen)


@situation("FakeTensorMode: sizes and strides of output and gradients")
def _(lib):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        layer = lib.BatchNorm2d(3)
        x = torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
        y = layer(x)
        y.sum().backward()
        return [
            (str(t.dtype), tuple(t.shape), t.stride(), str(t.device))
            for t in (y, x.grad, layer.weight.grad, layer.bias.grad)
        ]


@situation("FakeTensorMode: wrong sizes")
def _(lib):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        layer = lib.BatchNorm2d(3)
        return [caught(layer, torch.empty(size)) for size in [(4, 5, 2, 2), (4, 3), (1, 3, 1, 1)]]


@situation("flop counter and module tracker")
def _(lib):
    from torch.utils.flop_counter import FlopCounterMode

    model = lib.switch(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with FlopCounterMode(display=False) as counter:
        model(batch(4, 3, 2, 2)).sum().backward()
    return counter.get_total_flops()
