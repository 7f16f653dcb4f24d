"""The entry point of ``sparsedm``, its parser, and the table of commands."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from .. import __version__
from . import (
    bench,
    check,
    convert,
    doctor,
    explain,
    export,
    fid,
    finetune,
    macs,
    prune,
    report,
    sample,
)
from .job import DONE, Command, execute

COMMANDS: Mapping[str, Command] = {
    "macs": macs,
    "prune": prune,
    "finetune": finetune,
    "sample": sample,
    "fid": fid,
    "bench": bench,
    "report": report,
    "explain": explain,
    "check": check,
    "convert": convert,
    "export": export,
    "doctor": doctor,
}
ABOUT = """\
Prune diffusion models to N:M sparsity, fine-tune them, sample, score and compare them.

See sparsedm COMMAND --help for the options of a command. With --dry-run a command checks the
whole request, prints what it would do, and writes nothing."""
STATUSES = """\
exit status: 0 success; 2 the request is wrong (the reason is printed); 1 failure while running;
130 interrupted by Ctrl-C; 143 ended by SIGTERM (a training run saves a checkpoint first)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``sparsedm``.

    Without a command it prints the help. Errors of this package, signals and failures of the system
    are printed as one line on stderr.

    Args:
        argv: The arguments without the program's name; None takes those of the process.

    Returns:
        The exit status: 0 success, 2 a request that cannot be carried out, 1 a failure while
        running, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        SystemExit: argparse printed the help (0) or rejected the arguments (2).

    Example:
        >>> main(["macs", "--list", "--dry-run"])
        would print the presets
        dry run: nothing was computed or written
        0
    """
    parser = argparse.ArgumentParser(
        prog="sparsedm",
        description=ABOUT,
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parts = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        part = parts.add_parser(
            name, help=command.ABOUT.split("\n")[0], formatter_class=parser.formatter_class
        )
        configure_parser(part, command)
    options, unknown = parser.parse_known_args(argv)
    if options.command is None:
        parser.print_help()
        return DONE
    if unknown:
        parts.choices[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return execute(f"sparsedm {options.command}", COMMANDS[options.command], options)


def run_command(command: Command, argv: Sequence[str] | None, prog: str) -> int:
    """Runs one command as a program of its own, as the scripts in examples/ do.

    Args:
        command: The module of the command, e.g. ``sparsedm_compiler.cli.macs``.
        argv: The arguments without the program's name; None takes those of the process.
        prog: The name of the program in its help and its errors.

    Returns:
        The exit status, as of ``main``.

    Raises:
        SystemExit: argparse printed the help (0) or rejected the arguments (2).
    """
    parser = argparse.ArgumentParser(
        prog=prog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    configure_parser(parser, command)
    return execute(prog, command, parser.parse_args(argv))


def configure_parser(parser: argparse.ArgumentParser, command: Command) -> None:
    """Adds the help text and the options of a command to its parser."""
    parser.description = command.ABOUT
    parser.epilog = f"example:\n{command.EXAMPLE}"
    command.add_options(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the whole request, print what would be done, and stop",
    )
