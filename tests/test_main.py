"""python -m batchnorm_ext: the report and the self-test."""

import pytest
import torch.nn.functional as F

from batchnorm_ext import __main__, _layer, _ops, _selftest

NORMS = dict(_selftest.NORMS)


@pytest.fixture
def small(monkeypatch):
    """The self-test on the smallest of its sizes, on the CPU."""
    monkeypatch.setattr(_selftest, "_SIZES", [(33, 17), (3, 17, 13, 9)])
    monkeypatch.setattr(_selftest, "NORMS", {})
    monkeypatch.setattr(__main__, "_gpus", lambda: range(0))


def test_self_test_passes(device):
    # 5 sizes, 3 of them in two memory formats; 4 dtypes; training and evaluation
    cases = list(_selftest.cases(device))
    # 6 other norms, 3 of them in two memory formats, in training; a GPU has kernels for those 3
    others = 36 if device.type == "cpu" else 24
    assert len(cases) == 64 + others and not [
        text for text in map(_selftest.failure, cases) if text
    ]


def test_report_and_verdict(small, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert __main__.main() == 0
    out = capsys.readouterr().out
    for name in ("built for torch", "Python:", "numpy:", "CPU:", "allocator:", "OMP_WAIT_POLICY="):
        assert name in out
    assert "self-test passed, 24 cases on cpu" in out


@pytest.mark.parametrize("name, factor", [("y", 1 + 2e-5), ("dx", 1 - 2e-5)])
def test_wrong_results_fail_the_self_test(name, factor, small, capsys, monkeypatch):
    normalize = _layer.normalize

    def wrong(native, x, *arguments):
        if name == "dx":
            x = x + 0
            x.register_hook(lambda dx: dx * factor)
        y = normalize(native, x, *arguments)
        return y * factor if name == "y" else y

    monkeypatch.setattr(_layer, "normalize", wrong)
    assert __main__.main() == 1
    out = capsys.readouterr().out
    case = "BatchNorm 3x17x13x9 float32 channels_last, training, on cpu"
    assert f"FAILED {case}: {name} is off by 2.0e-05" in out
    # an ulp of the half precisions is more than that
    assert "self-test FAILED in 12 of 24 cases on cpu" in out and "float16" not in out


@pytest.mark.parametrize("norm", _selftest.NORMS)
@pytest.mark.only("cpu", reason="on CUDA some of these are PyTorch's own")
def test_wrong_results_of_other_norms_fail_the_self_test(norm, small, capsys, monkeypatch):
    def wrong(*arguments):
        output = operator(*arguments)
        if isinstance(output, tuple):  # with statistics
            return output[0] * (1 + 2e-5), output[1]
        return output * (1 + 2e-5)

    names = {"LayerNorm": "layer_norm", "RMSNorm": "layer_norm", "weight_norm": "weight_norm"}
    names["InstanceNorm2d"] = "batch_norm_update"
    name = names.get(norm, "batch_norm")
    operator = getattr(_ops, name)
    monkeypatch.setattr(_selftest, "_SIZES", [])
    monkeypatch.setattr(_selftest, "NORMS", {norm: NORMS[norm]})
    monkeypatch.setattr(_ops, name, wrong)
    assert not __main__.self_test()
    out = capsys.readouterr().out
    assert f"FAILED {norm} " in out and "float32" in out and "y is off by 2.0e-05" in out


def test_gpu_without_kernels_is_left_out(monkeypatch):
    """The report of a machine with a GPU once failed with a TypeError."""
    monkeypatch.setattr(_ops, "CUDA_ARCHITECTURES", [])
    assert not __main__._has_kernels(0)


def test_native_computation_fails_the_self_test(small, capsys, monkeypatch):
    monkeypatch.setattr(F, "batch_norm", lambda *arguments: None)
    assert not __main__.self_test()
    assert "the kernels do not take it: batch_norm of torch, or what it calls, has been" in (
        capsys.readouterr().out
    )


def test_error_fails_the_self_test(small, capsys, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(_layer, "normalize", fail)
    assert not __main__.self_test()
    out = capsys.readouterr().out
    assert "33x17 float64 contiguous_format, training, on cpu: RuntimeError: no memory" in out
