"""The report command; the page itself is tested in tests/reporting/test_page.py."""

from __future__ import annotations

from tests.cli.conftest import Shell
from tests.reporting.run_folders import run, unfinished


def test_runs_become_a_page(shell: Shell) -> None:
    folders = [run(shell.folder / "a"), unfinished(shell.folder / "b", seed=1)]
    said = shell.dry("report", *folders)
    assert said.out.splitlines()[:3] == [
        "a: sparsedm 2:4, seed 0, 64,000 images",
        "b: sparsedm 2:4, seed 1, 12,800 images, unfinished",
        "would write report.html",
    ]
    said = shell("report", *folders, "--out", "pages/both.html")
    assert (said.status, said.out) == (0, "wrote pages/both.html\n")
    assert "2 training runs compared" in (shell.folder / "pages" / "both.html").read_text()


def test_what_cannot_be_reported(shell: Shell) -> None:
    folder = run(shell.folder / "a")
    for ask in (shell, shell.dry):
        assert "is no folder of a run" in ask("report", "nowhere").reason
        assert "is named twice" in ask("report", folder, folder).reason
        assert "it is a folder, name a file" in ask("report", folder, "--out", folder).reason
