"""The page of the file format says what the code does; run as a module it prints its table."""

from __future__ import annotations

import json
from math import log2
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler import Pattern
from sparsedm_compiler.files import CompactWeight, count_compact_bytes
from sparsedm_compiler.files.container import _FIELDS, PROVENANCE, VERSION, read_file
from sparsedm_compiler.files.digits import choose_word
from sparsedm_compiler.files.mask_code import count_digits, count_mask_bytes

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "format.md"
SHAPE = (1024, 1024)
PATTERNS = (
    *("1:2", "2:4", "1:4", "3:4", "1:8", "2:8", "4:8", "1:16", "2:16", "8:16", "1:32", "16:32"),
    *("2:4x4", "1:8x16", "1:2@64x16", "1:4@128x16", "1:2@64x32+2:4", "64:2:8", "64:2:16"),
    *("1:4t", "2:4t", "3:4t"),
)


def make_table() -> str:
    """Returns the table of sizes, in Markdown."""
    lines = [
        "| pattern | masks of a group | numbers in a word | bits per weight | bound "
        "| size / dense, 16 bit | 32 bit |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    weights = SHAPE[0] * SHAPE[1]
    for text in PATTERNS:
        pattern = Pattern.parse(text)
        digits = count_digits(pattern, SHAPE)
        bases = " and ".join(f"{base:,}" for _, base in digits)
        words = " and ".join("{} in {} B".format(*choose_word(base)) for _, base in digits)
        bits = 8 * count_mask_bytes(pattern, SHAPE) / weights
        bound = sum(count * log2(base) for count, base in digits) / weights
        half, full = (count_compact_bytes(text, SHAPE, n) / weights / n for n in (2, 4))
        cells = (f"`{text}`", bases, words, f"{bits:.4f}", f"{bound:.4f}")
        lines.append(f"| {' | '.join(cells)} | {half:.4f} | {full:.4f} |")
    return "\n".join(lines)


def test_table_of_sizes_is_what_the_code_gives() -> None:
    assert make_table() in PAGE.read_text(encoding="utf-8")


def test_page_names_every_field_and_the_version() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"format version {VERSION}" in text
    for name in [*_FIELDS, *PROVENANCE]:
        assert f"`{name}`" in text, name


def test_example_of_the_page_is_what_the_code_writes(tmp_path: Path) -> None:
    """By hand: ranks 1 and 4 of 2:4 in one word, 1 + 4 * 6 = 25; values row by row."""
    weight = torch.tensor([[5.0, 0, 6, 0, 0, 7, 0, 8]])
    packed = CompactWeight.pack(weight, Pattern.parse("2:4"))
    assert (packed.values.tolist(), packed.indices.tolist()) == ([5, 6, 7, 8], [25])
    tensors = {"w.sparsedm_values": packed.values, "w.sparsedm_indices": packed.indices}
    record = {"version": 5, "form": "compact"}
    record["compact"] = {"w": {"pattern": "2:4", "shape": [1, 8]}}  # type: ignore[assignment]
    save_file(tensors, tmp_path / "w.safetensors", {"sparsedm": json.dumps(record)})
    assert torch.equal(read_file(tmp_path / "w.safetensors").expand()["w"], weight)


def test_saved_record_holds_the_fields_of_the_page_alone(tmp_path: Path) -> None:
    student = sdm.compile(
        nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]), backend="eager", **{"pattern": "2:4"}
    )
    student(torch.zeros(1, 8))
    sdm.save(student, tmp_path / "s", form="compact")
    record = read_file(tmp_path / "s").record
    assert record is not None
    assert {*record} == {*_FIELDS, "version"}
    assert {*load_file(tmp_path / "s")} >= {"1.weight.sparsedm_values", "1.weight.sparsedm_indices"}


if __name__ == "__main__":
    print(make_table())
