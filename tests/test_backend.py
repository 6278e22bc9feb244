"""torch.compile(backend="batchnorm_ext"): the numbers of the model, fused calls in its graph."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

import batchnorm_ext
import batchnorm_ext.backend  # registers it, where no installed package says so
from fusing import (
    BasicBlock,
    C,
    DropPath,
    Model,
    PreActivation,
    ResNet,
    assert_same,
    block,
    conv,
    image,
    norm,
    randomized,
)
from test_fuse_spellings import ADDITIONS, FUNCTIONS, MODULES

pytestmark = [
    pytest.mark.only("cpu", reason="of the graph alone"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


@pytest.fixture
def reports(monkeypatch):
    """What the pass has done to each graph."""
    found = []

    def fuse_graph(graph_module):
        found.append(batchnorm_ext.fuse_graph(graph_module))
        return found[-1]

    monkeypatch.setattr(batchnorm_ext.backend, "fuse_graph", fuse_graph)
    return found


def compiled(model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    model = copy.deepcopy(model)
    model.compile(backend="batchnorm_ext", options={"backend": backend}, fullgraph=True)
    return model


def around(*layers: nn.Module) -> nn.Module:
    """In sequence, called by a forward that is not torch's own, which Dynamo would skip."""
    return Model(lambda m, x: m.layers(x), layers=nn.Sequential(*layers))


def assert_fuses(model, reports, done, left=0, x=None):
    x = image() if x is None else x
    assert_same(compiled(model), copy.deepcopy(model), x)
    (report,) = reports
    assert (len(report.done), len(report.left)) == (done, left), str(report)
    reports.clear()


def test_network(reports):
    assert_fuses(randomized(ResNet()), reports, 9, 1, image(3))


@pytest.mark.parametrize("convert", [copy.deepcopy, batchnorm_ext.convert])
@pytest.mark.parametrize("training", [True, False])
def test_block(convert, training, reports):
    """A residual block with a projection, then one whose norms come first."""
    model = randomized(nn.Sequential(BasicBlock(C, 8, 2), nn.Conv2d(8, C, 1), PreActivation()))
    model = convert(Model(lambda m, x: m.layers(x), layers=model)).train(training)
    assert_fuses(model, reports, 4, 1)


def test_activations(reports):
    """Every spelling of one graph: modules, then functions."""
    functions = {name: act for name, act in FUNCTIONS.items() if "hardsigmoid" not in name}
    modules = [copy.deepcopy(act) for name, act in MODULES.items() if name != "hardsigmoid"]

    def run(m, x):
        for act in (*m.acts, *functions.values()):
            x = act(m.bn1(x))
        return x

    model = block(run, bn2=None, acts=nn.ModuleList(modules))
    model.bn1.track_running_stats = False  # of so many steps none is to lead the statistics away
    model.bn1.running_mean = model.bn1.running_var = model.bn1.num_batches_tracked = None
    randomized(model)
    original, fused = copy.deepcopy(model), compiled(model)
    x = image()
    torch.testing.assert_close(fused(x), original(x), rtol=1e-7, atol=1e-7)
    assert len(reports[0].done) == len(modules) + len(functions), str(reports[0])


def test_additions(reports):
    def run(m, x):
        for add in ADDITIONS.values():
            x = m.conv1(F.relu(add(m.bn1(x), m.conv1(x))))
            x = m.conv1(add(m.bn1(x), m.conv1(x)))
        return x

    model = randomized(block(run, bn2=None))
    assert_same(compiled(model).eval(), copy.deepcopy(model).eval(), image())
    assert len(reports[0].done) == 2 * len(ADDITIONS), str(reports[0])


@pytest.mark.parametrize(
    "run, reason",
    [
        (lambda m, x: (lambda y: (m.relu(y), y))(m.bn1(x)), "used by relu, the output"),
        (lambda m, x: F.relu(m.bn1(x) + x.mean((2, 3), keepdim=True)), "of another shape"),
        (lambda m, x: F.relu(torch.add(m.bn1(x), x, alpha=2)), "a scaled addition"),
        (lambda m, x: m.relu(m.drop(m.bn1(x)) + x), "used by new_empty, mul"),
    ],
)
def test_what_is_left(run, reason, reports):
    model = block(run, bn2=None, drop=DropPath())
    randomized(model)
    assert_same(compiled(model), copy.deepcopy(model), image())
    (report,) = reports
    assert report.done == {} and reason in " ".join(report.left.values()), str(report)


