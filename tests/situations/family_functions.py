"""The functions of the family, with arguments of every kind."""

import torch

from situations.family import IMAGE, SCALE
from situations.harness import caught, situation, unchanged
from situations.parts import batch

FUNCTIONS = {
    "instance_norm": (IMAGE, lambda f, x, **o: f(x, **o)),
    "group_norm": (IMAGE, lambda f, x, **o: f(x, 3, **o)),
    "layer_norm": (IMAGE, lambda f, x, **o: f(x, (3, 2), **o)),
    "rms_norm": (IMAGE, lambda f, x, **o: f(x, (3, 2), **o)),
}

for name, (size, call) in FUNCTIONS.items():
    shape = (6,) if name in ("instance_norm", "group_norm") else (3, 2)

    @situation(f"{name}: without and with parameters", scale=SCALE)
    def _(lib, name=name, size=size, call=call, shape=shape):
        function, weight, bias = getattr(lib, name), batch(*shape), batch(*shape).cos()
        given = [{}, {"weight": weight}]
        if name != "rms_norm":
            given += [{"bias": bias}, {"weight": weight, "bias": bias}]
        return [call(function, batch(*size), **options) for options in given]

    @situation(f"{name}: parameters that do not fit", scale=SCALE)
    def _(lib, name=name, size=size, call=call, shape=shape):
        function = getattr(lib, name)
        wrong = [torch.ones(4), torch.ones(1, *shape), torch.ones(shape).double(), "weight", 1.0]
        return [caught(lambda w=w: call(function, batch(*size), weight=w)) for w in wrong]

    @situation(f"{name}: eps of other types", scale=SCALE)
    def _(lib, name=name, size=size, call=call):
        function = getattr(lib, name)
        values = (None, 1, True, "1e-5", torch.tensor(1e-5), float("nan"))
        return [caught(lambda e=e: call(function, batch(*size), eps=e)) for e in values]


@situation("group_norm: numbers of groups")
def _(lib):
    values = (1, 2, 4, 6, 7, 0, -1, 2.0, True, None, "2", torch.tensor(2))
    return [caught(lib.group_norm, batch(*IMAGE), groups) for groups in values]


@situation("layer_norm and rms_norm: shapes", scale=SCALE)
def _(lib):
    values = ((2,), [3, 2], IMAGE, torch.Size([2]), (4,), (), 2, (2.0,), None, (5, *IMAGE))
    return [
        caught(function, batch(*IMAGE), shape)
        for function in (lib.layer_norm, lib.rms_norm)
        for shape in values
    ]


@situation("instance_norm: running statistics")
def _(lib):
    found = []
    for use in (True, False):
        for given in ("both", "mean", "var", "none"):
            tensors = {}
            if given in ("both", "mean"):
                tensors["running_mean"] = torch.arange(6.0)
            if given in ("both", "var"):
                tensors["running_var"] = 1 + torch.arange(6.0)

            def run(tensors=tensors, use=use):
                with unchanged(**tensors):
                    return lib.instance_norm(batch(*IMAGE), **tensors, use_input_stats=use)

            found.append((caught(run), tensors))
    return found
