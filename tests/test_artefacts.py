"""Exported, traced and scripted models, which run where this library is missing."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import batchnorm_ext
from situations.parts import batch, numbered
from support import assert_within

pytestmark = [
    pytest.mark.only("cpu", reason="artefacts are made on the CPU"),
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

# A few roundings of values of order 1: the other operations are the same ones.
CLOSE = 1e-5

RUN = """
import sys
sys.modules["batchnorm_ext"] = None  # an import fails
import torch
folder = sys.argv[1]
x = torch.load(folder + "/x.pt")
models = {
    "exported": lambda: torch.export.load(folder + "/exported.pt2").module(),
    "traced": lambda: torch.jit.load(folder + "/traced.pt"),
    "scripted": lambda: torch.jit.load(folder + "/scripted.pt"),
    "reverted": lambda: torch.load(folder + "/reverted.pt", weights_only=False),
}
torch.save(models[sys.argv[2]]()(x), folder + "/y.pt")
"""


def _model():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        numbered(batchnorm_ext.BatchNorm2d(4)),
        nn.ReLU(),
        nn.Flatten(),
        numbered(batchnorm_ext.BatchNorm1d(16)),
    )
    return model.eval()


def _export(model, x, folder):
    torch.export.save(torch.export.export(model, (x,), strict=False), folder / "exported.pt2")


def _trace(model, x, folder):
    torch.jit.trace(model, x).save(folder / "traced.pt")


def _script(model, x, folder):
    torch.jit.script(model).save(folder / "scripted.pt")


def _revert(model, x, folder):
    torch.save(batchnorm_ext.revert(model), folder / "reverted.pt")


SAVED = {"exported": _export, "traced": _trace, "scripted": _script, "reverted": _revert}


@pytest.mark.parametrize("kind", SAVED)
def test_artefact_runs_without_the_library(kind, tmp_path):
    model, x = _model(), batch(4, 3, 2, 2)
    expected = model(x)
    torch.save(x, tmp_path / "x.pt")
    SAVED[kind](model, x, tmp_path)
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path), kind], check=True)
    assert_within("y", torch.load(tmp_path / "y.pt"), expected, CLOSE)


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize("training", [True, False])
def test_onnx_graph_is_that_of_native(dynamo, training, tmp_path):
    onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs onnx and onnxscript")
    pytest.importorskip("onnxscript", reason="exporting to ONNX needs onnx and onnxscript")
    x, file = batch(4, 3, 2, 2), tmp_path / "model.onnx"
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL

    def exported(model):
        options = {"dynamo": dynamo} | ({} if dynamo else {"training": mode})
        torch.onnx.export(model.train(training), (x,), file, **options)
        return onnx.load(file)

    def nodes(model):
        return [(n.op_type, n.domain, len(n.input), len(n.output)) for n in model.graph.node]

    model = _model()
    expected = model(x)
    ours, native = exported(model), exported(batchnorm_ext.revert(model))
    assert nodes(ours) == nodes(native)
    if not training:
        evaluator = onnx.reference.ReferenceEvaluator(ours)
        (y,) = evaluator.run(None, {ours.graph.input[0].name: x.numpy()})
        assert_within("y", torch.from_numpy(y), expected, CLOSE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [batchnorm_ext.BatchNorm2d, batchnorm_ext.BatchNormAct2d])
def test_compiled_graphs(layer, training):
    """Those of the forward and of the backward, which torch.compile hands to its backend: a plain
    norm is PyTorch's, for inductor to fuse, and one with an activation an operator of ours."""
    graphs = []

    def backend(module, _):
        graphs.append(str(module.graph))
        return make_boxed_func(module.forward)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer(4)).train(training)
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    compiled(batch(4, 3, 2, 2)).sum().backward()
    assert len(graphs) == 2
    for graph in graphs:
        ours = layer is batchnorm_ext.BatchNormAct2d
        assert ("batchnorm_ext." in graph, "native_batch_norm" in graph) == (ours, not ours), graph


def test_compiled_autograd_takes_the_backward():
    layer, other = (numbered(batchnorm_ext.BatchNorm2d(3)) for _ in range(2))

    def gradients(layer, compiled):
        x = batch(4, 3, 2, 2).requires_grad_()
        loss = layer(x).pow(3).sum()
        if compiled:
            backend = torch.compile(backend="eager", fullgraph=True)
            with torch._dynamo.compiled_autograd._enable(backend):
                loss.backward()
        else:
            loss.backward()
        return x.grad, layer.weight.grad, layer.bias.grad

    for actual, expected in zip(gradients(layer, True), gradients(other, False), strict=True):
        assert torch.equal(actual, expected)


def test_compiled_autograd_by_its_setting():
    layer = numbered(batchnorm_ext.BatchNorm2d(3))
    x = batch(4, 3, 2, 2).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).pow(3).sum(), x)

    @torch.compile(backend="aot_eager")
    def train():
        layer(x).pow(3).sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        train()
    assert_within("dx", x.grad, expected, CLOSE * expected.abs().max().item())