def _no_grad(m, x):
    with torch.no_grad():
        y = m.bn1(x)
    return F.relu(y + m.conv1(x))


def _autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.bn1(x)
    return F.relu(y)


@pytest.mark.parametrize("run", [_no_grad, _autocast])
@pytest.mark.parametrize("convert", [copy.deepcopy, batchnorm_ext.convert])
def test_a_norm_stays_where_autograd_and_autocast_are_as_they_were(run, convert, reports):
    model = convert(randomized(block(run, bn1=nn.GroupNorm(2, C), bn2=None)))
    assert_same(compiled(model), copy.deepcopy(model), image())
    assert reports[0].done == {} and "comes before the end" in str(reports[0])


def test_hooks_are_part_of_the_graph(reports):
    model = randomized(block(lambda m, x: m.relu(m.bn1(x)), bn2=None))
    model.bn1.register_forward_hook(lambda module, args, output: output * 2)
    assert_same(compiled(model), copy.deepcopy(model), image())
    assert reports[0].done == {}


def test_group_and_instance_norm(reports):
    layers = nn.GroupNorm(2, C), nn.SiLU(), conv(), nn.InstanceNorm2d(C, affine=True), nn.Mish()
    assert_fuses(randomized(around(*layers)), reports, 2)


def test_changing_sizes(reports):
    model = randomized(BasicBlock(C, C))
    fused, original = copy.deepcopy(model), copy.deepcopy(model)
    options = {"backend": "aot_eager"}
    fused.compile(backend="batchnorm_ext", options=options, fullgraph=True, dynamic=True)
    for size in (8, 9, 12):
        assert_same(fused, original, torch.randn(2, C, size, size, dtype=torch.float64))
        # at first Dynamo takes numbers for inputs, too, and starts once more
        assert len(reports) == 2 and len(reports[1].done) == 2


def test_inductor(reports):
    """The default; without other operators there is nothing that it has to compile for long."""
    model = Model(lambda m, x: F.silu(m.bn(x) + x), bn=norm()).eval()
    fused = copy.deepcopy(model)
    fused.compile(backend="batchnorm_ext", options={"max_autotune": False})
    x = image().float()
    with torch.no_grad():  # float32: a few roundings of values of order 1
        torch.testing.assert_close(fused(x), model(x), rtol=1e-6, atol=1e-6)
    assert len(reports[0].done) == 1


def test_layouts_of_inductor_are_not_copied():
    """On a CPU it keeps what convolutions read and write in channels_last."""
    model = around(nn.Conv2d(C, C, 3), norm(), nn.ReLU(), nn.Conv2d(C, C, 3)).float()
    x = image().float()
    expected = copy.deepcopy(model)(x)
    model.compile(backend="batchnorm_ext")
    with torch._inductor.config.patch(force_disable_caches=True):
        y, (code,) = run_and_get_code(model, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # float32 sums of 9 * C terms
    read = re.search(
        r"(\w+) = extern_kernels\.convolution.*?batch_norm_update\.default\((\w+)", code, re.S
    )
    assert read[1] == read[2], code


def test_unknown_backend():
    model = compiled(around(norm(), nn.ReLU()), "no such backend")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no such backend"):
        model(image().float())


# The pass on graphs of torch.fx


def test_graph_of_torch_fx():
    model = randomized(ResNet())
    graph_module = torch.fx.symbolic_trace(copy.deepcopy(model))
    report = batchnorm_ext.fuse_graph(graph_module)
    assert (len(report.done), len(report.left)) == (9, 1)
    assert (
        report.done["layer1.0.bn2"] == "with the addition of relu (ReLU) and layer1.0.relu (ReLU)"
    )
    graph_module.graph.lint()
    for each in (graph_module, copy.deepcopy(graph_module)):
        assert_same(each, copy.deepcopy(model), image(3))


def test_other_arguments():
    with pytest.raises(TypeError, match="expected a torch.fx.GraphModule, got Sequential"):
        batchnorm_ext.fuse_graph(nn.Sequential())
