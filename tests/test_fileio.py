"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsedm_compiler.fileio import explain_unpickling, replace_atomically


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


class Evil:
    """An object whose unpickling would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("content", "named"),
    [(Evil(), "system"), (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear")],
)
def test_explain_unpickling_names_what_is_refused_and_does_not_advise_to_run_it(
    content: Any, named: str, tmp_path: Path
) -> None:
    torch.save({"a": content}, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(tmp_path / "a.pt", weights_only=True)
    said = explain_unpickling(caught.value)
    assert re.search(named, said)
    assert "weights_only" not in said
    assert "add_safe_globals" not in said
    assert explain_unpickling(RuntimeError()) == "RuntimeError"
