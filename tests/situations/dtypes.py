"""Every mix of dtypes, of devices, and autocast."""

import torch
from torch import nn

from situations.arguments import call
from situations.harness import attempt, caught, situation
from situations.parts import DTYPES, FLOATS, batch, numbered, state, step


@situation("input of every dtype, parameters in float32")
def _(lib):
    return {
        (dtype, training): caught(
            attempt, numbered(lib.BatchNorm2d(3)).train(training), batch(4, 3, 2, 2).to(dtype)
        )
        for dtype in DTYPES
        for training in (True, False)
    }


@situation("input of every dtype, no parameters and no statistics")
def _(lib):
    return {
        dtype: caught(lib.batch_norm, batch(4, 3, 2, 2).to(dtype), None, None, None, None, True)
        for dtype in DTYPES
    }


@situation("input of every dtype, (N, C)")
def _(lib):
    return {
        dtype: caught(attempt, numbered(lib.BatchNorm1d(3)), batch(4, 3).to(dtype))
        for dtype in DTYPES
    }


for input_dtype in FLOATS:

    @situation(f"layer of every dtype, input in {input_dtype}")
    def _(lib, input_dtype=input_dtype):
        return {
            (dtype, training): caught(
                step,
                numbered(lib.BatchNorm2d(3, dtype=dtype)).train(training),
                batch(4, 3, 2, 2).to(input_dtype),
            )
            for dtype in FLOATS
            for training in (True, False)
        }

    for name in ("running_mean", "running_var", "weight", "bias"):

        @situation(f"batch_norm: {name} of every dtype, input in {input_dtype}")
        def _(lib, input_dtype=input_dtype, name=name):
            return {
                (dtype, training): caught(
                    lambda d=dtype, t=training: call(
                        lib,
                        input=batch(4, 3, 2, 2).to(input_dtype),
                        **{name: torch.ones(3).to(d)},
                        training=t,
                    )
                )
                for dtype in DTYPES
                for training in (True, False)
            }

    @situation(f"batch_norm: weight and bias of different dtypes, input in {input_dtype}")
    def _(lib, input_dtype=input_dtype):
        def run(weight_dtype, bias_dtype):
            weight = torch.ones(3, dtype=weight_dtype, requires_grad=True)
            bias = torch.ones(3, dtype=bias_dtype, requires_grad=True)
            x = batch(4, 3).to(input_dtype).requires_grad_()
            y = lib.batch_norm(x, None, None, weight, bias, True)
            y.backward(torch.ones_like(y).cumsum(0))
            return y, x.grad, weight.grad, bias.grad

        return {(a, b): caught(run, a, b) for a in FLOATS for b in FLOATS}

    @situation(f"batch_norm: statistics of different dtypes, input in {input_dtype}")
    def _(lib, input_dtype=input_dtype):
        def run(mean_dtype, var_dtype, training):
            mean, var = torch.zeros(3, dtype=mean_dtype), torch.ones(3, dtype=var_dtype)
            return call(
                lib,
                input=batch(4, 3).to(input_dtype),
                running_mean=mean,
                running_var=var,
                weight=None,
                bias=None,
                training=training,
            )

        return {
            (a, b, t): caught(run, a, b, t) for a in FLOATS for b in FLOATS for t in (True, False)
        }


@situation("weight alone in half precision, input in half precision")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    layer.weight = nn.Parameter(layer.weight.detach().half())
    return step(layer, batch(4, 3, 2, 2).half())


@situation("half precision in evaluation, statistics in float32")
def _(lib):
    return [
        step(numbered(lib.BatchNorm2d(3)).eval(), batch(4, 3, 2, 2).to(dtype))
        for dtype in (torch.bfloat16, torch.float16)
    ]


for convert in ("half", "bfloat16", "double", "float"):
    # after a step in float32, whose rounding stays in the statistics
    @situation(f"layer.{convert}() after a step", scale=1e8 if convert == "double" else 1)
    def _(lib, convert=convert):
        layer = numbered(lib.BatchNorm2d(3))
        layer(batch(4, 3, 2, 2))
        layer = getattr(layer, convert)()
        x = getattr(batch(4, 3, 2, 2), convert)()
        return step(layer, x), caught(attempt, layer, batch(4, 3, 2, 2))


@situation("layer.to(dtype) and .type(dtype)")
def _(lib):
    layer = lib.BatchNorm2d(3).to(torch.float64)
    other = lib.BatchNorm2d(3).type(torch.float16)
    return state(layer), state(other), caught(lambda: lib.BatchNorm2d(3).to(torch.int64))


