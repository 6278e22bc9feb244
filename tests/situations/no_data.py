"""Arguments that are refused where there is no data: meta and fake tensors, compilation."""

import re
from contextlib import nullcontext

import torch
from torch._subclasses import FakeTensorMode

from situations.family import IMAGE
from situations.harness import Raised, caught, situation
from situations.parts import batch

CALLS = {
    "batch_norm": lambda f, x, use, **o: f(x, x[0, :, 0, 0], x[1, :, 0, 0], training=use, **o),
    "instance_norm": lambda f, x, use, **o: f(
        x, x[0, :, 0, 0].clone(), x[1, :, 0, 0].clone(), use_input_stats=use, **o
    ),
    "group_norm": lambda f, x, use, **o: f(x, 3, **o),
    "layer_norm": lambda f, x, use, **o: f(x, (3, 2), **o),
    "rms_norm": lambda f, x, use, **o: f(x, (3, 2), **o),
}
EPS = [0.0, 0, -1e-5, -0.0, float("nan"), float("inf"), -float("inf"), None, "1e-5", True]
USES = (True, False)  # of the statistics of the input

for name, call in CALLS.items():
    for where in ("meta", "fake", "fake meta"):

        @situation(f"{name}: wrong eps, {where} tensors")
        def _(lib, name=name, call=call, where=where):
            def run(eps, use):
                with FakeTensorMode() if "fake" in where else nullcontext():
                    x = torch.empty(IMAGE, device="meta" if "meta" in where else "cpu")
                    y = call(getattr(lib, name), x, use, eps=eps)
                return y.shape, y.dtype, y.device

            return [(eps, use, caught(run, eps, use)) for eps in EPS for use in USES]

    @situation(f"{name}: wrong eps, compiled")
    def _(lib, name=name, call=call):
        def run(eps, use):
            torch._dynamo.reset()
            function = getattr(lib, name)
            compiled = torch.compile(lambda x: call(function, x, use, eps=eps), backend="eager")
            return _of_the_call(caught(compiled, batch(*IMAGE)))

        return [(eps, use, run(eps, use)) for eps in (0, -1e-5, float("nan"), None) for use in USES]


def _of_the_call(result):
    """Dynamo lists in its text the arguments as given, and the lines of the program."""
    if isinstance(result, Raised):
        result.text = re.sub("(?s).*: got (.*?)\n.*", r"\1", result.text)
    return result
