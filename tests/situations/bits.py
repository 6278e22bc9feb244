"""Views whose values are those of the memory negated or conjugated."""

import torch

from situations.family import IMAGE, SCALE
from situations.harness import caught, situation
from situations.parts import batch, weights_of

VIEWS = {
    "negated": lambda t: torch._neg_view(-t),
    "imaginary part of a conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "conjugate": lambda t: torch.complex(t, t).conj(),
}
CALLS = {
    "batch_norm": lambda f, x, use, **o: f(x, training=use, **o),
    "instance_norm": lambda f, x, use, **o: f(x, use_input_stats=use, **o),
    "group_norm": lambda f, x, use, **o: f(x, 3, **o),
    "layer_norm": lambda f, x, use, **o: f(x, (3, 2), **o),
    "rms_norm": lambda f, x, use, **o: f(x, (3, 2), **o),
}
STATISTICS = ("running_mean", "running_var")


def _arguments(name: str) -> dict[str, torch.Tensor]:
    shape = (3, 2) if name in ("layer_norm", "rms_norm") else (6,)
    values = {"x": batch(*IMAGE), "dy": weights_of(batch(*IMAGE)), "weight": batch(*shape)}
    if name != "rms_norm":
        values["bias"] = batch(*shape).cos()
    if name in ("batch_norm", "instance_norm"):
        values |= {"running_mean": torch.arange(6.0), "running_var": 1 + torch.arange(6.0)}
    return values


def _run(lib, name, argument, view, use, graph):
    """Output and gradients, and the running statistics, whose views stay what they are."""
    given = _arguments(name)
    given[argument] = view(given[argument])
    leaves = [given[n] for n in ("x", "weight", "bias") if n in given]
    for leaf in leaves:
        leaf.requires_grad_()
    x, dy = given.pop("x"), given.pop("dy")
    y = CALLS[name](getattr(lib, name), x, use, **given)
    gradients = torch.autograd.grad(y, leaves, dy, create_graph=graph)
    statistics = [given[n] for n in STATISTICS if n in given]
    return y, [g.detach() for g in gradients], [(s, s.is_neg()) for s in statistics]


for name in CALLS:
    for argument in _arguments(name):
        for what, view in VIEWS.items():

            @situation(f"{name}: {argument} is a view, {what}", scale=SCALE)
            def _(lib, name=name, argument=argument, view=view):
                return {
                    (use, graph): caught(_run, lib, name, argument, view, use, graph)
                    for use in (True, False)
                    for graph in (False, True)
                }


for name in ("batch_norm", "instance_norm"):
    for argument in STATISTICS:

        @situation(f"{name}: {argument} is a negated view that requires a gradient")
        def _(lib, name=name, argument=argument):
            def view(t):
                return torch._neg_view(-t).requires_grad_()

            return [caught(_run, lib, name, argument, view, use, False) for use in (True, False)]


@situation("batch_norm: both running statistics are negated views")
def _(lib):
    mean, var = torch._neg_view(-torch.arange(6.0)), torch._neg_view(-torch.ones(6))
    with torch.inference_mode():
        y = lib.batch_norm(batch(*IMAGE), mean, var, training=False)
    return y, lib.instance_norm(batch(*IMAGE), mean, var), mean, var
