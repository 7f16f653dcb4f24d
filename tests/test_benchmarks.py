"""Every benchmark says what it does, whatever the modules around it are called today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ASK = """
import runpy, sys
sys.path.insert(0, "benchmarks")
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, path
"""


def test_every_benchmark_shows_its_help() -> None:
    paths = sorted(BENCHMARKS.glob("*.py"))
    assert len(paths) > 5
    run = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", ASK, *map(str, paths)],
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("usage: ") == len(paths)
