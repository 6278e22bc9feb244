"""The run on a GPU, with stages that need none: order, minutes, what is left when it is cut."""

import json
import subprocess
import sys

import gpu_run
from stages import LEAST_SECONDS, Run, Stage, Step, last_line


def _stage(name, code, minutes=1.0, **options):
    return Stage(name, minutes, [Step([sys.executable, "-c", code])], last_line, **options)


def _statuses(directory):
    stages = json.loads((directory / "run.json").read_text())["stages"]
    return {stage["name"]: (stage["status"], stage["summary"]) for stage in stages}


def test_results_are_written_after_every_stage(tmp_path, capfd):
    """Each stage sees on disk what those before it found."""
    path = tmp_path / "run.json"
    found = f"import json; print(len(json.load(open({str(path)!r}))['stages']))"
    run = Run(tmp_path, {"gpu": "none"}, {"rich"}, minutes=1)
    run.run(
        [
            _stage("first", "print('one'); print('two')"),
            _stage("second", found),
            _stage("third", "import sys; print('bad'); sys.exit(3)"),
            _stage("fourth", "", needs=("pytest", "rich")),
            _stage("fifth", found),
        ]
    )
    assert _statuses(tmp_path) == {
        "first": ("passed", "two"),
        "second": ("passed", "1"),
        "third": ("failed", "bad"),
        "fourth": ("skipped", "rich missing"),
        "fifth": ("passed", "4"),
    }
    assert json.loads(path.read_text())["machine"] == {"gpu": "none"}
    assert capfd.readouterr().out == (tmp_path / "log.txt").read_text()


def test_a_stage_is_cut_with_all_that_it_started(tmp_path):
    """What it printed until then counts, and the next stage gets its turn."""
    child = "import subprocess, sys; print('begun', flush=True); "
    child += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    run = Run(tmp_path, {}, set(), minutes=1)
    run.run([_stage("endless", child, minutes=3 / 60), _stage("next", "print('here')")])
    assert _statuses(tmp_path) == {"endless": ("cut", "begun"), "next": ("passed", "here")}


def test_no_stage_begins_without_time(tmp_path):
    run = Run(tmp_path, {}, set(), minutes=LEAST_SECONDS / 60 / 2)
    run.run([_stage("late", "print('here')")])
    assert _statuses(tmp_path) == {"late": ("skipped", "no time left")}


def test_nothing_follows_an_essential_stage_that_fails(tmp_path):
    run = Run(tmp_path, {}, set(), minutes=1)
    run.run([_stage("build", "1 / 0", essential=True), _stage("next", "print('here')")])
    assert _statuses(tmp_path) == {
        "build": ("failed", "ZeroDivisionError: division by zero"),
    }


def test_json_lines_are_kept(tmp_path):
    step = Step(
        [sys.executable, "-c", "print('text'); print('{\"a\": 1}'); print('{\"b')"],
        rows=tmp_path / "a.json",
    )
    Run(tmp_path, {"gpu": "x"}, set(), 1).run([Stage("probes", 1, [step], last_line)])
    content = json.loads((tmp_path / "a.json").read_text())
    assert content == {"kind": "probes", "environment": {"gpu": "x"}, "rows": [{"a": 1}]}


def test_summaries():
    text = "....\n= 3 failed, 1200 passed, 4 skipped in 61.10s (0:01:01) =\n"
    assert gpu_run.pytest_summary(text) == "3 failed, 1200 passed, 4 skipped in 61.10s (0:01:01)"
    text += "========= ERROR SUMMARY: 0 errors\n"
    assert gpu_run.sanitizer_summary(text).startswith("ERROR SUMMARY: 0 errors; 3 failed")
    assert gpu_run.verdict_summary("a PASS\nb MISS\nc PASS") == "2 of 3 musts met"
    assert gpu_run.probe_summary('{"probe": "copy", "gbps": 4300.2}') == "copies at up to 4300 GB/s"
    table = "│ resnet50, bf16 nchw, batch 2 │ 99 ms │ 66 ms │ 1.50 │\n└──┘\n"
    assert gpu_run.step_summary(table) == "x native: 1.50"
    assert gpu_run.tuning_summary("| geometric mean |  | 1.07 |") == (
        "best plans against the rules: x 1.07"
    )


def test_dry_run_names_every_stage_in_order():
    command = [sys.executable, gpu_run.__file__, "--dry-run", "--out", "somewhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [line.split(",")[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert names == (
        "build correctness memcheck racecheck graph streams probes tuning layers".split()
        + ["compiled layers", "training steps"]
    )
    assert "TORCH_CUDA_ARCH_LIST=9.0" in done.stdout and "-arch=sm_90" in done.stdout
