"""The documentation is true: its Python runs, its commands parse, and the site builds."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsedm_compiler.cli.commands import COMMANDS, configure_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OTHERS = ("develop", "results")  # run by tests/develop; made of numbers
PAGES = sorted(
    str(path.relative_to(DOCS))
    for path in DOCS.rglob("*.md")
    if path.relative_to(DOCS).parts[0] not in OTHERS
)
NEEDS = {"guides/export.md": "onnxscript"}
"""Pages whose Python needs a package that is not always installed."""
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read_blocks(path: Path, language: str) -> list[str]:
    """The code of a page in one language."""
    return [m[2] for m in FENCE.finditer(path.read_text(encoding="utf-8")) if m[1] == language]


@pytest.mark.parametrize("page", [p for p in PAGES if read_blocks(DOCS / p, "python")])
def test_python_of_a_page_runs_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in read_blocks(DOCS / page, "python"):
        exec(block, names)
    printed = capsys.readouterr().out
    for block in read_blocks(DOCS / page, "text"):
        for line in block.splitlines():
            assert line == "..." or line in printed


def list_commands() -> Iterator[tuple[str, str]]:
    """(page, command line) of every ``sparsedm`` in the documentation."""
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        text = "".join(read_blocks(path, "bash")).replace("\\\n", " ")
        for line in text.splitlines():
            match = re.search(r"(?:sparsedm|-m sparsedm_compiler) (.*)", line)
            if match and "pip install" not in line:
                yield str(path.relative_to(ROOT)), match[1]


@pytest.mark.parametrize(("page", "line"), [*list_commands()])
def test_command_of_a_page_parses(page: str, line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    parser = argparse.ArgumentParser(prog=f"sparsedm {name}", exit_on_error=False)
    configure_parser(parser, COMMANDS[name])
    parser.parse_args(arguments)


def test_messages_of_the_page_on_troubleshooting_are_those_of_the_package() -> None:
    package = "".join(path.read_text() for path in (ROOT / "sparsedm_compiler").rglob("*.py"))
    source = re.sub(r"\"\s*\n\s*f?r?\"", "", package)  # a message may be several strings
    rows = re.findall(
        r"^\| (.*?) \|", (DOCS / "guides/troubleshooting.md").read_text(), re.MULTILINE
    )
    quoted = [text for row in rows for text in re.findall(r"\"(.*?)\"", row)]
    parts = [part.strip() for text in quoted for part in text.split("…") if part.strip()]
    assert len(parts) > 30
    assert not [part for part in parts if part not in source]


def test_links_of_the_readme_lead_to_files() -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", (ROOT / "README.md").read_text())
    assert len(targets) > 10
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "reference/api/index.html").read_text()
    assert 'id="sparsedm_compiler.compile"' in api
    configuration = (tmp_path / "reference/configuration/index.html").read_text()
    assert "static_mask" in configuration
