"""Sizes, options and missing arguments of the layers and of the function."""

import torch

from situations.harness import attempt, caught, situation, unchanged
from situations.parts import affine, arguments, batch, numbered, state, statistics, step

SIZES = [(), (3,), (4, 3), (4, 3, 5), (4, 3, 2, 2), (2, 3, 2, 2, 2), (2, 3, 2, 2, 2, 2)]


def call(lib, **changed):
    """``batch_norm`` with changed arguments: the output, and the running statistics after it."""
    given = arguments(**changed)
    with unchanged(**given):
        y = lib.batch_norm(**given)
    return {"y": y, "running_mean": given["running_mean"], "running_var": given["running_var"]}


for kind in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"):

    @situation(f"{kind}: inputs of 0 to 6 dimensions")
    def _(lib, kind=kind):
        return {
            size: caught(lambda s=size: attempt(getattr(lib, kind)(3), batch(*s))) for size in SIZES
        }

    @situation(f"{kind}: inputs of 0 to 6 dimensions in evaluation")
    def _(lib, kind=kind):
        return {
            size: caught(lambda s=size: attempt(numbered(getattr(lib, kind)(3)).eval(), batch(*s)))
            for size in SIZES
        }

    @situation(f"{kind}: three steps and an evaluation")
    def _(lib, kind=kind):
        layer = numbered(getattr(lib, kind)(3))
        size = {"BatchNorm1d": (4, 3, 5), "BatchNorm3d": (2, 3, 2, 2, 2)}.get(kind, (4, 3, 2, 2))
        steps = [step(layer, batch(*size) + i) for i in range(3)]
        return steps, layer.eval()(batch(*size))


@situation("batch_norm: inputs of 0 to 6 dimensions")
def _(lib):
    return {
        (size, training): caught(lambda s=size, t=training: call(lib, input=batch(*s), training=t))
        for size in SIZES
        for training in (True, False)
    }


@situation("batch_norm: inputs of 0 to 6 dimensions without statistics and parameters")
def _(lib):
    return {
        size: caught(lib.batch_norm, batch(*size), None, None, None, None, True) for size in SIZES
    }


@situation("(N, C) and (N, C, L) through one BatchNorm1d")
def _(lib):
    layer = numbered(lib.BatchNorm1d(3))
    return step(layer, batch(6, 3)), step(layer, batch(6, 3, 5))


@situation("one value per channel in training")
def _(lib):
    return [
        caught(attempt, lib.BatchNorm1d(3), batch(1, 3)),
        caught(attempt, lib.BatchNorm1d(3), batch(1, 3, 1)),
        caught(attempt, lib.BatchNorm2d(3), batch(1, 3, 1, 1)),
        caught(attempt, lib.BatchNorm3d(3), batch(1, 3, 1, 1, 1)),
        caught(attempt, lib.SyncBatchNorm(3), batch(1, 3, 1, 1)),
        caught(attempt, lib.BatchNorm1d(3, momentum=None), batch(1, 3)),
        caught(attempt, lib.BatchNorm1d(3, affine=False, track_running_stats=False), batch(1, 3)),
    ]


@situation("one value per channel in evaluation")
def _(lib):
    return step(numbered(lib.BatchNorm2d(3)).eval(), batch(1, 3, 1, 1))


@situation("one value per channel in evaluation without buffers")
def _(lib):
    return attempt(lib.BatchNorm2d(3, track_running_stats=False).eval(), batch(1, 3, 1, 1))


@situation("one sample of several values")
def _(lib):
    return step(numbered(lib.BatchNorm2d(3)), batch(1, 3, 2, 2))


@situation("one channel")
def _(lib):
    return step(numbered(lib.BatchNorm2d(1)), batch(4, 1, 2, 2))


@situation("empty batch in training")
def _(lib):
    return step(numbered(lib.BatchNorm2d(3)), batch(0, 3, 2, 2))


@situation("empty batch in evaluation")
def _(lib):
    return step(numbered(lib.BatchNorm2d(3)).eval(), batch(0, 3, 2, 2))


@situation("empty images")
def _(lib):
    return {
        training: caught(step, numbered(lib.BatchNorm2d(3)).train(training), batch(4, 3, 0, 2))
        for training in (True, False)
    }


@situation("no channels")
def _(lib):
    def run(kind, *size, training=True):
        return caught(lambda: attempt(getattr(lib, kind)(0).train(training), batch(*size)))

    return {
        "training": run("BatchNorm2d", 4, 0, 2, 2),
        "evaluation": run("BatchNorm2d", 4, 0, 2, 2, training=False),
        "(N, 0)": run("BatchNorm1d", 4, 0),
        "sync": run("SyncBatchNorm", 4, 0, 2, 2),
        "without running statistics": caught(
            lib.batch_norm, batch(4, 0, 2, 2), None, None, None, None, True
        ),
    }


@situation("no channels, backward")
def _(lib):
    return step(lib.BatchNorm2d(0), batch(4, 0, 2, 2))


