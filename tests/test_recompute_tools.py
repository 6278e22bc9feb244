"""Computing again beside other tools: checkpoints, hooks, autocast, DDP, compilers, threads."""

import copy
import itertools
import logging
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._C._autograd import _top_saved_tensors_default_hooks as top_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm_ext
import fusing
from activations import C
from batchnorm_ext import (
    BatchNorm2d,
    BatchNormAct2d,
    _recompute,
)
from fusing import conv
from recomputing import SIZE, assert_same_steps, everything, logged, step
from support import assert_bitwise

pytestmark = pytest.mark.usefixtures("no_hooks_are_left")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing(inside, use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(conv(3), BatchNormAct2d(6))
            self.block = nn.Sequential(conv(), BatchNormAct2d(6), conv(), BatchNormAct2d(6, "silu"))

        def run(self, x):
            with everything() if inside else nullcontext():
                return self.block(x).sin()

        def forward(self, x):
            return checkpoint(self.run, self.first(x), use_reentrant=use_reentrant).square()

    model, x = Checkpointed(), torch.randn(2, 3, 16, 16)
    expected = step(model, x)
    actual = step(model, x, everything)
    for name, value in expected.items():
        assert_bitwise(name, actual[name], value)


def test_other_hooks_win(caplog):
    _recompute.log_kept_once.cache_clear()
    caplog.set_level(logging.DEBUG, logger="batchnorm_ext")
    x, layer = torch.randn(SIZE, requires_grad=True), BatchNormAct2d(C)
    with torch.autograd.graph.save_on_cpu():
        hooks = top_hooks(True)
        for _ in range(2):
            with everything():
                assert top_hooks(True) == hooks
                layer(x).sin().sum().backward()
    assert logged(caplog) == [
        "recompute_activations has no effect within other hooks on saved tensors"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = batchnorm_ext.fuse(fusing.ResNet())
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype):
        assert_same_steps(model, x)
        assert_same_steps(nn.Sequential(BatchNormAct2d(3), conv(3), BatchNorm2d(6), conv()), x)


def train_ddp():
    torch.manual_seed(0)
    model, x = batchnorm_ext.fuse(fusing.ResNet()), torch.randn(2, 3, 16, 16)
    expected = step(model, x)
    actual = {}
    parallel = DistributedDataParallel(model)
    with everything():
        loss = parallel(x).float().square().mean()
    loss.backward()
    actual |= {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in actual.items():
        assert_bitwise(name, gradient, expected[name])


def test_data_parallel(ranks):
    ranks(1).run(train_ddp)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_code_ignores_it(inside, caplog, fresh_dynamo):
    _recompute.log_kept_once.cache_clear()
    caplog.set_level(logging.DEBUG, logger="batchnorm_ext")
    model, x = (
        nn.Sequential(conv(3), BatchNormAct2d(6), conv(), BatchNorm2d(6)),
        torch.randn(2, 3, 9, 9),
    )

    def run(x):
        with everything() if inside else nullcontext():
            return model(x)

    before = copy.deepcopy(model.state_dict())
    expected = run(x)
    expected.pow(3).mean().backward()  # of squares the norm leaves no gradient
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.load_state_dict(before), model.zero_grad(), caplog.clear()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with nullcontext() if inside else everything():
        compiled(x).pow(3).mean().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        # the last norm is PyTorch's own
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert logged(caplog) == [
        "recompute_activations has no effect in compiled code: the compiler decides what it "
        "computes again"
    ]


def test_it_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), everything():
        assert _recompute.recomputes()
        with everything():
            raise ZeroDivisionError
    assert not _recompute.recomputes()


def test_it_holds_for_one_thread():
    model, x = batchnorm_ext.fuse(fusing.ResNet()), torch.randn(2, 3, 16, 16)
    found, expected = {}, step(model, x)
    with everything():
        thread = threading.Thread(target=lambda: found.update(there=_recompute.recomputes()))
        thread.start(), thread.join()
    assert found == {"there": False}

    def work(i):
        found[i] = step(model, x, everything)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (name, value) in itertools.product(range(4), expected.items()):
        assert_bitwise(name, found[i][name], value)


def test_backward_in_several_threads():
    """All of them ask for the same output."""
    x = torch.randn(SIZE, requires_grad=True)
    with everything():
        y = BatchNormAct2d(C)(x * 1)
        loss = (y * y.sin()).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    found = [None] * 4

    def work(i):
        (found[i],) = torch.autograd.grad(loss, x, retain_graph=True)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gradient in found:
        assert_bitwise("dx", gradient, expected)
