"""The command line as a whole: help, exit statuses, signals, and what importing it costs."""

from __future__ import annotations

import argparse
import ast
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparsedm_compiler.cli
from sparsedm_compiler.cli import main
from sparsedm_compiler.cli.commands import COMMANDS
from sparsedm_compiler.cli.job import Job, check_writable, execute
from sparsedm_compiler.errors import (
    ConfigError,
    DataError,
    DenseRunError,
    KernelError,
    SparseDMError,
    StoppedError,
)
from tests.cli.conftest import Shell

FOLDER = Path(sparsedm_compiler.cli.__file__).parent


def test_python_m_prints_the_help() -> None:
    command = [sys.executable, "-m", "sparsedm_compiler", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("usage: sparsedm ")
    assert [name for name in COMMANDS if f"\n    {name} " not in done.stdout] == []


def test_commands_are_complete() -> None:
    assert [*COMMANDS] == [
        "macs",
        "prune",
        "finetune",
        "sample",
        "fid",
        "bench",
        "report",
        "explain",
        "check",
        "convert",
        "export",
        "doctor",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_that_the_parser_accepts(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    out = capsys.readouterr().out
    assert f"example:\n{COMMANDS[name].EXAMPLE}" in out
    assert "--dry-run" in out
    parser = argparse.ArgumentParser(exit_on_error=False)
    COMMANDS[name].add_options(parser)
    parser.add_argument("--dry-run", action="store_true")
    lines = COMMANDS[name].EXAMPLE.replace("\\\n", " ").splitlines()
    assert lines
    for line in lines:
        parser.parse_args(line.replace('"', "").split(name, 1)[1].split())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["prun"], "invalid choice: 'prun'"),
        (["report", "--ot", "a"], "sparsedm report: error: "),
        (["finetune", "--dta", "a"], "usage: sparsedm finetune "),
    ],
    ids=["command", "argument", "option"],
)
def test_main_with_a_typo_is_a_usage_error_of_its_command(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert says in capsys.readouterr().err


def test_main_without_a_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert capsys.readouterr().out == alone
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"sparsedm {sparsedm_compiler.__version__}\n"


LIGHT_CALLS = ([], ["--help"], ["--version"], ["prune"], ["fid", "--help"], ["macs", "--mdel", "a"])


def test_help_and_typos_import_no_torch() -> None:
    code = """
import sys
from sparsedm_compiler.cli import main
for argv in {calls!r}:
    try:
        main(argv)
    except SystemExit:
        pass
print(sorted({{"torch", "numpy", "tabulate"}} & {{*sys.modules}}))
"""
    command = [sys.executable, "-c", code.format(calls=LIGHT_CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_command_modules_import_no_torch_at_the_top(path: Path) -> None:
    """Only light modules of ours and the standard library, outside of functions."""
    light = {"errors", "optional_deps", "progress", ""}
    modules = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.append(node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.level == 2:
            assert (node.module or "").partition(".")[0] in light, ast.unparse(node)
    outside = {name.partition(".")[0] for name in modules} - {*sys.stdlib_module_names}
    assert not outside


class Fake:
    """A command that runs a given action, early (in prepare) or late."""

    ABOUT = EXAMPLE = ""

    def __init__(self, action: Callable[[], None], *, early: bool = False) -> None:
        self.action, self.early, self.ran = action, early, False

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """None."""

    def prepare(self, options: argparse.Namespace) -> Job:
        if self.early:
            self.action()
        return Job(("would act",), self.run)

    def run(self) -> None:
        self.ran = True
        if not self.early:
            self.action()


def status(action: Callable[[], None], *, dry: bool = False, early: bool = False) -> int:
    return execute("sparsedm fake", Fake(action, early=early), argparse.Namespace(dry_run=dry))


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize("early", [True, False], ids=["checking", "running"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("no\n  such option"), 2),
        (DataError("no\nsuch   option"), 2),
        (SparseDMError("no such\noption"), 1),  # the loss of a training run is NaN
        (DenseRunError("no such\noption"), 1),
        (KernelError("no such\noption"), 1),
        (OSError("no such\noption"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_execute_prints_an_error_as_one_line_and_returns_its_status(
    error: Exception, expected: int, early: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(raising(error), early=early) == expected
    assert capsys.readouterr() == ("", "sparsedm fake: no such option\n")


def test_execute_where_a_device_has_no_memory_left_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = "CUDA out of memory. Tried to allocate 2 GiB. Of the allocated memory 1 GiB is"
    for error in (torch.OutOfMemoryError(f"{said} mine"), RuntimeError("not enough memory: 3 TB")):
        assert status(raising(error)) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.endswith("; take a smaller batch or model, or a device with more memory\n")
        assert "Of the allocated" not in err
        assert err.count("\n") == 1
    with pytest.raises(RuntimeError):
        status(raising(RuntimeError("something else")))


def test_execute_lets_other_exceptions_through() -> None:
    with pytest.raises(ZeroDivisionError):
        status(raising(ZeroDivisionError()))


def test_execute_dry_run_prints_the_job_and_does_not_run_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = Fake(lambda: None)
    assert execute("x", fake, argparse.Namespace(dry_run=True)) == 0
    assert not fake.ran
    assert capsys.readouterr().out == "would act\ndry run: nothing was computed or written\n"
    assert execute("x", fake, argparse.Namespace(dry_run=False)) == 0
    assert fake.ran
    assert status(raising(ConfigError("x")), dry=True, early=True) == 2


def test_execute_on_a_signal_returns_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert status(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert status(raising(KeyboardInterrupt())) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    err = capsys.readouterr().err
    assert err == "sparsedm fake: terminated\nsparsedm fake: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_execute_of_a_stopped_run_returns_the_status_of_its_signal(number: signal.Signals) -> None:
    def action() -> None:
        received: list[int] = []
        before = signal.signal(number, lambda number, frame: received.append(number))
        os.kill(os.getpid(), number)
        signal.signal(number, before)
        assert received == [number]
        raise StoppedError("saved")

    assert status(action) == 128 + number


def test_execute_with_a_closed_pipe_prints_no_traceback() -> None:
    code = (
        "import argparse, sys\n"
        "from sparsedm_compiler.cli.job import Job, execute\n"
        "class Talks:\n"
        "    def prepare(self, options):\n"
        "        return Job((), lambda: print('much to say\\n' * 100_000))\n"
        "sys.exit(execute('x', Talks(), argparse.Namespace(dry_run=False)))\n"
    )
    talker = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert talker.stdout is not None
    assert talker.stderr is not None
    assert talker.stdout.readline() == "much to say\n"
    talker.stdout.close()
    assert talker.stderr.read() == ""
    assert talker.wait(timeout=120) == 1
    talker.stderr.close()


def test_check_writable_accepts_new_paths_and_refuses_others(shell: Shell) -> None:
    (shell.folder / "file").write_text("")
    (shell.folder / "folder").mkdir()
    assert check_writable("new/deep/file.png") == Path("new/deep/file.png")
    assert check_writable("file") == Path("file")
    assert check_writable("folder", folder=True) == Path("folder")
    for path, folder, says in (
        ("folder", False, "cannot write folder: it is a folder, name a file"),
        ("file", True, "cannot write file: it is a file, name a folder"),
        ("file/below", False, "cannot write file/below: file is a file, not a folder"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_writable(path, folder=folder)
    assert not (shell.folder / "new").exists()