@situation("another number of channels")
def _(lib):
    return {
        (options, training): caught(
            lambda o=options, t=training: attempt(
                lib.BatchNorm2d(3, **dict(o)).train(t), batch(4, 5, 2, 2)
            )
        )
        for options in [
            (),
            (("affine", False),),
            (("track_running_stats", False),),
            (("affine", False), ("track_running_stats", False)),
        ]
        for training in (True, False)
    }


for name in ("running_mean", "running_var", "weight", "bias"):

    @situation(f"batch_norm: {name} of another size")
    def _(lib, name=name):
        return {
            (size, training): caught(
                lambda s=size, t=training: call(lib, **{name: torch.ones(s)}, training=t)
            )
            for size in [(2,), (4,), (0,), (1,), ()]
            for training in (True, False)
        }

    @situation(f"batch_norm: {name} of more dimensions")
    def _(lib, name=name):
        return {
            (size, training): caught(
                lambda s=size, t=training: call(lib, **{name: torch.ones(s)}, training=t)
            )
            for size in [(1, 3), (3, 1), (3, 1, 1), (1, 3, 1, 1)]
            for training in (True, False)
        }

    @situation(f"batch_norm: without {name}")
    def _(lib, name=name):
        return {
            training: caught(lambda t=training: call(lib, **{name: None}, training=t))
            for training in (True, False)
        }

    @situation(f"batch_norm: {name} is no tensor")
    def _(lib, name=name):
        return {
            str(value): caught(lambda v=value: call(lib, **{name: v}))
            for value in (1.0, [1.0, 1.0, 1.0])
        }


@situation("batch_norm: neither running statistic")
def _(lib):
    return {
        training: caught(
            lambda t=training: call(lib, running_mean=None, running_var=None, training=t)
        )
        for training in (True, False)
    }


@situation("batch_norm: positional arguments and defaults")
def _(lib):
    x, (mean, var), (weight, bias) = batch(4, 3), statistics(), affine()
    return [
        lib.batch_norm(x, mean, var),
        lib.batch_norm(x, mean, var, weight),
        lib.batch_norm(x, mean, var, weight, bias),
        lib.batch_norm(x, mean, var, weight, bias, True),
        lib.batch_norm(x, mean, var, weight, bias, True, 0.5),
        lib.batch_norm(x, mean, var, weight, bias, False, 0.5, 1e-2),
        mean,
        var,
    ]


@situation("batch_norm: input is no tensor")
def _(lib):
    return [
        caught(lib.batch_norm, value, *statistics())
        for value in (None, 1.0, [[1.0, 2.0, 3.0]], "x")
    ]


@situation("layer: input is no tensor")
def _(lib):
    return [caught(lib.BatchNorm1d(3), value) for value in (None, 1.0, [[1.0, 2.0, 3.0]], "x")]


@situation("layer: no input, two inputs, an unknown keyword")
def _(lib):
    layer, x = lib.BatchNorm1d(3), batch(4, 3)
    return [caught(layer), caught(layer, x, x), caught(lambda: layer(x, mask=x)), layer(input=x)]


@situation("constructor: wrong arguments")
def _(lib):
    return [
        caught(lib.BatchNorm2d),
        caught(lib.BatchNorm2d, -1),
        caught(lib.BatchNorm2d, "3"),
        caught(lib.BatchNorm2d, None),
        caught(lib.BatchNorm2d, 3.0),
        caught(lambda: lib.BatchNorm2d(3, dtype=torch.int64)),
        caught(lambda: lib.BatchNorm2d(3, device="nowhere")),
        caught(lambda: lib.BatchNorm2d(3, inplace=True)),
    ]


@situation("constructor: every argument by position")
def _(lib):
    layer = lib.BatchNorm2d(3, 1e-3, 0.2, True, True, "cpu", torch.float64)
    return repr(layer), state(layer), layer(batch(4, 3, 2, 2).double())


@situation("values: NaN and infinity stay in their channel")
def _(lib):
    x = batch(4, 3, 2, 2)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = torch.nan, torch.inf
    return step(numbered(lib.BatchNorm2d(3)), x)


# The spread is zero, and native's mean has an error of a rounding, which is divided by sqrt(eps).
@situation("values: a constant channel", scale=1e-5**-0.5)
def _(lib):
    x = batch(4, 3, 2, 2)
    x[:, 1] = 3.0
    return step(numbered(lib.BatchNorm2d(3)), x)


# Native on one thread adds up the terms one by one: a sum has as many roundings as terms.
@situation("values: many samples of few channels", scale=4 * 20000)
def _(lib):
    return step(numbered(lib.BatchNorm1d(2)), batch(20000, 2))


@situation("values: few samples of many channels")
def _(lib):
    return step(
        lib.BatchNorm1d(5000),
        torch.tensor([[-1.0], [0], [1]])
        + batch(3, 1).expand(3, 5000) * torch.arange(5000).sin() / 8,
    )
