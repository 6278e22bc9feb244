"""Commands in stages that share a number of minutes; what each gave is kept at once."""

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST_SECONDS = 20  # a stage is not begun with less


@dataclass
class Step:
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    rows: Path | None = None  # where to write the JSON objects that it prints, one a line

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


@dataclass
class Stage:
    """Steps that share some minutes at most; `summary` makes a line of what they printed."""

    name: str
    minutes: float
    steps: list[Step]
    summary: Callable[[str], str]
    needs: tuple[str, ...] = ()  # packages, or "compute-sanitizer"
    essential: bool = False  # nothing can follow if it fails


@dataclass
class Outcome:
    name: str
    status: str  # passed, failed, cut (out of time), skipped
    seconds: float
    summary: str


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def json_lines(text: str) -> list[dict]:
    """The objects that stand on lines of their own; the last line may have been cut."""
    return [json.loads(line) for line in text.splitlines() if line[:1] + line[-1:] == "{}"]


class Run:
    """Runs stages until the minutes are over, and keeps what came of them."""

    def __init__(self, out: Path, machine: dict, missing: set[str], minutes: float):
        self.out, self.machine, self.missing = out, machine, missing
        self.minutes, self.deadline = minutes, time.monotonic() + 60 * minutes
        self.outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.txt").open("w")

    def tell(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, todo: list[Stage]) -> None:
        for stage in todo:
            outcome = self.attempt(stage)
            self.outcomes.append(outcome)
            self.tell(f"--- {stage.name}: {outcome.status}, {outcome.summary}")
            self.save()
            if stage.essential and outcome.status != "passed":
                self.tell(f"nothing more can be done without {stage.name}")
                break

    def save(self) -> None:
        content = {"kind": "run", "machine": self.machine, "minutes": self.minutes}
        content["stages"] = [asdict(outcome) for outcome in self.outcomes]
        (self.out / "run.json").write_text(json.dumps(content, indent=1) + "\n")

    def attempt(self, stage: Stage) -> Outcome:
        if lacking := [name for name in stage.needs if name in self.missing]:
            return Outcome(stage.name, "skipped", 0, f"{', '.join(lacking)} missing")
        if self.left() < LEAST_SECONDS:
            return Outcome(stage.name, "skipped", 0, "no time left")
        limit = min(60 * stage.minutes, self.left())
        self.tell(f"\n=== {stage.name}, at most {limit / 60:.1f} of {self.left() / 60:.1f} minutes")
        begin, status, printed = time.monotonic(), "passed", ""
        for step in stage.steps:
            self.tell(f"$ {step}")
            code, text = self.execute(step, limit - (time.monotonic() - begin))
            printed += text
            if step.rows:
                content = {"kind": stage.name, "environment": self.machine}
                content["rows"] = json_lines(text)
                step.rows.write_text(json.dumps(content, indent=1) + "\n")
            if code is None:
                status = "cut"
                break
            if code != 0:
                status = "failed"  # what follows may do all the same
        seconds = time.monotonic() - begin
        return Outcome(stage.name, status, round(seconds, 1), stage.summary(printed))

    def execute(self, step: Step, seconds: float) -> tuple[int | None, str]:
        """The exit code, None if it ran out of time, and what it printed, which is passed on."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        settings = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10"}
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=os.environ | settings | step.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that what it starts can be ended with it
            )
        except OSError as error:
            self.tell(str(error))
            return 127, str(error)
        lines: list[str] = []

        def pass_on() -> None:
            for line in process.stdout:
                lines.append(line)
                self.tell(line.rstrip("\n"))

        reader = threading.Thread(target=pass_on, daemon=True)
        reader.start()
        try:
            code = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
        reader.join(10)
        return code, "".join(lines)


def end(process: subprocess.Popen) -> None:
    """Ends what is left of the process and of those that it started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue
