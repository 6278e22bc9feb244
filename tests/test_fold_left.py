"""What folding leaves alone, and why; and what it does to the model besides."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import batchnorm_ext
from batchnorm_ext import _weights, fold
from support import assert_bitwise, assert_within
from test_fold import EXACT, C, assert_folds, assert_leaves, image, norm_of, randomize

pytestmark = pytest.mark.only("cpu", reason="of the parameters alone")


class Model(nn.Module):
    """A convolution and a norm, with a forward that tests give it."""

    def __init__(self, run, conv=None, norm=None):
        super().__init__()
        self.run = run
        self.conv = conv or nn.Conv2d(C, C, 1)
        self.norm = norm or batchnorm_ext.BatchNorm2d(C)

    def forward(self, x):
        return self.run(self, x)


def pair(conv=None, norm=None):
    return randomize(nn.Sequential(conv or nn.Conv2d(C, C, 1), norm or norm_of("Batch", 2)))


def test_norms_that_are_no_affine_map():
    def flag_changed():
        norm = norm_of("Instance", 2)
        norm.track_running_stats = False
        return norm

    of_input = "normalizes with the statistics of its input"
    for norm, reason in (
        (norm_of("Batch", 2, track_running_stats=False), of_input),
        (nn.InstanceNorm2d(C), of_input),
        (flag_changed(), of_input),
        (nn.GroupNorm(2, C), of_input),
        (batchnorm_ext.LayerNorm(C), of_input),
        (parametrizations.weight_norm(norm_of("Batch", 2), "weight"), "parametrized"),
        (type("Own", (nn.BatchNorm2d,), {})(C), "a subclass"),
    ):
        assert_leaves(nn.Sequential(nn.Conv2d(C, C, 1), norm).eval(), reason)
    model = pair()
    model[1].train()
    with pytest.warns(UserWarning, match=r"not folded: 1: in training mode: call model.eval\(\)"):
        assert_leaves(model, "in training mode: call model.eval() first")
    model = pair()
    model[1].forward = torch.relu
    assert_leaves(model, "a forward of its own")


def test_layers_that_are_not_plain():
    tied = nn.Conv2d(C, C, 1)
    for layer, reason in (
        (type("Own", (nn.Conv2d,), {})(C, C, 1), "0 (test_fold_left.Own): a subclass"),
        (parametrizations.weight_norm(nn.Conv2d(C, C, 1)), "parametrized"),
        (batchnorm_ext.weight_norm(nn.Conv2d(C, C, 1)), "parametrized"),
        (nn.ReLU(), "before it 0 (ReLU)"),
        (nn.Conv2d(C, C, 1, dtype=torch.complex64), "its weight has dtype torch.complex64"),
        (nn.Conv2d(C, 8, 1), "has 8 channels, the norm 4"),
        (nn.Conv3d(C, C, 1), "another dimension than those of BatchNorm2d"),
        (nn.Linear(C, C), "another dimension than those of BatchNorm2d"),
    ):
        assert_leaves(nn.Sequential(layer, norm_of("Batch", 2)).eval(), reason)
    model = pair(tied)
    model.append(nn.Conv2d(C, C, 1))
    model[2].weight = tied.weight
    assert_leaves(model, "0 (Conv2d): shares parameters with another module")


@pytest.mark.filterwarnings("ignore:.*deprecated")  # torch's own
def test_layers_whose_weights_cannot_be_read():
    pruned = prune.random_unstructured(nn.Conv2d(C, C, 1), "weight", 0.5)
    quantized = torch.ao.nn.quantized.Conv2d(C, C, 1)
    for layer, norm, reason in (
        (pruned, norm_of("Batch", 2), "0 (Conv2d) and after that a hook of 0"),
        (quantized, norm_of("Batch", 2), "before it 0 (torch.ao.nn.quantized.modules.conv.Conv2d)"),
        (nn.Conv2d(C, C, 1), nn.LazyBatchNorm2d(), "lazy: run it once first"),
        (nn.Conv2d(C, C, 1, device="meta"), norm_of("Batch", 2), "its parameters have no values"),
    ):
        model = nn.Sequential(layer, norm).eval()
        _, report = fold(model, inplace=True, report=True)
        assert report.done == {} and reason in report.left["1"]


def test_dropout_in_training_between():
    model = pair()
    model.insert(1, nn.Dropout2d())
    assert_leaves(model, "before it 1 (Dropout2d), after it the output", "2")


def test_half_that_would_overflow():
    model = pair().half()
    nn.init.constant_(model[0].weight, 6e4)
    nn.init.constant_(model[1].weight, 2.0)
    assert_leaves(model, "the folded weights are not finite in float16")


# Linear layers and the dimension of the channels


def test_linear_of_sequences():
    """BatchNorm1d takes the channels of (N, C, L) from the middle."""
    model = randomize(nn.Sequential(nn.Linear(C, 6), norm_of("Batch", 1)))
    model(torch.randn(2, C, C, dtype=torch.float64))
    assert_leaves(model, "has 6 channels, the norm 4")
    model = randomize(
        nn.Sequential(nn.Linear(C, C), nn.InstanceNorm1d(C, track_running_stats=True))
    )
    assert_leaves(model, "another dimension than those of InstanceNorm1d")
    for layers in ([nn.Linear(C, C), norm_of("Batch", 1)], [norm_of("Sync", 1), nn.Linear(C, C)]):
        folded = assert_folds(randomize(nn.Sequential(*layers)), image(0), 1)
        with pytest.raises(ValueError, match=r"expected 2D input \(got 3D input\): the norm here"):
            folded(torch.randn(2, C, C, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_folded_linear_is_exported_and_scripted():
    model = fold(randomize(nn.Sequential(nn.Linear(C, C), norm_of("Batch", 1))))
    x = image(0)
    for exported in (torch.export.export(model, (x,)).module(), torch.jit.script(model)):
        assert_within("output", exported(x), model(x), EXACT)


# Values that others see


@pytest.mark.parametrize(
    "run, reason",
    [
        (
            lambda m, x: m.norm(y := m.conv(x)) + y,
            "after that norm (BatchNorm2d), the function add",
        ),
        (lambda m, x: (m.norm(y := m.conv(x)), y), "after that norm (BatchNorm2d), the output"),
        (lambda m, x: m.norm(m.conv(x).relu()), "before it the method relu, after it the output"),
        (lambda m, x: m.norm(m.conv(m.conv(x))), "conv (Conv2d): called 2 times"),
        (lambda m, x: m.norm(m.norm(m.conv(x))), "called 2 times"),
        (lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum(), "conv (Conv2d): read by"),
        (lambda m, x: m.norm(m.conv(x)) + m.norm.running_mean.sum(), "read by the forward"),
        (lambda m, x: m.norm(vars(m).setdefault("y", m.conv(x))), "an attribute of the model"),
        (lambda m, x: m.conv(x), "not called in evaluation"),
        (lambda m, x: m.norm(torch.relu(x)), "before it the function relu, after it the output"),
    ],
)
def test_graph(run, reason):
    model = randomize(Model(run))
    assert_leaves(model, reason, "norm")
    assert "y" not in vars(model)


def test_graph_with_the_default_of_optional_arguments():
    class Optional(Model):
        def forward(self, x, mask=None):
            y = self.conv(x)
            return self.norm(y) + y if mask is None else self.norm(y) * mask

    assert_leaves(randomize(Optional(None)), "the function add", "norm")


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("name", ["conv", "norm", "around_conv", "around_norm"])
def test_hooks(kind, name):
    class Around(Model):
        def __init__(self):
            super().__init__(None)
            self.around_conv = nn.Sequential(self.conv)
            self.around_norm = nn.Sequential(self.norm)

        def forward(self, x):
            return self.around_norm(self.around_conv(x))

    calls = []
    model = randomize(Around())
    hooked = model.get_submodule(name)
    getattr(hooked, f"register_{kind}_hook")(lambda *args: calls.append(args))
    assert_leaves(model, f"a hook of {name}", "norm")
    assert not calls


def test_hooks_around_a_pair():
    model = nn.Sequential(pair(), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert_folds(model, image(2), 1)
    assert_within("seen by the hook", seen[1], seen[0], EXACT * seen[0].abs().max())


# Where torch.fx does not trace


def untraceable(model):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else self.inner(-x)

    return Branches().eval()


def test_neighbours_in_sequential():
    model = untraceable(nn.Sequential(*pair(), nn.ReLU(), pair(), Model(None)))
    model.inner[4].run = lambda m, x: x
    folded, report = fold(randomize(model), report=True)
    assert report.done == {
        "inner.1": "into inner.0 (Conv2d)",
        "inner.3.1": "into inner.3.0 (Conv2d)",
    }
    assert report.left == {"inner.4.norm": "not in an nn.Sequential"}
    note = "only neighbours in nn.Sequential were tried: torch.fx cannot trace the model"
    assert report.note.startswith(f"{note} (TraceError: symbolically traced variables")
    assert str(report).startswith("folded 2 of 3 layers\n  folded inner.1 into inner.0 (Conv2d)\n")
    x = image(2)
    expected = model(x)
    assert_within("output", folded(x), expected, EXACT * expected.abs().max())


def test_sequential_with_hooks_or_shared_layers():
    assert_leaves(norm_of("Batch", 2).eval(), "not in an nn.Sequential", "the model")
    model = untraceable(pair())
    model.inner[0].register_forward_hook(lambda *args: None)
    assert_leaves(model, "before it inner.0 (Conv2d) and hooks, after it the end of", "inner.1")
    conv, norm, relu = nn.Conv2d(C, C, 1), norm_of("Batch", 2), nn.ReLU()
    model = untraceable(nn.Sequential(conv, norm, conv))
    assert_leaves(randomize(model), "inner.0 (Conv2d): in 2 places", "inner.1")
    model = untraceable(nn.Sequential(conv, norm, relu, norm))
    assert_leaves(randomize(model), "in 2 places", "inner.1")
    # conv and norm are no neighbours: relu is there twice, which named_children leaves out
    model = untraceable(nn.Sequential(relu, conv, relu, norm))
    assert_leaves(randomize(model), "before it inner.0 (ReLU)", "inner.3")


# The model


def test_original_is_untouched():
    model = randomize(nn.Sequential(nn.Conv2d(C, C, 1, bias=False), norm_of("Batch", 2)))
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert folded is not model and list(folded.state_dict()) == ["0.weight", "0.bias"]
    assert type(model[1]) is batchnorm_ext.BatchNorm2d and list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        assert_bitwise(name, value, before[name])


def test_in_place():
    model = nn.Sequential(pair(), nn.ReLU(), pair(nn.Conv2d(C, 3, 1), nn.GroupNorm(1, 3)))
    held = model[0][1]
    x, names = image(2), list(model.state_dict())
    expected = model(x)
    assert fold(model, inplace=True) is model
    assert type(held) is nn.Identity and model[0][1] is held and not held.training
    assert list(model.state_dict()) == [name for name in names if not name.startswith("0.1")]
    assert_within("output", model(x), expected, EXACT * expected.abs().max())
    assert_folds(model, x, 0, 1)  # nothing is left to fold


def test_layers_that_are_held_elsewhere():
    """A forward that goes through a list of its own once called the norm after it was folded."""
    model = randomize(Model(lambda m, x: m.parts[1](m.parts[0](x))))
    model.parts = [model.conv, model.norm]
    assert_folds(model, image(2), 1)


def test_an_error_leaves_a_model_as_it_was(monkeypatch):
    model = nn.Sequential(pair(), pair())
    rounded = _weights.Weights.rounded

    def fails_later(self, layer):
        if layer is model[1][0]:
            raise MemoryError
        return rounded(self, layer)

    monkeypatch.setattr(_weights.Weights, "rounded", fails_later)
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    with pytest.raises(MemoryError):
        fold(model, inplace=True)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for name, value in model.state_dict().items():
        assert_bitwise(name, value, before[name])


def test_tracing_changes_no_buffer():
    model = randomize(Model(lambda m, x: m.norm(m.conv(x)) + m.count.add_(1)))
    model.register_buffer("count", torch.zeros(()))
    _, report = fold(model, inplace=True, report=True)
    assert "norm" in report.done and model.count == 0
