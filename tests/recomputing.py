"""Steps of networks whose norms compute their outputs again, and what is kept and said."""

import copy
from contextlib import nullcontext
from functools import partial

from activations import C
from batchnorm_ext import recompute_activations
from keeping import kept_bytes
from support import assert_bitwise

everything = partial(recompute_activations, 1)  # with more to look at than the default
SIZE = (4, C, 16, 16)
BYTES = 4 * 4 * C * 16 * 16  # of a float32 tensor of that size


def step(model, x, context=nullcontext):
    model = copy.deepcopy(model)
    with context():
        loss = model(x).float().square().mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach()} | gradients | dict(model.named_buffers())


def assert_same_steps(model, x, context=everything):
    expected, actual = step(model, x), step(model, x, context)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert_bitwise(name, actual[name], value)


def tensors_kept(run, context=everything, given=()):
    """In units of a tensor of SIZE."""
    return round(kept_bytes(run, given, context) / BYTES, 1)


def logged(caplog):
    """By this library; the compiler logs as well."""
    return [record.message for record in caplog.records if record.name == "batchnorm_ext"]
