"""Tools of PyTorch that take a model over: a converted one becomes what the native one becomes.

What is written down for use elsewhere (torch.export, ONNX, TorchScript) holds PyTorch's own
operators, so that it is read without this library, and gives bitwise what the native model's gives.
"""

import io
import warnings

import pytest
import torch
import torch.ao.quantization
import torch.ao.quantization.quantize_fx as quantize_fx
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.package import PackageExporter, PackageImporter

import batchnorm_ext
from networks import (
    CLOSE,
    assert_same_state,
    assert_same_step,
    conversions,
    make_input,
    make_pair,
    on_cpu,
)
from support import assert_bitwise

# Of torch.ao.quantization and torch.jit themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@conversions
@pytest.mark.parametrize("training", [True, False])
def test_exported_program_holds_operators_of_pytorch_alone(training, convert, device):
    native, model = make_pair(convert, device, training)
    x = make_input(device)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert {t.namespace for t in targets if hasattr(t, "namespace")} == {"aten"}
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    module = torch.export.load(buffer).module()
    for batch in (4, 7):
        x = make_input(device, batch)
        assert_bitwise("y", module(x), native(x))
    for name, value in native.named_buffers():
        assert_bitwise(name, module.get_buffer(name), value)
    for name, value in model.named_buffers():
        if training and name.endswith("num_batches_tracked"):
            assert value.item() == 0, "exporting ran the model"


@on_cpu
@conversions
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo, convert, tmp_path):
    onnx = pytest.importorskip("onnx")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    if dynamo:
        pytest.importorskip("onnxscript")
    native, model = make_pair(convert, "cpu", training=False)
    x, path = make_input("cpu"), tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), str(path), dynamo=dynamo, verbose=False)
    graph = onnx.load(path)
    assert {n.domain for n in graph.graph.node} == {""}
    (y,) = evaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y.copy()), native(x), **CLOSE)


def _assert_torchscript_of_pytorch_alone(module):
    graph = module.inlined_graph
    assert len(graph.findAllNodes("aten::batch_norm")) == 2
    assert "batchnorm_ext::" not in str(graph)


@conversions
@pytest.mark.parametrize("training", [True, False])
def test_trace(training, convert, device):
    native, model = make_pair(convert, device, training)
    traced = torch.jit.trace(model, make_input(device), check_trace=False)
    native.load_state_dict(model.state_dict())  # tracing runs the model once
    _assert_torchscript_of_pytorch_alone(traced)
    for batch in (4, 7):
        x = make_input(device, batch)
        assert_bitwise("y", traced(x), native(x))
    for name, value in native.named_buffers():
        assert_bitwise(name, dict(traced.named_buffers())[name], value)


def test_script(device):
    """Not of SyncBatchNorm, which cannot be scripted natively either."""
    native, model = make_pair(batchnorm_ext.convert, device)
    scripted = torch.jit.script(model)
    _assert_torchscript_of_pytorch_alone(scripted)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer, map_location=device)
    for training in (True, False):
        for module in (scripted, native):
            module.train(training)
        x = make_input(device)
        assert_bitwise("y", scripted(x), native(x))
    for name, value in native.named_buffers():
        assert_bitwise(name, dict(scripted.named_buffers())[name], value)


@conversions
def test_freezing_folds_into_the_convolution(convert, device):
    native, model = make_pair(convert, device, training=False)
    x = make_input(device)
    frozen = torch.jit.freeze(torch.jit.trace(model, x))
    assert "batch_norm" not in str(frozen.inlined_graph)
    # the scale goes into 27 products instead of onto their sum, in float32
    torch.testing.assert_close(frozen(x), native(x), rtol=1e-4, atol=1e-4)


@conversions
def test_package(convert, device):
    """With the library named as external, as any other; without it once it is reverted."""
    _, model = make_pair(convert, device)
    model = nn.Sequential(*model.children()).eval()
    x = make_input(device)
    for prepare, extern in ((lambda m: m, ["batchnorm_ext.**"]), (batchnorm_ext.revert, [])):
        prepare(model)
        buffer = io.BytesIO()
        with PackageExporter(buffer) as exporter:
            exporter.extern(extern)
            exporter.save_pickle("model", "model.pkl", model)
        buffer.seek(0)
        loaded = PackageImporter(buffer).load_pickle("model", "model.pkl")
        assert [type(m) for m in loaded] == [type(m) for m in model]
        assert_bitwise("y", loaded(x), model(x))


# Graphs


@conversions
def test_symbolic_trace_has_the_nodes_of_the_native_one(convert, device):
    native, model = make_pair(convert, device)
    traced, expected = fx.symbolic_trace(model), fx.symbolic_trace(native)
    assert [(n.op, n.target) for n in traced.graph.nodes] == [
        (n.op, n.target) for n in expected.graph.nodes
    ]
    assert_same_step(traced, native, make_input(device))


@conversions
def test_conversion_after_compiling(convert, device, fresh_dynamo):
    native, model = make_pair(lambda m: m, device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = make_input(device)
    compiled(x)
    native.load_state_dict(model.state_dict())
    convert(model)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), native(x), **CLOSE)
    assert_same_state(model.named_buffers(), native.named_buffers())
    assert model.bn.num_batches_tracked == 3


# Quantization knows the classes of torch.nn alone


@on_cpu
@conversions
def test_reverted_model_is_fused(convert):
    native, model = make_pair(convert, "cpu", training=False)
    groups = [["conv", "bn", "relu"], ["linear", "bn1d"]]
    x = make_input("cpu")
    fused = torch.ao.quantization.fuse_modules(batchnorm_ext.revert(model), groups)
    expected = torch.ao.quantization.fuse_modules(native, groups)
    assert not any(isinstance(m, _BatchNorm) for m in fused.modules())
    assert_bitwise("y", fused(x), expected(x))


@on_cpu
@conversions
@pytest.mark.parametrize("training", [True, False])
def test_reverted_model_is_quantized(training, convert):
    native, model = make_pair(convert, "cpu", training)
    x = make_input("cpu")
    if training:
        prepare = quantize_fx.prepare_qat_fx
        mapping = torch.ao.quantization.get_default_qat_qconfig_mapping("x86")
    else:
        prepare = quantize_fx.prepare_fx
        mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")
    outputs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of observers, and of typed storage
        for module in (batchnorm_ext.revert(model), native):
            prepared = prepare(module, mapping, (x,))
            prepared(x)
            quantized = quantize_fx.convert_fx(prepared.eval())
            assert not any(isinstance(m, _BatchNorm) for m in quantized.modules())
            outputs.append(quantized(x))
    assert_bitwise("y", *outputs)
