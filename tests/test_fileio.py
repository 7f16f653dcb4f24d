"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsedm_compiler.fileio import replace_atomically


def listing(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_replace_atomically_when_the_block_ends_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with replace_atomically(path) as part:
            part.write_text(text)
            assert listing(path.parent).get("a.txt") != text
        assert listing(path.parent) == {"a.txt": text}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_replace_atomically_when_the_block_raises_keeps_the_old_file(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fails(text: str | None) -> None:
        with replace_atomically(path) as part:
            if text is not None:
                part.write_text(text)
            raise error

    for text in (None, "half"):
        with pytest.raises(error):
            fails(text)
    assert listing(tmp_path) == {"a.txt": "before"}


def test_replace_atomically_overwrites_the_part_of_a_killed_process(tmp_path: Path) -> None:
    with replace_atomically(tmp_path / "a.txt") as left:
        left.write_text("")
    left.write_text("half, and longer than the whole")
    with replace_atomically(tmp_path / "a.txt") as part:
        part.write_text("whole")
    assert listing(tmp_path) == {"a.txt": "whole"}
