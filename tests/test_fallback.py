"""What the kernels do not take goes to the native function, and a log line says so."""

import copy
import json
import logging
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import func, nn

import batchnorm_ext
import batchnorm_ext.functional as ours
from batchnorm_ext import _ops


class Labelled(torch.Tensor):
    """A tensor subclass with nothing of its own."""


def _forward_mode(module, x):
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.cos())))
        return y.primal, y.tangent


def _forward_mode_of_parameters(module, x):
    with forward_ad.dual_level():
        parameters = {n: forward_ad.make_dual(p, p.cos()) for n, p in module.named_parameters()}
        return forward_ad.unpack_dual(func.functional_call(module, parameters, x)).tangent


def _per_sample_gradients(module, x):
    def loss(parameters, sample):
        return func.functional_call(module, parameters, sample[None]).pow(3).sum()

    return func.vmap(func.grad(loss), (None, 0))(dict(module.named_parameters()), x)


def _vmap_over_parameters(module, x):
    parameters = {n: torch.stack([p, 2 * p]) for n, p in module.named_parameters()}
    return func.vmap(lambda p: func.functional_call(module, p, x))(parameters)


def _in_eval(run):
    return lambda module, x: run(module.eval(), x)


def _sum_of_cubes(module):
    return lambda x: module(x).pow(3).sum()


USES = {
    "forward mode": _forward_mode,
    "forward mode in eval": _in_eval(_forward_mode),
    "forward mode of parameters": _in_eval(_forward_mode_of_parameters),
    "jvp": _in_eval(lambda m, x: func.jvp(m, (x,), (x.cos(),))),
    "grad": _in_eval(lambda m, x: func.grad(_sum_of_cubes(m))(x)),
    "jacrev": _in_eval(lambda m, x: func.jacrev(lambda x: m(x).sum((0, 2, 3)))(x)),
    "hessian": _in_eval(lambda m, x: func.hessian(_sum_of_cubes(m))(x[:1, :, :1])),
    "linearize": _in_eval(lambda m, x: func.linearize(m, x)[1](x.cos())),
    "vmap": _in_eval(lambda m, x: func.vmap(m)(torch.stack([x, 2 * x]))),
    "vmap over parameters": _in_eval(_vmap_over_parameters),
    "per-sample gradients": _in_eval(_per_sample_gradients),
    "functionalize": lambda m, x: func.functionalize(m)(x),
    "mkldnn": _in_eval(lambda m, x: m(x.to_mkldnn()).to_dense()),
}
ERRORS = {
    "vmap in training": lambda m, x: func.vmap(m)(torch.stack([x, x])),
    "grad in training": lambda m, x: func.grad(_sum_of_cubes(m))(x),
    "complex": lambda m, x: m(x.cfloat()),
    "sparse": lambda m, x: m(x.to_sparse()),
    "sparse in eval": _in_eval(lambda m, x: m(x.to_sparse())),
}


def _pair(device):
    native = nn.BatchNorm2d(3, momentum=0.3).to(device)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.normal_()
        native.running_mean.normal_()
        native.running_var.uniform_(0.5, 2)
    return native, batchnorm_ext.convert(copy.deepcopy(native))


on_cpu = pytest.mark.only("cpu", reason="a layout of the CPU")


@pytest.mark.parametrize(
    "use", [pytest.param(use, marks=[on_cpu] if use == "mkldnn" else []) for use in USES]
)
def test_result_is_the_native_one(use, device):
    native, converted = _pair(device)
    x = torch.randn(2, 3, 4, 5, device=device)
    # mkldnn picks its own kernels, and the oracle of the rest is the same native function
    torch.testing.assert_close(USES[use](converted, x), USES[use](native, x))
    for name, buffer in native.named_buffers():
        torch.testing.assert_close(converted.get_buffer(name), buffer)


@pytest.mark.parametrize("use", ERRORS)
def test_error_is_the_native_one(use, device):
    native, converted = _pair(device)
    before = copy.deepcopy(converted.state_dict())
    x = torch.randn(2, 3, 4, 5, device=device)
    with pytest.raises(Exception) as expected:
        ERRORS[use](native, x)
    with pytest.raises(expected.type) as actual:
        ERRORS[use](converted, x)
    assert type(actual.value) is type(expected.value)
    assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]
    for name in ("running_mean", "running_var", "weight", "bias"):
        assert torch.equal(converted.state_dict()[name], before[name])


def test_function_falls_back_too(device):
    """Batch statistics under a transform, where a module would have to update its buffers."""
    x = torch.randn(4, 3, device=device)

    def run(batch_norm):
        normalize = _sum_of_cubes(lambda x: batch_norm(x, None, None, training=True))
        return func.hessian(normalize)(x), func.vmap(func.grad(normalize))(torch.stack([x, 2 * x]))

    torch.testing.assert_close(run(ours.batch_norm), run(nn.functional.batch_norm))


def test_meta_tensors():
    module = batchnorm_ext.BatchNorm2d(3, device="meta")
    x = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    y = module(x.requires_grad_())
    assert y.device.type == "meta" and y.shape == x.shape and y.stride() == x.stride()
    y.sum().backward()
    assert x.grad.shape == x.shape and module.weight.grad.shape == (3,)


def test_tensor_subclass_is_kept(device):
    native, converted = _pair(device)
    x = torch.randn(2, 3, 4, 5, device=device).as_subclass(Labelled)
    expected, actual = native(x), converted(x)
    assert type(actual) is type(expected) is Labelled
    torch.testing.assert_close(actual, expected)


def test_nothing_is_logged_for_what_the_kernels_take(caplog, device):
    _ops.log_once.cache_clear()  # or what another test has made it say would not be said again
    caplog.set_level(logging.DEBUG, logger="batchnorm_ext")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.randn(2, 3, 4, 5, device=device).to(dtype)
        batchnorm_ext.BatchNorm2d(3, device=device)(x).sum().backward()
    batchnorm_ext.BatchNorm2d(3, device="meta")(torch.empty(2, 3, 4, 5, device="meta"))
    assert not caplog.records


SCRIPT = """
import json, logging, torch
import batchnorm_ext
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
logger = logging.getLogger("batchnorm_ext")
logger.addHandler(handler)
logger.setLevel(logging.DEBUG)
module = batchnorm_ext.BatchNorm2d(3).eval()
x = torch.randn(2, 3, 4, 5)
for _ in range(3):
    module(x)
    torch.func.vmap(module)(x[None])
    with torch.autograd.forward_ad.dual_level():
        module(x)
    for bad in (x.to_mkldnn(), x.cfloat(), x.to_sparse()):
        try:
            module(bad)
        except NotImplementedError:
            pass
print(json.dumps(messages))
"""


def test_reason_is_logged_once():
    """In a process of its own, because a reason that was logged stays silent from then on."""
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    messages = json.loads(output.stdout)
    assert {level for level, _ in messages} == {"DEBUG"}
    for reason in ("torch.func", "forward-mode", "_mkldnn", "complex64", "sparse_coo"):
        assert sum(reason in text for _, text in messages) == 1, reason
    assert len(messages) == 5
