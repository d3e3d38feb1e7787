"""Label files of utterance classification: what is read, and what their errors say."""

from __future__ import annotations

from pathlib import Path

import pytest

from s3distill.data.manifest import read_manifest, write_manifest
from s3distill.data.manifest_lines import Manifest
from s3distill.data.utterance_labels import classes_of_dictionary, classes_of_labels, read_utterance_labels


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    write_manifest(tmp_path / "train.tsv", ".", [(f"{i}.flac", 8000) for i in range(4)])
    return read_manifest(tmp_path / "train.tsv")


def write(folder: Path, text: str, name: str = "train.digit") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_labels_are_lines_without_their_spaces(manifest: Manifest, tmp_path: Path) -> None:
    path = write(tmp_path, "7\n3 \r\n7\nzehn\n")
    assert read_utterance_labels(path, manifest) == ["7", "3", "7", "zehn"]
    assert read_utterance_labels(path, manifest, ["zehn", "3", "7"]) == ["7", "3", "7", "zehn"]


def test_classes_are_sorted_as_text_or_as_the_dictionary_has_them(tmp_path: Path) -> None:
    assert classes_of_labels(write(tmp_path, "9\n10\nb\n9\na\n")) == ["10", "9", "a", "b"]
    assert classes_of_dictionary(write(tmp_path, "b 4\na 3\n9 1\n", "dict.digit.txt")) == ["b", "a", "9"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7\n3\n7\n", r"a label file must have a line for each of the 4 utterances of .*train\.tsv, but it has 3"),
        (
            "7\n\n7\n3\n",
            r"train\.digit:2: a label line must not be empty, but it is; add the class, or remove the utter",
        ),
        ("7\n3\n7\nZ E R O |\n", r"train\.digit:4: a label line must hold one class name.*it is 'Z E R O \|'; join"),
        (
            "7\n8\n7\n3\n",
            r"train\.digit:2: a label must be one of the 2 classes of dict\.digit\.txt \(3, 7\), but it is '8'; correct the line",
        ),
    ],
)
def test_a_fault_is_named_with_file_line_and_rule(text: str, message: str, manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_utterance_labels(write(tmp_path, text), manifest, ["3", "7"], "dict.digit.txt")


def test_many_faults_are_cut(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be used:\n(  .*must not be empty.*\n){5}  and 2 more$"):
        classes_of_labels(write(tmp_path, "a\nb\n" + "\n" * 7))


def test_many_classes_are_cut(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"one of the 20 classes of the labels \(c0, .*c11 and 8 more\), but it is 'd'"
    ):
        read_utterance_labels(write(tmp_path, "c1\nd\nc1\nc2\n"), manifest, [f"c{i}" for i in range(20)], "the labels")


def test_one_class_is_no_classification(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"train\.digit: there must be at least two classes to tell apart, but there is 7"
    ):
        classes_of_labels(write(tmp_path, "7\n7\n"))
    with pytest.raises(ValueError, match=r"dict\.digit\.txt: there must be at least two classes"):
        classes_of_dictionary(write(tmp_path, "7 2\n", "dict.digit.txt"))


def test_a_missing_file_is_named(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"train\.speaker: the label file must be a readable file.*write one class name a line"
    ):
        read_utterance_labels(tmp_path / "train.speaker", manifest)
