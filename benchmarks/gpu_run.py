"""Everything that only a GPU can tell, in one command: builds, checks, probes, tunes, compares.

    make gpu PYTHON=python3
    python3 benchmarks/gpu_run.py --minutes 30 --out build/gpu
    python3 benchmarks/gpu_run.py --dry-run

Takes a machine with a GPU, a CUDA build of torch, nvcc and a C++ compiler; no network, and nothing
is installed. The stages come in the order of their worth and share the minutes. What each found is
in the output directory when it ends, so that a run that is cut short leaves the rest:

    run.json     the machine and the outcome of every stage
    log.txt      all that was printed (not for the repository: it holds paths of the machine)
    *.json       layers, steps, probes, tuning: the measurements
    roofline.png

Committed as benchmarks/results/<gpu>-<date>/ (the default of --out), they make the README's table:
`python benchmarks/report.py --gpu`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

from stages import ROOT, Run, Stage, Step, json_lines, last_line

SURVEY = """
import importlib.util, json, platform, torch
names = "setuptools ninja pytest xdist hypothesis expecttest rich tqdm matplotlib".split()
result = {
    "missing": [name for name in names if importlib.util.find_spec(name) is None],
    "python": platform.python_version(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "available": torch.cuda.is_available(),
}
if result["available"]:
    properties = torch.cuda.get_device_properties(0)
    result |= {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "cudnn": torch.backends.cudnn.version(),
    }
if not {"setuptools", "ninja"} & set(result["missing"]):
    from torch.utils.cpp_extension import CUDA_HOME
    result["cuda home"] = CUDA_HOME
print("survey", json.dumps(result))
"""


def pytest_summary(text: str) -> str:
    counts = re.findall(r"^.*\d+ (?:passed|failed|error).* in [\d.]+s.*$", text, re.MULTILINE)
    return counts[-1].strip("= ") if counts else last_line(text)


def sanitizer_summary(text: str) -> str:
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    return f"{found[-1]}; {pytest_summary(text)}" if found else last_line(text)


def probe_summary(text: str) -> str:
    rows = json_lines(text)
    copies = [row["gbps"] for row in rows if row["probe"] == "copy"]
    return f"copies at up to {max(copies):.0f} GB/s" if copies else last_line(text)


def verdict_summary(text: str) -> str:
    met, missed = (len(re.findall(rf"\b{word}\b", text)) for word in ("PASS", "MISS"))
    return f"{met} of {met + missed} musts met" if met + missed else last_line(text)


def tuning_summary(text: str) -> str:
    gains = re.findall(r"geometric mean\D*([\d.]+)", text)
    return f"best plans against the rules: x {gains[-1]}" if gains else last_line(text)


def step_summary(text: str) -> str:
    ratios = re.findall(r"resnet50, .*?([\d.]+)\s*│\s*$", text, re.MULTILINE)
    return f"x native: {', '.join(ratios)}" if ratios else last_line(text)


def survey(python: str) -> dict:
    """What torch and the machine say of themselves."""
    done = subprocess.run([python, "-c", SURVEY], capture_output=True, text=True)
    found = re.search(r"^survey (.*)$", done.stdout, re.MULTILINE)
    if not found:
        raise SystemExit(f"torch cannot be imported by {python}:\n{done.stderr}")
    return json.loads(found[1])


def last_output(command: list[str]) -> str:
    """The last line that a command prints, if it is there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return last_line(done.stdout) or "unknown"


def sanitizer_of(found: dict) -> str | None:
    home = Path(found["cuda home"])
    path = os.pathsep.join([os.environ.get("PATH", ""), str(home / "bin")])
    return shutil.which("compute-sanitizer", path=path)


def check(found: dict) -> None:
    """Exits where nothing can be done, with what is needed."""
    if not found["available"]:
        raise SystemExit(f"torch {found['torch']} finds no CUDA device; a GPU is what this is for")
    if lacking := {"setuptools", "ninja"} & set(found["missing"]):
        raise SystemExit(
            f"the build needs {' and '.join(sorted(lacking))}, which are not installed"
        )
    if not found["cuda home"]:
        raise SystemExit("the build needs nvcc, which was not found; CUDA_HOME says where it is")


def all_stages(python: str, found: dict, out: Path) -> list[Stage]:
    capability = found["capability"]
    home = Path(found["cuda home"])
    sanitizer = sanitizer_of(found) or "compute-sanitizer"
    tests = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    tests.sort(key=lambda name: "cuda" not in name)  # what only a GPU can show comes first
    unable = {"hypothesis": "test_properties.py", "expecttest": "test_operators.py"}
    left_out = [test for package, test in unable.items() if package in found["missing"]]
    graphs = "test_cuda_graphs.py"  # has stages of its own
    files = [f"tests/{name}" for name in tests if name not in [*left_out, graphs]]
    # A kernel that waits for ever is named after two minutes.
    pytest = [python, "-m", "pytest", "-q", "--device", "cuda", "-p", "no:cacheprovider"]
    pytest += ["-o", "faulthandler_timeout=120"]
    workers = [] if "xdist" in found["missing"] else ["-n", str(min(os.cpu_count(), 8))]
    checked, tables = ("pytest", "compute-sanitizer"), ("rich", "tqdm")

    def bench(name: str, *options: str) -> Step:
        command = [python, "benchmarks/bench.py", "--device", "cuda", "--rounds", "7"]
        command += ["--pass", "forward,backward,eval", "--json", str(out / f"{name}.json")]
        return Step([*command, *options])

    def steps(name: str, *options: str) -> Step:
        command = [python, "benchmarks/model.py", "--device", "cuda", "--networks", "resnet50"]
        command += ["--batch", "128", "--rounds", "9", "--json", str(out / f"{name}.json")]
        return Step([*command, *options])

    def sanitize(tool: str) -> Step:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "-x"]
        # Each tensor is an allocation of its own then, with nothing after its end.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Step([*command, "tests/test_cuda.py", "-k", "test_plan"], environment)

    build = Step(
        [python, "setup.py", "--quiet", "build_ext", "--inplace"],
        {
            "BATCHNORM_EXT_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": capability,
            "MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count()),
        },
    )
    nvcc = [str(home / "bin" / "nvcc"), "-O3", "-std=c++20"]
    nvcc += [f"-arch=sm_{capability.replace('.', '')}"]
    probes = str(ROOT / "build" / "probes")
    networks = ["--no-compile", "--dtype", "bf16,fp16,fp32", "--shapes"]
    low = ["--dtype", "bf16"]
    return [
        Stage(
            "build",
            10,
            [build],
            lambda text: last_line(text) or f"for {capability}",
            essential=True,
        ),
        Stage(
            "correctness",
            10,
            [Step([*pytest, *workers, "--maxfail=30", *files])],
            pytest_summary,
            needs=("pytest",),
        ),
        Stage("memcheck", 3, [sanitize("memcheck")], sanitizer_summary, needs=checked),
        Stage("racecheck", 3, [sanitize("racecheck")], sanitizer_summary, needs=checked),
        *(
            Stage(
                name,
                2,
                [Step([*pytest, f"tests/{graphs}", "-k", f"test_{name}"])],
                pytest_summary,
                needs=("pytest",),
            )
            for name in ("graph", "streams")
        ),
        Stage(
            "probes",
            2,
            [
                Step([*nvcc, "benchmarks/probes.cu", "-o", probes]),
                Step([probes], rows=out / "probes.json"),
            ],
            probe_summary,
        ),
        Stage(
            "tuning",
            6,
            [Step([python, "benchmarks/tune.py", *low, "--json", str(out / "tuning.json")])],
            tuning_summary,
            needs=tables,
        ),
        Stage(
            "layers",
            8,
            [
                bench("layers-256", *networks, "resnet50", "--batch", "256"),
                bench("layers-32", *networks, "resnet50,mobilenetv2,large"),
            ],
            verdict_summary,
            needs=tables,
        ),
        Stage(
            "compiled layers",
            5,
            [bench("layers-compiled", *low, "--shapes", "resnet50", "--batch", "256")],
            verdict_summary,
            needs=tables,
        ),
        Stage(
            "training steps",
            6,
            [steps("steps-eager", *low), steps("steps-compiled", *low, "--compile")],
            step_summary,
            needs=tables,
        ),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>-<date>")
    parser.add_argument("--stages", help="comma-separated names of some; all by default")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run on an H200, and no more"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    python = sys.executable
    if args.dry_run:
        home = "/usr/local/cuda"
        found = {"gpu": "NVIDIA H200", "capability": "9.0", "missing": [], "cuda home": home}
    else:
        found = survey(python)
        check(found)
    name = re.sub(r"\W+", "-", found["gpu"].lower())
    out = (args.out or ROOT / "benchmarks" / "results" / f"{name}-{date.today()}").resolve()
    todo = all_stages(python, found, out)
    if args.stages:
        chosen = args.stages.split(",")
        if unknown := set(chosen) - {stage.name for stage in todo}:
            raise SystemExit(f"no stage {', '.join(unknown)} among {[s.name for s in todo]}")
        todo = [stage for stage in todo if stage.name in chosen]
    if args.dry_run:
        for stage in todo:
            print(f"{stage.name}, at most {stage.minutes} minutes")
            print("\n".join(f"    {step}" for step in stage.steps))
        return

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    machine = {
        "gpu": found["gpu"],
        "driver": last_output(query),
        "torch": found["torch"],
        "cuda": found["cuda"],
        "nvcc": last_output([f"{found['cuda home']}/bin/nvcc", "--version"]),
        "cudnn": found["cudnn"],
        "python": found["python"],
        "commit": last_output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
        "date": str(date.today()),
    }
    missing = set(found["missing"])
    if not sanitizer_of(found):
        missing.add("compute-sanitizer")
    run = Run(out, machine, missing, args.minutes)
    run.tell("\n".join(f"{key}: {value}" for key, value in machine.items()))
    if missing:
        run.tell(f"missing, and what needs it is left out: {', '.join(sorted(missing))}")
    run.run(todo)
    if not {"rich", "tqdm"} & missing:
        report = [python, "benchmarks/report.py", "--gpu", str(out), "--print"]
        if "matplotlib" not in missing:
            report += ["--plot", str(out / "roofline.png")]
        run.execute(Step(report), 60)
    run.tell(f"results: {out}")
    sys.exit(any(outcome.status == "failed" for outcome in run.outcomes))


if __name__ == "__main__":
    main()