@situation("layer with complex parameters")
def _(lib):
    layer = lib.BatchNorm2d(3, dtype=torch.complex64)
    x = batch(4, 3, 2, 2)
    return [
        caught(attempt, layer.train(training), y)
        for y in (x, x.cfloat())
        for training in (True, False)
    ]


for dtype in (torch.bfloat16, torch.float16):

    @situation(f"autocast to {dtype}: inputs of every dtype")
    def _(lib, dtype=dtype):
        def run(input_dtype, training):
            layer = numbered(lib.BatchNorm2d(3)).train(training)
            with torch.autocast("cpu", dtype=dtype):
                x = batch(4, 3, 2, 2).to(input_dtype).requires_grad_()
                y = layer(x)
            y.backward(torch.ones_like(y).cumsum(0))
            return y, x.grad, layer.weight.grad, state(layer)

        return {(d, t): caught(run, d, t) for d in FLOATS for t in (True, False)}

    @situation(f"autocast to {dtype}: layer in half precision")
    def _(lib, dtype=dtype):
        def run(layer_dtype, input_dtype):
            layer = numbered(lib.BatchNorm2d(3, dtype=layer_dtype))
            with torch.autocast("cpu", dtype=dtype):
                return attempt(layer, batch(4, 3, 2, 2).to(input_dtype)), state(layer)

        return {(a, b): caught(run, a, b) for a in (torch.bfloat16, torch.float16) for b in FLOATS}


@situation("autocast: switched off inside")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        return step(layer, batch(4, 3, 2, 2))


@situation("autocast: convolution, layer, convolution", scale=1e4)
def _(lib):
    model = lib.switch(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(batch(4, 3, 4, 4))
    y.float().pow(2).mean().backward()
    return y.dtype, y.shape, [p.grad.dtype for p in model.parameters()], model[1].running_mean


@situation("set_default_dtype: a layer made meanwhile")
def _(lib):
    torch.set_default_dtype(torch.float64)
    try:
        layer = numbered(lib.BatchNorm2d(3))
        return step(layer, batch(4, 3, 2, 2).double()), caught(attempt, layer, batch(4, 3, 2, 2))
    finally:
        torch.set_default_dtype(torch.float32)


@situation("set_default_dtype: a float32 layer used meanwhile")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    torch.set_default_dtype(torch.float64)
    try:
        return step(layer, batch(4, 3, 2, 2))
    finally:
        torch.set_default_dtype(torch.float32)


@situation("set_default_device: a layer made and used meanwhile")
def _(lib):
    torch.set_default_device("meta")
    try:
        layer = lib.BatchNorm2d(3)
        return layer(torch.randn(4, 3, 2, 2)), state(layer)
    finally:
        torch.set_default_device(None)


@situation("device context: torch.device('meta')")
def _(lib):
    with torch.device("meta"):
        layer = lib.BatchNorm2d(3)
        return [layer(torch.randn(4, 3, 2, 2)), layer.eval()(torch.randn(4, 3, 2, 2))]


@situation("meta: a step")
def _(lib):
    layer = lib.BatchNorm2d(3, device="meta")
    x = torch.empty(4, 3, 2, 2, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    return y, x.grad, layer.weight.grad, state(layer)


@situation("meta: evaluation, channels_last, half precision")
def _(lib):
    layer = lib.BatchNorm2d(3, device="meta").eval()
    x = torch.empty(4, 3, 2, 2, device="meta").to(memory_format=torch.channels_last)
    return layer(x), layer.half()(x.half())


@situation("meta: wrong sizes")
def _(lib):
    layer = lib.BatchNorm2d(3, device="meta")
    return [
        caught(layer, torch.empty(size, device="meta"))
        for size in [(4, 5, 2, 2), (4, 3), (1, 3, 1, 1), (0, 3, 2, 2)]
    ]


for name in ("input", "running_mean", "running_var", "weight", "bias"):

    @situation(f"batch_norm: {name} alone on meta")
    def _(lib, name=name):
        size = (4, 3, 2, 2) if name == "input" else (3,)
        return {
            t: caught(lambda t=t: call(lib, **{name: torch.ones(size, device="meta")}, training=t))
            for t in (True, False)
        }


@situation("to_empty() and reset_parameters() of a layer on meta")
def _(lib):
    layer = lib.BatchNorm2d(3, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    return state(layer), step(layer, batch(4, 3, 2, 2))


@situation("layer moved to meta")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3)).to("meta")
    return state(layer), layer(torch.empty(4, 3, 2, 2, device="meta"))


@situation("layer on meta moved with to()")
def _(lib):
    return caught(lib.BatchNorm2d(3, device="meta").to, "cpu")
