"""What fusing leaves alone, and why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import batchnorm_ext
from fusing import (
    C,
    assert_fuses,
    assert_leaves,
    assert_same,
    block,
    conv,
    image,
    norm,
    pair,
    randomized,
)

pytestmark = pytest.mark.only("cpu", reason="of forwards alone")


def _returned(m, x):
    y = m.bn1(m.conv1(x))
    return m.relu(y), y


def _used_later(m, x):
    y = m.bn1(m.conv1(x))
    return m.conv2(m.relu(y)) + y


def _sum_used_later(m, x):
    y = m.bn1(m.conv1(x)) + x
    return m.conv2(m.relu(y)) + y


def _written_and_needed(m, x):
    """The ReLU in place changes what is added afterwards."""
    y = m.bn1(m.conv1(x))
    z = y.view(-1)
    F.relu(y, inplace=True)
    return z.sum() + y


def _written_shortcut(m, x):
    """The sum is written into a value that is used again."""
    y = m.conv1(x)
    y += m.bn1(y * 1)
    return m.conv2(y.relu()) + y.view(-1)[0]


# Values that others see


@pytest.mark.parametrize(
    "run, reason",
    [
        (_returned, "used by relu (ReLU), the output"),
        (_used_later, "used by relu (ReLU), add"),
        (_written_and_needed, "used by view, relu"),
        (lambda m, x: m.bn1(m.conv1(x)), "returned"),
        (lambda m, x: (m.bn1(m.conv1(x)), m.conv2(x))[1], "not used"),
        (lambda m, x: m.conv2(m.bn1(m.conv1(x))), "before conv2 (Conv2d)"),
        (lambda m, x: m.relu(2 + m.bn1(m.conv1(x))), "the addition of a number"),
        (lambda m, x: F.relu(torch.add(m.bn1(x), x, alpha=2)), "a scaled addition"),
        (lambda m, x: F.relu(torch.add(x, m.bn1(x), alpha=0.5)), "a scaled addition"),
        (lambda m, x: m.bn1(m.conv1(x)).add(x, alpha=3).relu(), "a scaled addition"),
        (lambda m, x: (lambda y: F.relu(y + y))(m.bn1(x)), "the addition of a value to itself"),
        (lambda m, x: F.softplus(m.bn1(m.conv1(x))), "before softplus"),
        (lambda m, x: F.relu(m.bn1(m.conv1(x)) * x), "before mul"),
        (lambda m, x: F.relu(m.bn1(m.conv1(x)) + m.bn1.bias.view(-1, 1, 1)), "read by the forward"),
    ],
)
def test_values_that_are_used_otherwise(run, reason):
    assert_leaves(block(run), reason)


def test_addition_alone_is_fused_where_the_sum_is_used_twice():
    assert_fuses(block(_sum_used_later, bn2=None), image(), 1)
    assert_leaves(block(_written_shortcut), "added in place to conv1 (Conv2d)")
    run = block(lambda m, x: x.add_(m.bn1(m.conv1(x))).relu())
    assert_leaves(run, "added in place to x", backward=False)  # the convolution needs what x was


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("name", ["bn1", "relu"])
def test_hooks(kind, name):
    model = block(lambda m, x: m.relu(m.bn1(m.conv1(x))))
    calls = []
    getattr(model.get_submodule(name), f"register_{kind}_hook")(lambda *args: calls.append(0))
    assert_leaves(model, "hooks")
    assert len(calls) == 2  # of both models
    model = nn.Sequential(conv(), norm(), nn.ReLU())
    getattr(model[1 if name == "bn1" else 2], f"register_{kind}_hook")(lambda *args: None)
    assert_leaves(model, "hooks", "1")


def test_hooks_of_what_is_around():
    model = block(lambda m, x: m.relu(m.around(x)), bn1=None, around=nn.Sequential(conv(), norm()))
    model.around.register_forward_hook(lambda *args: None)
    assert_leaves(model, "before the end", "around.1")


# What may be written to in between


def test_input_of_the_norm_is_written_to_before_the_sum():
    def run(m, x):
        y = m.bn1(x)
        x.mul_(2)
        return F.relu(y + x)

    assert_leaves(block(run), "mul_ comes before the sum and may write", backward=False)

    def by_module(m, x):
        return F.relu(m.bn1(x) + m.write(x))

    model = block(by_module, write=nn.ReLU(inplace=True))
    assert_leaves(model, "write (ReLU) comes before the sum and may write", backward=False)


def test_statistics_of_the_norm_are_used_before_the_sum():
    run = block(lambda m, x: F.relu(m.bn1(x) + m.conv2(m.bn1(m.conv1(x)))))
    assert_leaves(run, "bn1 (BatchNorm2d) comes before the sum and uses what the norm uses")


def test_values_that_the_backward_needs_are_written_to():
    def output(m, x):
        y = F.relu6(m.bn1(m.conv1(x)) + x)
        return m.conv2(y * 1) + y.mul_(2)

    assert_leaves(block(output), "mul_ may write to what the backward of the sum needs")

    def residual(m, x):
        shortcut = m.conv2(x)
        return F.silu(m.bn1(m.conv1(x)) + shortcut) + shortcut.mul_(2)

    assert_leaves(block(residual), "mul_ may write to what the backward of the sum needs")


# Layers


def test_layers_that_have_no_fused_form():
    own = type("Own", (nn.BatchNorm2d,), {})(C)
    for layer, reason in (
        (own, "is no graph: it is torch's own"),
        (nn.LayerNorm(8), "has no fused form"),
        (nn.SyncBatchNorm(C), "has no fused form"),
        (parametrizations.weight_norm(norm(), "weight"), "not called"),
    ):
        model = randomized(nn.Sequential(conv(), layer, nn.ReLU()))
        _, report = batchnorm_ext.fuse(model, report=True)
        assert report.done == {} and reason in report.left["1"]
    tracked = nn.InstanceNorm2d(C, track_running_stats=True)
    model, fused, _ = pair(nn.Sequential(conv(), tracked, nn.ReLU()))
    assert_same(fused, model, image())


class Backwards(nn.Sequential):
    def __iter__(self):
        return iter([*self._modules.values()][::-1])


class Tripled(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x) * 3


@pytest.mark.parametrize(
    "model",
    [
        Backwards(conv(), norm(), nn.ReLU()),
        Tripled(nn.Sequential(Tripled(conv(), norm()), nn.ReLU()), conv()),
    ],
)
def test_subclasses_of_sequential_that_are_called_otherwise(model):
    model, fused, _ = pair(model)
    assert_same(fused, model, image())


def test_scripted_layers_are_left():
    scripted = torch.jit.script(nn.Sequential(conv(), norm(), nn.ReLU()))
    model = randomized(nn.Sequential(scripted, conv(), norm(), nn.ReLU()))
    _, report = batchnorm_ext.fuse(model, report=True)
    assert list(report.done) == ["2"]


def test_subclass_whose_forward_is_a_graph():
    """As timm's BatchNormAct2d, but for the name."""

    class BatchNormAct(nn.BatchNorm2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.drop, self.act = nn.Identity(), nn.LeakyReLU(0.1, inplace=True)

        def forward(self, x):
            torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
            factor = 0.0 if self.momentum is None else self.momentum
            if self.training and self.track_running_stats and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if self.momentum is None:
                    factor = 1.0 / float(self.num_batches_tracked)
            training = self.training or (self.running_mean is None and self.running_var is None)
            tracked = not self.training or self.track_running_stats
            mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
            affine = self.weight, self.bias
            x = F.batch_norm(x, mean, var, *affine, training, factor, self.eps)
            return self.act(self.drop(x))

    fused = assert_fuses(nn.Sequential(conv(), BatchNormAct(C)), image(), 1)
    fused[1].drop = nn.Softplus()
    assert_same(fused, batchnorm_ext.revert(copy.deepcopy(fused)), image())
    layer = BatchNormAct(C)
    layer.momentum = None
    assert_leaves(nn.Sequential(conv(), layer), "is no graph: ", "1")


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.ReLU6(), nn.Hardtanh(-1, 2)])
def test_outputs_that_a_caller_writes_to(activation):
    """PyTorch's backward reads the input of these, ours the output."""

    def run(m, x):
        return m.relu(m.bn1(m.conv1(x)) + x)

    def model():
        return nn.Sequential(block(run, relu=activation, bn2=None), nn.ReLU(True)).double()

    fused, report = batchnorm_ext.fuse(model(), report=True)
    assert list(report.left) == ["0.bn1"] and "write" in report.left["0.bn1"]
    fused(image()).sum().backward()
    activation.inplace = True
    assert batchnorm_ext.fuse(model(), report=True)[1].done
