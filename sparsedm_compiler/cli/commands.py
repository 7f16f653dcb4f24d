"""``main``: the parser of all commands, and which module each of them is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from . import bench, explain, fid, finetune, macs, report, sample
from .job import Command, execute

COMMANDS: Mapping[str, Command] = {
    "macs": macs,
    "finetune": finetune,
    "sample": sample,
    "fid": fid,
    "bench": bench,
    "report": report,
    "explain": explain,
}
ABOUT = """\
Prune diffusion models to N:M sparsity, fine-tune them, sample, score and compare them.

Every command explains itself: sparsedm COMMAND --help. With --dry-run it checks everything,
says what it would do, and writes nothing."""
STATUSES = """\
exit status: 0 done; 2 the request is wrong, one line says why; 1 something failed on the way;
130 interrupted by Ctrl-C; 143 ended by SIGTERM (a training run has saved itself first)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="sparsedm",
        description=ABOUT,
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        part = parts.add_parser(
            name, help=command.ABOUT.split("\n")[0], formatter_class=parser.formatter_class
        )
        describe(part, command)
    options = parser.parse_args(argv)
    return execute(f"sparsedm {options.command}", COMMANDS[options.command], options)


def run_command(command: Command, argv: Sequence[str] | None, prog: str) -> int:
    """Run one command as a program of its own called ``prog``; the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    describe(parser, command)
    return execute(prog, command, parser.parse_args(argv))


def describe(parser: argparse.ArgumentParser, command: Command) -> None:
    """Text and options of a command."""
    parser.description = command.ABOUT
    parser.epilog = f"example:\n{command.EXAMPLE}"
    command.add_options(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be done, and stop"
    )
