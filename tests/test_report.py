"""The tables: numbers from result files alone, and what is refused or not measured."""

import os
import re
import subprocess
import sys

import pandas as pd
import pytest

import environment
import musts
import report
import results

MACHINE = {"cpu": "Test CPU", "cores": 2, "torch": "9.9", "commit": "abc", "date": "2030-01-02"}
GPU = {"gpu": "Test GPU", "driver": "1.2"} | MACHINE
BIG = "256x64x112x112"  # 411 MB in bf16


def _layer(what, shape=BIG, dtype="bf16", layout="nchw", disturbance=0.0, **times):
    case = {"pass": what, "dtype": dtype, "layout": layout, "shape": shape}
    return case | {"resnet50": 2, "mobilenetv2": 0, **times, "disturbance": disturbance}


def _step(network="resnet50", mode="eager", native=300.0, ours=200.0):
    row = {"network": network, "dtype": "fp32", "layout": "nchw", "batch": 16, "mode": mode}
    return row | {"native": native, "ours": ours, "disturbance": 0.0}


def _write(path, rows, **more):
    results.write(path, MACHINE | more, pd.DataFrame(rows))


def _lines(table):
    """The cells of each line, without the padding."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_a_file_that_is_read_says_what_was_written(tmp_path):
    path = tmp_path / "deep" / "layers-glibc.csv"
    _write(path, [_layer("backward", ours=320.0, native=1600.0, copy=160.0)], allocator="a: b")
    text = path.read_text()
    assert text.startswith("# cpu: Test CPU\n# cores: 2\n") and len(text.splitlines()) == 8
    rows = results.read(path)
    assert rows.attrs["allocator"] == "a: b"
    (row,) = rows.to_dict("records")
    assert (row["kind"], row["x"]) == ("bf16 nchw", 5.0)
    assert row["mb"] == pytest.approx(411.04, abs=0.01)
    assert row["over_floor"] == pytest.approx(320 / (1.5 * 160))


def test_the_median_run_is_kept_whole():
    """Of speed-ups 2, 3 and 1 the run with 2, not the medians of each time."""
    times = [(10.0, 20.0), (20.0, 60.0), (5.0, 5.0)]
    rows = [_layer("forward", ours=o, native=n, copy=1.0) for o, n in times]
    rows += [_layer("eval", ours=4.0, native=8.0, copy=1.0)]
    kept = results.median_run(pd.DataFrame(rows))
    assert kept[["pass", "ours", "native"]].values.tolist() == [
        ["forward", 10.0, 20.0],
        ["eval", 4.0, 8.0],
    ]


def test_a_must_that_is_just_met_and_just_missed():
    assert musts.verdict("x", 0.97, 0.97, 1.1)[1:5] == [">= 0.97", ">= 1.1", "0.970", "PASS"]
    assert musts.verdict("x", 0.9699, 0.97)[4] == "MISS"
    assert musts.verdict("x", 1.2, 1.2, at_most=True)[4] == "PASS"
    assert musts.verdict("x", float("nan"), 1.2)[4] == "not measured"


def test_steps_and_layers_of_both_allocators_are_side_by_side(tmp_path):
    _write(
        tmp_path / "steps-glibc.csv", [_step(), _step(mode="compiled", native=200.0, ours=250.0)]
    )
    _write(tmp_path / "steps-tcmalloc.csv", [_step(native=2000.0, ours=1600.0)])
    layers = [_layer("module", dtype="fp32", ours=3.0, native=6.0, copy=1.0)]
    layers += [_layer("module", "8x8", dtype="fp32", ours=1.0, native=1.0, copy=1.0)]
    _write(tmp_path / "layers-tcmalloc.csv", layers)
    found = report.blocks(tmp_path)
    lines = _lines(found["results"])
    glibc = ["300", "200", "1.50"]
    assert ["ResNet-50, training step, nchw, eager", *glibc, "2000", "1600", "1.25"] in lines
    slower = ["ResNet-50, training step, nchw, compiled", "200", "250", "0.80", "", "", ""]
    assert slower in lines
    # two layers of each shape: (6 + 1) * 2 ms over (3 + 1) * 2 ms
    total = ["ResNet-50, all layers, fp32 nchw", "", "", "", "14", "8", "1.75"]
    assert total in lines
    assert "training step, ResNet-50 nchw, x native" in found["musts"]
    assert "settings" not in found


def test_family_has_a_line_for_each_norm_dtype_and_layout(tmp_path):
    """Means over shapes: native / ours is 2 and 8, by hand 6 and 6, compiled 1 and 4."""
    row = {"pass": "module", "norm": "RMSNorm", "dtype": "fp32", "layout": "rows"}
    times = {"copy": 0.4, "ours": 1.0, "hand": 6.0, "disturbance": 0.0}
    rows = [
        row | {"shape": "8x8", "native": 2.0, "compiled": 1.0} | times,
        row | {"shape": "8x9", "native": 8.0, "compiled": 4.0} | times,
        row | {"shape": "8x8", "native": 0.5, "compiled": 1.0, "dtype": "bf16"} | times,
    ]
    _write(tmp_path / "family-glibc.csv", rows)
    lines = _lines(report.blocks(tmp_path)["family-glibc"])
    assert ["RMSNorm, fp32 rows", "4.00", "6.00", "2.00", "1.00", "2.00 at 8x8"] in lines
    assert ["RMSNorm, bf16 rows", "0.50", "6.00", "1.00", "1.00", "0.50 at 8x8"] in lines


def test_gpu_tables(tmp_path):
    """The floor of the forward is the clone's time, that of the backward one and a half of it."""
    rows = [
        _layer("forward", ours=0.24, native=1.2, copy=0.18),
        _layer("backward", ours=0.32, native=1.6, copy=0.18),
    ]
    results.write(tmp_path / "layers-256.csv", GPU, pd.DataFrame(rows))
    results.write(tmp_path / "steps.csv", GPU, pd.DataFrame([_step()]))
    stages = {"stage": "correctness", "status": "passed", "seconds": 60.4, "summary": "9 | passed"}
    results.write(tmp_path / "stages.csv", GPU, pd.DataFrame([stages]))
    text = report.gpu_block(tmp_path)
    assert text.startswith("gpu Test GPU, driver 1.2, cpu Test CPU, cores 2, torch 9.9, ")
    assert r"9 \| passed" in text
    lines = _lines(text)
    assert ["forward, bf16 nchw, batch 256", "5.00", "1.33"] == lines_of(lines, "forward, bf16")[:3]
    assert ["backward, bf16 nchw, batch 256", "5.00", "1.19"] == lines_of(lines, "backward, b")[:3]
    assert ["resnet50 fp32 nchw 16 eager", "300", "200", "1.50"] in lines
    must = lines_of(lines, "forward nchw >= 100 MB")
    assert must[1:] == [">= 0.8", "", "0.750", "MISS", f"{BIG} bf16 nchw"]


def lines_of(lines, start):
    return next(line for line in lines if line[0].startswith(start))


@pytest.fixture
def root(tmp_path):
    """A README and a page of docs with a marker each."""
    (tmp_path / "docs").mkdir()
    for path, name in ("README.md", "results"), ("docs/gpu.md", "gpu"):
        text = f"Words.\n<!-- bench:{name}:begin -->\nold\n<!-- bench:{name}:end -->\nMore words.\n"
        (tmp_path / path).write_text(text)
    return tmp_path


def _report(root, *options):
    command = [sys.executable, report.__file__, "--root", root, "--results", root, *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_check_fails_until_the_tables_are_written(root):
    _write(root / "steps-glibc.csv", [_step()])
    before = (root / "README.md").read_text()
    done = _report(root, "--check")
    assert done.returncode == 1 and "README.md, gpu.md" in done.stderr
    assert (root / "README.md").read_text() == before
    assert _report(root).returncode == 0
    assert _report(root, "--check").returncode == 0
    text = (root / "README.md").read_text()
    assert (
        "| 300 |" in re.sub(" +", " ", text)
        and text.startswith("Words.")
        and text.endswith("More words.\n")
    )
    assert "\nNot measured yet.\n" in (root / "docs" / "gpu.md").read_text()


@pytest.mark.parametrize(
    "more, disturbance, message",
    [
        ({"quick": True}, 0.0, "steps-glibc: a --quick run is no measurement"),
        ({}, 0.2, "steps-glibc: 1 of 1 rows were disturbed"),
    ],
)
def test_what_is_no_measurement_is_refused(root, more, disturbance, message):
    _write(root / "steps-glibc.csv", [_step() | {"disturbance": disturbance}], **more)
    done = _report(root)
    assert done.returncode == 1 and message in done.stderr


@pytest.mark.parametrize("name", environment.ALLOCATORS)
def test_allocator_of_a_process_is_the_one_that_is_loaded(name):
    try:
        variables = environment.with_allocator(name)
    except SystemExit as error:  # no test asks a user to install tcmalloc
        pytest.skip(str(error))
    variables |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "import environment; print(environment.loaded_allocator())"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == name


def test_another_allocator_makes_room(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2:libsan.so other.so")
    assert environment.with_allocator("glibc")["LD_PRELOAD"] == "libsan.so:other.so"


def test_missing_tcmalloc_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(environment.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(environment, "LIBRARIES", [])
    with pytest.raises(SystemExit, match="apt install libtcmalloc-minimal4"):
        environment.find_tcmalloc()
