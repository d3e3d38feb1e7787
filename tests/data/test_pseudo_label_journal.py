"""The journal of pseudo-labels: what a kill leaves, what other settings are refused for, and who may write."""

from __future__ import annotations

from pathlib import Path

import pytest

from s3distill.data.pseudo_label_journal import Journal

SETTINGS = {"teacher": "abc", "beam": 5}


def batch(number: int, *indices: int) -> dict:
    return {"batch": number, "utterances": [{"index": i, "hypotheses": []} for i in indices]}


def test_parts_of_any_number_of_shards_join(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", SETTINGS)
    assert journal.read() == ({}, set())
    with journal.append(1, 2) as writer:
        writer.write(batch(0, 4, 1))
    with journal.append(2, 3) as writer:
        writer.write(batch(1, 2))
    decoded, batches = journal.read()
    assert sorted(decoded) == [1, 2, 4] and batches == {0, 1}


def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SETTINGS)
    with journal.append(1, 1) as writer:
        writer.write(batch(0, 0))
        writer.write(batch(1, 1))
    part = tmp_path / "part-1-of-1.jsonl"
    whole = part.read_bytes()
    for length in range(len(whole)):  # wherever it was killed
        part.write_bytes(whole[:length])
        assert journal.read()[1] <= {0}
        with journal.append(1, 1) as writer:
            writer.write(batch(7, 7))
        assert journal.read()[1] - {0} == {7}


def test_other_settings_are_refused_by_name_and_dropped_on_request(tmp_path: Path) -> None:
    with Journal(tmp_path, SETTINGS).append(1, 1) as writer:
        writer.write(batch(0, 0))
    other = Journal(tmp_path, {"teacher": "xyz", "beam": 5})
    with pytest.raises(ValueError, match="must be of this run, but was decoded with another teacher; pass --overwrite"):
        other.read()
    Journal(tmp_path, SETTINGS).drop_foreign()
    assert Journal(tmp_path, SETTINGS).read()[1] == {0}
    other.drop_foreign()
    assert other.read() == ({}, set())


def test_two_processes_cannot_write_one_part(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SETTINGS)
    with (
        journal.append(1, 2),
        journal.append(2, 2),
        pytest.raises(RuntimeError, match=r"part-1-of-2\.jsonl must be written by one process, but another one"),
        journal.append(1, 2),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "message"), [("[1]\n", ":1: a line of the journal must"), ("{}\n", "has no settings")]
)
def test_a_file_that_is_no_journal_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "part-1-of-1.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        Journal(tmp_path, SETTINGS).read()
