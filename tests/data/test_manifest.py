"""Manifests: what is written is read back, and a write is whole or not at all."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3distill.data.manifest import (
    read_dictionary,
    read_labels,
    read_manifest,
    write_dictionary,
    write_lines,
    write_manifest,
)

names = st.text(st.characters(exclude_categories=["C"], exclude_characters="\t"), min_size=1).filter(str.strip)


@given(entries=st.dictionaries(names, st.integers(1, 10**9), min_size=1))
def test_write_and_read_manifest(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("m") / "a.tsv"
    write_manifest(path, ".", entries.items())
    manifest = read_manifest(path)
    assert manifest.entries == list(entries.items())
    assert manifest.root == path.parent and manifest.num_samples == sum(entries.values())


@given(
    counts=st.dictionaries(
        st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), st.integers(0), min_size=1
    )
)
def test_write_and_read_dictionary(tmp_path_factory, counts):
    path = tmp_path_factory.mktemp("d") / "dict.ltr.txt"
    write_dictionary(path, counts)
    assert list(read_dictionary(path).items()) == list(counts.items())


def test_labels_keep_unusual_line_separators(tmp_path):
    (tmp_path / "a.wrd").write_text("A\u0085B\u2028C\nD\n", encoding="utf-8")
    assert read_labels(tmp_path / "a.wrd") == ["A\u0085B\u2028C", "D"]


@pytest.mark.parametrize(
    ("root", "expected"), [("/data/x", "/data/x"), (".", "here"), ("../b", "b"), ("clips", "here/clips")]
)
def test_root(tmp_path, root, expected):
    (tmp_path / "here").mkdir()
    write_manifest(tmp_path / "here" / "a.tsv", root, [("c.wav", 1)])
    manifest = read_manifest(tmp_path / "here" / "a.tsv")
    assert manifest.root == tmp_path / expected
    assert manifest.audio_path(0) == tmp_path / expected / "c.wav"


def test_fairseq_overwrite_flag_in_a_dictionary(tmp_path):
    (tmp_path / "dict.ltr.txt").write_text("a 3 #fairseq:overwrite\nb 2\n")
    assert read_dictionary(tmp_path / "dict.ltr.txt") == {"a": 3, "b": 2}


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.tsv"
    write_manifest(path, "/old", [("a.wav", 1)])

    def entries():
        yield "b.wav", 2
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_manifest(path, "/new", entries())
    with pytest.raises(RuntimeError):
        write_lines(path, (line for line, _ in entries()))
    assert read_manifest(path).root == Path("/old")
    assert os.listdir(tmp_path) == ["a.tsv"]


def test_a_path_with_a_tab_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"no tab and no newline, but line 2 is 'a\\tb\.wav\\t1'; rename it"):
        write_manifest(tmp_path / "a.tsv", ".", [("a\tb.wav", 1)])


def test_written_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").touch()
    write_lines(tmp_path / "a", [])
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
