"""tqdm-seg COMMAND: every program of the project under one name."""

import sys
from collections.abc import Sequence

from . import __version__
from .commands import COMMANDS, SOURCES, start
from .program import did_you_mean

PREPARE = "prepare"


def usage() -> str:
    """All commands, a line each; datasets share one."""
    lines = {name: command.summary for name, command in COMMANDS.items() if not name.startswith(PREPARE)}
    lines = {"train": lines.pop("train"), f"{PREPARE} NAME": f"datasets to shards: {', '.join(SOURCES)}"} | lines
    width = max(map(len, lines))
    body = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in lines.items())
    return f"usage: tqdm-seg COMMAND [OPTIONS]      tqdm-seg COMMAND --help      tqdm-seg --version\n\n{body}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line `tqdm-seg`; its exit status."""
    first, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if first in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if first == "--version":
        print(f"tqdm-segmentation {__version__}")
        return 0
    if first == PREPARE:
        dataset, *rest = rest or ["--help"]
        if dataset in ("-h", "--help"):
            print(f"usage: tqdm-seg prepare NAME ...      tqdm-seg prepare NAME --help\n\nNAME: {', '.join(SOURCES)}")
            return 0
        first = f"{PREPARE} {dataset}"
    if first not in COMMANDS:
        print(f"error: no command {first!r}{did_you_mean(first, list(COMMANDS))}; see tqdm-seg --help", file=sys.stderr)
        return 2
    return start(first, rest)


if __name__ == "__main__":
    sys.exit(main())
