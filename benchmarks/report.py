"""Writes measured tables into the README, between markers that name them.

    python benchmarks/report.py layers.json mapped.json steps.json sync.json
    python benchmarks/report.py --gpu  # of the newest benchmarks/results/<gpu>-<date>

Each `<!-- bench:NAME:begin -->` ... `<!-- bench:NAME:end -->` in the README whose table the given
files hold is replaced; a missing marker leaves that table out. Several files of one kind (say,
one dtype each) are joined.
"""

import argparse
import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from networks import NETWORKS
from results import (
    KINDS,
    Alone,
    Row,
    copy_verdicts,
    gpu_verdicts,
    layer_verdicts,
    load,
    step_verdicts,
    sync_verdicts,
)
from tables import (
    Table,
    gpu_table,
    mapped_table,
    shapes_table,
    step_table,
    summary_table,
    sync_table,
    verdict_table,
)

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"
NO_GPU = "No result yet: none of this has run on a GPU."


def join(files: Iterable[dict]) -> tuple[dict, dict[str, list]]:
    """The one environment of all files, and the rows by kind of file."""
    environments, rows = [], {kind: [] for kind in KINDS}
    for file in files:
        if file["settings"].get("quick"):
            raise SystemExit("a --quick run is a smoke test, not a measurement")
        environments.append(file["environment"])
        rows[file["kind"]] += file["rows"]
    first = environments[0]
    for other in environments[1:]:
        if differing := [key for key in first if key != "date" and first[key] != other[key]]:
            raise SystemExit(f"the files differ in {', '.join(differing)}: one table, one machine")
    return first, rows


def newest_gpu_results() -> Path | None:
    """Of the directories <gpu>-<year>-<month>-<day> that hold a run."""
    directories = [path.parent for path in RESULTS.glob("*/run.json")]
    return max(directories, key=lambda path: path.name[-len("2000-01-01") :], default=None)


def gpu_results(directory: Path) -> tuple[dict, list[Row], list[dict]]:
    """The environment, the layers (each case once, by its fullest measurement) and the steps."""
    files = [load(path) for path in sorted(directory.glob("*.json"))]
    files = [file for file in files if file["kind"] in ("gpu layers", "gpu steps")]
    if not files:
        return {}, [], []
    machine, rows = join(files)
    cases: dict[tuple, Row] = {}
    for row in sorted(rows["gpu layers"], key=lambda row: len(row.seconds)):
        cases[row.shape, row.kind, row.what] = row
    return machine, list(cases.values()), rows["gpu steps"]


def gpu_block(directory: Path | None) -> str:
    """What a run on a GPU found: the machine, the stages, the layers, the steps, the musts."""
    if directory is None:
        return NO_GPU
    run = json.loads((directory / "run.json").read_text())
    machine, layers, steps = gpu_results(directory)
    parts = [" ".join(f"{key} {value}," for key, value in run["machine"].items())[:-1] + "."]
    stages = [
        [s["name"], s["status"], s["summary"].replace("|", r"\|"), f"{s['seconds']:.0f} s"]
        for s in run["stages"]
    ]
    parts.append(Table("Stages", ["stage", "status", "result", "time"], stages).markdown())
    if layers:
        parts += [gpu_table(layers).markdown()]
    if steps:
        parts += [step_table(steps).markdown()]
    if layers:
        verdicts = [v for v in gpu_verdicts(layers) if v.value is not None]
        parts += [verdict_table(verdicts).markdown()]
    return "\n\n".join(parts)


def environment_sentence(machine: dict) -> str:
    return (
        f"{machine['cpu']} ({machine['isa']}), {machine['cores']} cores, {machine['threads']} "
        f"threads, transparent huge pages: {machine['huge pages']}; torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date']}."
    )


def blocks(files: Iterable[dict]) -> dict[str, str]:
    """Marker name -> markdown."""
    machine, rows = join(files)
    alone = Alone.of(chain.from_iterable(rows.values()))
    if not alone.enough:
        raise SystemExit(f"{alone} Measure on an idle machine.")
    result = {"environment": f"{environment_sentence(machine)} {alone}"}
    verdicts = []
    if layers := rows["layers"]:
        result["summary"] = summary_table(layers).markdown()
        for network in NETWORKS:
            result[network] = shapes_table(layers, network).markdown()
        verdicts += layer_verdicts(layers)
    if mapped := rows["mapped"]:
        result["mapped"] = mapped_table(mapped).markdown()
        verdicts += copy_verdicts(mapped)
    if steps := rows["steps"]:
        result["steps"] = step_table(steps).markdown()
        verdicts += step_verdicts(steps)
    return result | {"musts": verdict_table(verdicts).markdown()}


def sync_blocks(file: dict) -> dict[str, str]:
    """Marker name -> markdown, of bench_sync.py: ranks of one thread, apart from the others."""
    rows = file["rows"]
    environment = f"{environment_sentence(file['environment'])} {Alone.of(rows)}"
    tables = {
        f"sync-{ranks}-{batch}": sync_table(rows, ranks, batch).markdown()
        for ranks, batch in {(row["ranks"], row["batch"]) for row in rows}
    }
    musts = verdict_table(sync_verdicts(rows)).markdown()
    return {"sync-environment": environment, "sync-musts": musts} | tables


def fill(text: str, blocks: dict[str, str]) -> tuple[str, list[str]]:
    """The text with every marked block replaced, and the names of those found."""
    found = []
    for name, block in blocks.items():
        begin, end = f"<!-- bench:{name}:begin -->", f"<!-- bench:{name}:end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        text, count = pattern.subn(lambda _, new=f"{begin}\n{block}\n{end}": new, text)
        found += [name] * bool(count)
    return text, found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="written by --json")
    parser.add_argument(
        "--gpu",
        nargs="?",
        type=Path,
        const=newest_gpu_results(),
        default=False,
        metavar="DIR",
        help="written by gpu_run.py; the newest results that are committed if left out",
    )
    parser.add_argument("--plot", type=Path, help="with --gpu: draw a roofline")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--print", action="store_true", help="print the tables instead")
    args = parser.parse_args()
    tables = {}
    if args.files:
        files = [load(path) for path in args.files]
        if local := [file for file in files if file["kind"] != "sync"]:
            tables |= blocks(local)
        for file in files:
            if file["kind"] == "sync":
                tables |= sync_blocks(file)
    if args.gpu is not False:
        tables["gpu"] = gpu_block(args.gpu)
    if args.plot:
        machine, layers, _ = gpu_results(args.gpu)
        if layers:
            from plot import roofline  # matplotlib takes a second to import

            roofline(layers, machine, args.plot)
    if not tables:
        parser.error("neither files nor --gpu")
    if args.print:
        print("\n\n".join(f"{name}\n\n{block}" for name, block in tables.items()))
        return
    text, found = fill(args.readme.read_text(), tables)
    if not found:
        raise SystemExit(f"{args.readme.name} has none of the markers of {', '.join(tables)}")
    args.readme.write_text(text)
    print(f"{args.readme.name}: wrote {', '.join(found)}")


if __name__ == "__main__":
    main()
