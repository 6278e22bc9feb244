"""The tables of a GPU run: numbers from its files; the README's tables: from nothing else."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"gpu": "Test GPU", "driver": "1.2", "torch": "9.9", "cuda": "13.0", "date": "2030-01-02"}

pytest.importorskip("rich")


def _report(*arguments):
    command = [sys.executable, ROOT / "benchmarks" / "report.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def _write(directory, name, kind, rows):
    content = {"kind": kind, "environment": MACHINE, "settings": {}, "rows": rows}
    (directory / name).write_text(json.dumps(content))


def _row(shape, what, **microseconds):
    seconds = {provider: 1e-6 * value for provider, value in microseconds.items()}
    row = {"shape": shape, "layers": {"resnet50": 1}, "dtype": "bf16", "layout": "nchw"}
    return row | {"what": what, "seconds": seconds, "disturbance": 0.0}


@pytest.fixture
def results(tmp_path):
    """One layer of 411 MB, measured twice, and one training step."""
    big = [256, 64, 112, 112]
    _write(
        tmp_path,
        "layers-256.json",
        "gpu layers",
        [
            _row(big, "forward", ours=200, native=1200, copy=180),
            _row(big, "backward", ours=320, native=1600, copy=180),
        ],
    )
    fuller = _row(big, "forward", ours=240, native=1200, copy=180, compile=480)
    _write(tmp_path, "layers-compiled.json", "gpu layers", [fuller])
    step = {"network": "resnet50", "dtype": "bf16", "layout": "nchw", "batch": 128}
    step |= {"compiled": True, "disturbance": 0.0, "norm share": {}}
    step |= {"seconds": {"native": 0.3, "ours": 0.2}}
    _write(tmp_path, "steps.json", "gpu steps", [step])
    stages = [{"name": "correctness", "status": "passed", "summary": "9 passed", "seconds": 60.4}]
    run = {"kind": "run", "machine": MACHINE, "stages": stages}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "probes.json").write_text(json.dumps({"kind": "probes", "rows": []}))
    return tmp_path


def test_gpu_tables(results):
    """The floor of the forward is the copy's time, that of the backward one and a half of it."""
    done = _report("--gpu", results, "--print")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "gpu Test GPU, driver 1.2, torch 9.9, cuda 13.0, date 2030-01-02." in lines
    assert "| correctness | passed | 9 passed | 60 s |" in lines
    # 180 / 240 from the measurement with more providers, 1.5 * 180 / 320
    assert any(line.startswith("| forward, bf16 nchw, batch 256 | 75% |") for line in lines)
    assert any(line.startswith("| backward, bf16 nchw, batch 256 | 84% |") for line in lines)
    assert "| resnet50, bf16 nchw, batch 128, compiled | 300 ms | 200 ms | 1.50 |" in lines
    must = "| forward nchw >= 100 MB, least of 1 cases, share of the floor | >= 0.8 | 0.75 | MISS |"
    assert any(line.startswith(must) for line in lines), done.stdout


def test_picture(results):
    pytest.importorskip("matplotlib")
    done = _report("--gpu", results, "--print", "--plot", results / "roofline.png")
    assert done.returncode == 0, done.stderr
    assert (results / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_readme_holds_what_the_committed_results_say(tmp_path):
    """Never typed: writing its tables again changes nothing."""
    copy = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text()
    blank = re.sub(r"(bench:\S+:begin -->).*?(<!--)", r"\1\n\2", text, flags=re.DOTALL)
    copy.write_text(blank)
    results = (ROOT / "benchmarks" / "results").glob("*.json")
    done = _report(*results, "--gpu", "--readme", copy)
    assert done.returncode == 0, done.stderr
    assert copy.read_text() == text


def test_sync_overhead_counts_layers_and_leaves_the_collectives_out(tmp_path):
    content = json.loads((ROOT / "benchmarks" / "results" / "sync.json").read_text())
    row = next(row for row in content["rows"] if (row["ranks"], row["batch"]) == (2, 2))
    rows = []
    for layers, ours in (3, 16e-3), (1, 13e-3):
        seconds = row["seconds"] | {"free messages": ours, "free calls": 1e-3, "local": 10e-3}
        rows.append(row | {"layers": layers, "seconds": seconds})
    results, copy = tmp_path / "sync.json", tmp_path / "README.md"
    results.write_text(json.dumps(content | {"rows": rows}))
    copy.write_text((ROOT / "README.md").read_text())
    done = _report(results, "--readme", copy)
    assert done.returncode == 0, done.stderr
    # (1.5^3 * 1.2)^(1/4)
    must = "without the collectives, time / local layer | <= 1.1 | 1.42 | MISS |"
    assert must in copy.read_text()
