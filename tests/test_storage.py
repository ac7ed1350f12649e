"""Nothing half-written is ever seen."""

from pathlib import Path

import pytest

from launcher import storage


def test_a_directory_appears_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with storage.new_directory(target) as aside:
        (aside / "a").write_text("1")
        assert not target.exists()
    assert storage.file_sizes(target) == {"a": 1}


def test_a_directory_whose_making_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with storage.new_directory(tmp_path / "made") as aside:
            (aside / "a").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_makers_wins(tmp_path: Path) -> None:
    with storage.new_directory(tmp_path / "made") as slow:
        with storage.new_directory(tmp_path / "made") as fast:
            (fast / "fast").touch()
        (slow / "slow").touch()
    assert list(storage.file_sizes(tmp_path / "made")) == ["fast"]


def test_json_that_is_cut_off_reads_as_none(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "x.json", {"a": 1})
    assert storage.read_json(tmp_path / "x.json") == {"a": 1}
    (tmp_path / "x.json").write_text('{"a": ')
    assert storage.read_json(tmp_path / "x.json") is None
    assert storage.read_json(tmp_path / "none.json") is None
