"""Builds, tests, tunes and measures the CUDA kernels on a GPU, in one command.

    python3 benchmarks/gpu_run.py --minutes 30 --out build/gpu --stages build,layers

Needs a GPU, a CUDA build of torch, nvcc, a C++ compiler and the packages of the bench and test
groups. Stages that lack something fail. The most valuable come first, and they share the minutes.
The output directory has stages.csv (machine and outcomes) and what the other scripts write.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from torch.utils.cpp_extension import CUDA_HOME

import environment
import results

ROOT = Path(__file__).resolve().parent.parent
LEAST_SECONDS = 20  # a stage is not begun with less
NEEDS = {"test_properties.py": "hypothesis", "test_operators.py": "expecttest"}


@dataclass
class Stage:
    """Shell commands that share some minutes at most. The last line they print is the summary."""

    name: str
    minutes: float
    commands: list[str]


class Run:
    """Runs stages until the minutes are over, and keeps what came of them in stages.csv."""

    def __init__(self, out: Path, machine: dict, minutes: float):
        self.out, self.machine = out, machine
        self.deadline = time.monotonic() + 60 * minutes
        self.rows: list[dict] = []
        for directory in (out, ROOT / "build"):
            directory.mkdir(parents=True, exist_ok=True)

    def run(self, todo: list[Stage]) -> None:
        for stage in todo:
            begin = time.monotonic()
            status, summary = self.attempt(stage)
            row = {"stage": stage.name, "status": status, "seconds": time.monotonic() - begin}
            self.rows.append(row | {"summary": summary})
            print(f"--- {stage.name}: {status}, {summary}", flush=True)
            results.write(self.out / "stages.csv", self.machine, pd.DataFrame(self.rows))
            if stage.name == "build" and status != "passed":
                break  # nothing can follow

    def attempt(self, stage: Stage) -> tuple[str, str]:
        """The status (passed, failed, cut at its time, skipped), and the summary."""
        left = self.deadline - time.monotonic()
        if left < LEAST_SECONDS:
            return "skipped", "no time left"
        print(f"\n=== {stage.name}, {left / 60:.1f} minutes left", flush=True)
        end = time.monotonic() + min(60 * stage.minutes, left)
        status, summary = "passed", ""
        for command in stage.commands:
            code, printed = self.execute(command, end - time.monotonic())
            summary = printed.strip().rpartition("\n")[2] or summary
            if code is None:
                return "cut", summary
            if code != 0:
                status = "failed"  # the next command may work all the same
        return status, summary

    def execute(self, command: str, seconds: float) -> tuple[int | None, str]:
        """The exit code, None if it ran out of time, and what it printed, which is passed on."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        settings = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10"}
        log = self.out / "log.txt"
        before = log.stat().st_size if log.exists() else 0
        shell = f"{{ echo '$' {shlex.quote(command)}; {command}; }} 2>&1 | tee -a {log}"
        options = {"cwd": ROOT, "env": os.environ | settings, "start_new_session": True}
        process = subprocess.Popen(["bash", "-o", "pipefail", "-c", shell], **options)
        try:
            code = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.wait()
        printed = log.read_bytes()[before:].decode(errors="replace")
        return code, printed.partition("\n")[2]


def all_stages(capability: str, home: str, out: Path) -> list[Stage]:
    python = sys.executable
    tests = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    tests.sort(key=lambda name: "cuda" not in name)  # what only a GPU can show comes first
    tests = [name for name in tests if find_spec(NEEDS.get(name, "torch"))]
    files = " ".join(f"tests/{name}" for name in tests)
    # A kernel that never ends is named after two minutes.
    pytest = f"{python} -m pytest -q --device cuda -p no:cacheprovider -o faulthandler_timeout=120"
    workers = f"-n {min(os.cpu_count(), 8)}" if find_spec("xdist") else ""
    # Without PyTorch's cache each tensor is an allocation of its own, and overruns are seen.
    sanitize = f"PATH=$PATH:{home}/bin PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer"
    sanitize += " --error-exitcode 9 --tool {} " + f"{pytest} -x tests/test_cuda.py -k test_plan"
    build = f"BATCHNORM_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST={capability} "
    build += f"MAX_JOBS=${{MAX_JOBS:-$(nproc)}} {python} setup.py --quiet build_ext --inplace"
    bench = f"{python} benchmarks/bench.py --device cuda --rounds 7 --out {out} "
    bench += "--pass forward backward eval --dtype bf16 fp16 fp32 "
    steps = f"{python} benchmarks/model.py --device cuda --out {out} --networks resnet50"
    large, usual = "--shapes resnet50 --batch 256", "--shapes resnet50 mobilenetv2 large"
    family = f"{bench} --family GroupNorm InstanceNorm 'LayerNorm of channels'"
    layers = [f"{bench} --name layers-256 {large}", f"{bench} --name layers-32 {usual}"]
    return [
        Stage("build", 10, [build]),
        Stage("correctness", 12, [f"{pytest} {workers} --maxfail=30 {files}"]),
        Stage("memcheck", 3, [sanitize.format("memcheck")]),
        Stage("racecheck", 3, [sanitize.format("racecheck")]),
        Stage("tuning", 6, [f"{python} benchmarks/tune.py --batch 256 32 --out {out}"]),
        Stage("other norms", 3, [family]),
        Stage("fused norms", 5, [f"{bench} --fused"]),
        Stage("layers", 8, layers),
        Stage("training steps", 6, [f"{steps} --batch 128 --dtype bf16"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>-<date>")
    parser.add_argument("--stages", help="comma-separated names of some; all by default")
    parser.add_argument("--dry-run", action="store_true", help="print the commands for an H200")
    args = parser.parse_args()
    machine, capability = {"gpu": "NVIDIA H200"}, "9.0"
    if not args.dry_run:
        if not torch.cuda.is_available() or not CUDA_HOME:
            raise SystemExit(f"torch {torch.__version__} finds no GPU, or no nvcc (CUDA_HOME)")
        machine, capability = environment.gpu(), "{}.{}".format(*torch.cuda.get_device_capability())
    name = re.sub(r"\W+", "-", machine["gpu"].lower())
    out = (args.out or results.RESULTS / f"{name}-{date.today()}").resolve()
    todo = all_stages(capability, CUDA_HOME or "/usr/local/cuda", out)
    if args.stages:
        todo = [stage for stage in todo if stage.name in args.stages.split(",")]
    if args.dry_run:
        print(*todo, sep="\n")
        return
    machine |= {"torch": torch.__version__, "commit": environment.git_commit()}
    run = Run(out, machine | {"date": date.today()}, args.minutes)
    run.run(todo)
    print(f"results: {out}")
    sys.exit(any(row["status"] == "failed" for row in run.rows))


if __name__ == "__main__":
    main()
