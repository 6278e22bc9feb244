"""Command-line pieces that the benchmarks share."""

import argparse
from collections.abc import Sequence


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
