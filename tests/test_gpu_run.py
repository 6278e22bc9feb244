"""The run on a GPU, with stages that need none: order, minutes, what is left when it is cut."""

import re
import shlex
import subprocess
import sys
import time

import pytest

pytest.importorskip("pandas")

import gpu_run  # noqa: E402  (needs pandas)
import results  # noqa: E402
from gpu_run import LEAST_SECONDS, Run, Stage  # noqa: E402


def _stage(name, code, minutes=1.0):
    return Stage(name, minutes, [f"{sys.executable} -c {shlex.quote(code)}"])


def _statuses(directory):
    rows = results.read(directory / "stages.csv").fillna("")
    return {row.stage: (row.status, str(row.summary)) for row in rows.itertuples()}


def test_results_are_written_after_every_stage(tmp_path, capfd):
    """Each stage sees on disk what those before it found."""
    found = f"print(sum(1 for line in open({str(tmp_path / 'stages.csv')!r})) - 2, 'stages')"
    Run(tmp_path, {"gpu": "none"}, minutes=1).run(
        [
            _stage("first", "print('one'); print('two')"),
            _stage("second", found),
            _stage("third", "import sys; print('bad'); sys.exit(3)"),
            _stage("fourth", found),
        ]
    )
    assert _statuses(tmp_path) == {
        "first": ("passed", "two"),
        "second": ("passed", "1 stages"),
        "third": ("failed", "bad"),
        "fourth": ("passed", "3 stages"),
    }
    assert results.read(tmp_path / "stages.csv").attrs == {"gpu": "none"}
    log, printed = (tmp_path / "log.txt").read_text(), capfd.readouterr().out
    assert "one\ntwo\n" in log and all(line in printed for line in log.splitlines())


def test_a_stage_goes_on_after_a_command_that_fails(tmp_path):
    stage = Stage("both", 1.0, ["false", "echo done"])
    Run(tmp_path, {"gpu": "none"}, minutes=1).run([stage])
    assert _statuses(tmp_path) == {"both": ("failed", "done")}


def test_a_stage_is_cut_with_all_that_it_started(tmp_path):
    """What it printed until then counts, and the next stage gets its turn."""
    child = "import subprocess, sys; print('begun', flush=True); "
    child += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    stages = [_stage("endless", child, minutes=3 / 60), _stage("next", "print('here')")]
    Run(tmp_path, {"gpu": "none"}, minutes=1).run(stages)
    assert _statuses(tmp_path) == {"endless": ("cut", "begun"), "next": ("passed", "here")}
    assert time.monotonic() - begin < 30


def test_no_stage_begins_without_time(tmp_path):
    run = Run(tmp_path, {"gpu": "none"}, minutes=LEAST_SECONDS / 60 / 2)
    run.run([_stage("late", "print('here')")])
    assert _statuses(tmp_path) == {"late": ("skipped", "no time left")}


def test_nothing_follows_a_build_that_fails(tmp_path):
    stages = [_stage("build", "1 / 0"), _stage("next", "print('here')")]
    Run(tmp_path, {"gpu": "none"}, minutes=1).run(stages)
    assert _statuses(tmp_path) == {"build": ("failed", "ZeroDivisionError: division by zero")}


def test_dry_run_names_every_stage_in_order():
    command = [sys.executable, gpu_run.__file__, "--dry-run", "--out", "somewhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = re.findall(r"^Stage\(name='(.*?)'", done.stdout, re.MULTILINE)
    stages = "build, correctness, memcheck, racecheck, tuning, other norms, fused norms, layers"
    assert names == [*stages.split(", "), "training steps"]
    assert "TORCH_CUDA_ARCH_LIST=9.0" in done.stdout


def test_commands_of_the_stages_take_their_options(tmp_path):
    """Every script of this project that a stage calls parses its arguments."""
    stages = gpu_run.all_stages("9.0", "/nowhere", tmp_path)
    commands = [command for stage in stages for command in stage.commands if "--out" in command]
    assert len(commands) == 6
    for command in commands:
        done = subprocess.run(f"{command} --help", shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        done = subprocess.run(f"{command} --nonsense", shell=True, capture_output=True, text=True)
        assert "unrecognized arguments: --nonsense" in done.stderr
