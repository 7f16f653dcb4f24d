"""The report command; the page itself is tested in tests/reporting/test_page.py."""

from __future__ import annotations

from tests.cli.conftest import Shell
from tests.reporting.run_folders import write_run, write_unfinished_run


def test_report_writes_a_page(shell: Shell) -> None:
    folders = [write_run(shell.folder / "a"), write_unfinished_run(shell.folder / "b", seed=1)]
    result = shell.dry("report", *folders)
    assert result.out.splitlines()[:3] == [
        "a: sparsedm 2:4, seed 0, 64,000 images",
        "b: sparsedm 2:4, seed 1, 12,800 images, unfinished",
        "would write report.html",
    ]
    result = shell("report", *folders, "--out", "pages/both.html")
    assert (result.status, result.out) == (0, "wrote pages/both.html\n")
    assert "2 training runs compared" in (shell.folder / "pages" / "both.html").read_text()


def test_report_of_an_invalid_request_is_refused(shell: Shell) -> None:
    folder = write_run(shell.folder / "a")
    for ask in (shell, shell.dry):
        assert "is no folder of a run" in ask("report", "nowhere").reason
        assert "is named twice" in ask("report", folder, folder).reason
        assert "it is a folder, name a file" in ask("report", folder, "--out", folder).reason
