"""Rows by position in a folder: whole or not there at all, whatever happens meanwhile."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsedm_compiler import DataError
from sparsedm_compiler.data import row_cache
from sparsedm_compiler.data.row_cache import RowCache, read_cache
from sparsedm_compiler.data.rowfile import read_header

SHAPE = (2, 3)


def make_rows(count: int) -> Tensor:
    return torch.arange(count * 6, dtype=torch.float32).reshape(count, *SHAPE)


def make_cache(folder: Path, total: int = 10, per_part: int = 4) -> RowCache:
    """A cache whose rows lie in several parts."""
    cache = RowCache(folder, {"of": "a test"}, torch.float32, SHAPE, per_part=per_part)
    cache.reserve(total)
    return cache


def test_rows_are_read_as_they_were_written_over_parts_and_by_another_reader(
    tmp_path: Path,
) -> None:
    cache, rows = make_cache(tmp_path / "cache"), make_rows(10)
    assert cache.count_missing(0, 10) == 10
    cache.write(7, rows[7:])
    cache.write(0, rows[:7])
    other = read_cache(tmp_path / "cache")
    assert other is not None
    assert other.about == {"of": "a test"}
    assert (other.dtype, other.shape, other.per_part) == (torch.float32, SHAPE, 4)
    for one in (cache, other):
        assert one.count_missing(0, 10) == 0
        read = one.read(2, 7)
        assert read is not None
        assert torch.equal(read, rows[2:9])
    assert other.count_missing(0, 14) == 4  # two of the third part, two that have no part
    assert other.read(9, 2) is None
    other.reserve(14)
    other.write(12, rows[:2])
    assert other.count_missing(0, 14) == 2


def test_record_when_two_caches_are_made_at_once_is_that_of_the_first(tmp_path: Path) -> None:
    made = [RowCache(tmp_path, {"of": n}, torch.float32, SHAPE, per_part=n) for n in (2, 3)]
    for cache in made:
        cache.claim()
    record = read_cache(tmp_path)
    assert record is not None
    assert (record.about, record.per_part) == ({"of": 2}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


def test_parts_when_another_process_finds_no_room_stay_with_their_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_late(handle: int, size: int) -> None:
        monkeypatch.undo()
        make_cache(tmp_path)
        raise OSError("no room")

    monkeypatch.setattr(row_cache, "reserve_bytes", fail_late)
    with pytest.raises(DataError, match="no room"):
        make_cache(tmp_path)
    assert read_cache(tmp_path) is not None
    assert len([*tmp_path.glob("*.safetensors")]) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_narrow_type_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = RowCache(tmp_path, {}, dtype, SHAPE, total=2)
    cache.reserve(2)
    rows = torch.randn(2, *SHAPE)
    cache.write(0, rows)
    read = cache.read(0, 2)
    assert read is not None
    assert torch.equal(read, rows.to(dtype))


def test_parts_are_reserved_whole_and_their_size_is_known_before(tmp_path: Path) -> None:
    cache = RowCache(tmp_path, {}, torch.float32, SHAPE, per_part=4)
    assert cache.count_unreserved_bytes(10) == cache.count_bytes(10)
    cache.reserve(10)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.safetensors"))]
    assert len(sizes) == 3
    assert sum(sizes) == cache.count_bytes(10)
    assert cache.count_unreserved_bytes(10) == 0
    assert sum(path.stat().st_blocks for path in tmp_path.glob("*.safetensors")) * 512 >= 3 * 100
    tensors, _ = read_header(tmp_path / "000000000004.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "rows": (4, *SHAPE),
        "sums": (4,),
    }


def test_row_that_is_torn_or_has_no_sum_is_not_there(tmp_path: Path) -> None:
    cache, rows = make_cache(tmp_path), make_rows(4)
    cache.write(0, rows)
    path = tmp_path / "000000000000.safetensors"
    start = read_header(path)[0]["rows"].start
    content = bytearray(path.read_bytes())
    content[start + 24 + 3] ^= 1  # a bit of row 1: its write was cut off before the last byte
    path.write_bytes(content)
    again = read_cache(tmp_path)
    assert again is not None
    assert again.read(1, 1) is None
    assert again.read(0, 2) is None
    for intact in (0, 2, 3):
        read = again.read(intact, 1)
        assert read is not None
        assert torch.equal(read[0], rows[intact])
    again.write(1, rows[1:2])
    assert again.read(0, 4) is not None


def test_process_that_dies_between_a_row_and_its_sum_leaves_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, writes = make_cache(tmp_path), []
    own = row_cache.write_at

    def write_at(handle: int, position: int, content: bytes) -> None:
        writes.append(position)
        if len(writes) == 4:  # the sum of the second row
            raise KeyboardInterrupt
        own(handle, position, content)

    monkeypatch.setattr(row_cache, "write_at", write_at)
    with pytest.raises(KeyboardInterrupt):
        cache.write(0, make_rows(4))
    assert cache.read(0, 1) is not None
    assert cache.read(1, 1) is None
    assert cache.count_missing(0, 4) == 3


def test_full_disk_is_found_before_anything_is_written(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # beyond it is an OSError
    try:
        with pytest.raises(DataError, match="cannot write"):
            RowCache(tmp_path / "cache", {}, torch.float32, SHAPE, total=100).reserve(100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cache.json", "{", "cannot read .*cache.json"),
        ("cache.json", "[]", "cannot read .*cache.json"),
        ("cache.json", '{"version": 7}', "version 7, this package reads 1"),
        ("000000000000.safetensors", "no file", "cannot read .*as safetensors"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: str, says: str) -> None:
    make_cache(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says):
        read_first_row(tmp_path)


def read_first_row(folder: Path) -> None:
    cache = read_cache(folder)
    assert cache is not None
    cache.read(0, 1)


def test_part_of_another_cache_is_refused(tmp_path: Path) -> None:
    make_cache(tmp_path / "one", per_part=5)
    make_cache(tmp_path / "two")
    part = "000000000000.safetensors"
    (tmp_path / "two" / part).write_bytes((tmp_path / "one" / part).read_bytes())
    cache = read_cache(tmp_path / "two")
    assert cache is not None
    with pytest.raises(DataError, match="no part of the cache"):
        cache.read(0, 1)
    assert read_cache(tmp_path / "none") is None
