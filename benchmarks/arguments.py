"""Command-line options that the benchmarks share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from environment import ALLOCATORS

OUT = Path(__file__).resolve().parent.parent / "build" / "bench"


def make_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--allocator",
        choices=(*ALLOCATORS, "both"),
        help="run under this allocator, or under each in turn (default: the one that is loaded)",
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved samples per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=OUT, help="directory of the CSV files")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute")
    return parser


def add_choice(
    parser: argparse.ArgumentParser,
    flag: str,
    names: Sequence[str],
    default: Sequence[str] | None = None,
    **kwargs,
) -> None:
    """An option that takes a comma-separated subset of the names; all of them by default."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(names):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(names)}")
        return chosen

    default = list(default or names)
    help = f"comma-separated, of {','.join(names)} (default {','.join(default)})"
    parser.add_argument(flag, type=parse, default=default, help=help, **kwargs)


def numbers(text: str) -> list[int]:
    """The type of an option that takes comma-separated integers."""
    return [int(part) for part in text.split(",")]
