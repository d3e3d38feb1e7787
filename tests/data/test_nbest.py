"""The n-best file: what is written is read, and every way in which it does not fit its manifest is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s3distill.data.manifest import read_manifest, write_manifest
from s3distill.data.manifest_lines import Manifest
from s3distill.data.nbest import Hypothesis, NbestEntry, nbest_path, read_nbest, write_nbest

ENTRIES = [
    NbestEntry("a.flac", (Hypothesis("É A |", -0.25, 0.9375), Hypothesis("A |", -3.0, 0.5))),
    NbestEntry("b/c.flac", (Hypothesis("B |", -0.0, 1.0),)),
]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    write_manifest(tmp_path / "train.tsv", ".", [(entry.audio, 8000) for entry in ENTRIES])
    return read_manifest(tmp_path / "train.tsv")


def test_what_is_written_is_read(manifest: Manifest) -> None:
    path = nbest_path(manifest.path)
    assert path.name == "train.nbest.jsonl"
    write_nbest(path, ENTRIES)
    assert read_nbest(path, manifest, ["É", "A", "B", "|"]) == ENTRIES
    assert read_nbest(path, manifest) == ENTRIES
    assert json.loads(path.read_text(encoding="utf-8").split("\n")[0]) == {
        "audio": "a.flac",
        "hypotheses": [
            {"units": "É A |", "score": -0.25, "confidence": 0.9375, "weight": 0.939913},
            {"units": "A |", "score": -3.0, "confidence": 0.5, "weight": 0.060087},  # 1 / (1 + exp(2.75))
        ],
    }


def entry(audio: str = "a.flac", *hypotheses: dict) -> str:
    return json.dumps({"audio": audio, "hypotheses": list(hypotheses)})


def guess(units: str = "A |", score: object = -1.0, confidence: object = 0.5) -> dict:
    return {"units": units, "score": score, "confidence": confidence}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("A |", r"nbest\.jsonl:1: a line must be \{.*\}, but it is 'A |'"),
        ("[1, 2]", r"a line must be \{.*\}, but it is '\[1, 2\]'"),
        (json.dumps({"audio": "a.flac"}), r"a line must be \{"),
        (entry("a.flac", {"units": "A |"}), r"a line must be \{"),
        (entry("a.flac", guess(score="-1.0")), r"a line must be \{"),
        (entry("x.flac", guess()), r"the utterance must be the manifest's, 'a\.flac', but it is 'x\.flac'"),
        (
            '{"audio": "a.flac", "hypotheses": [{"units": "A", "score": -1%s, "confidence": 1}]}' % ("0" * 400),
            "a line must be",
        ),
        (entry("a.flac", guess(" ")), "a hypothesis must have at least one unit, but one is empty"),
        (
            entry("a.flac", guess(), guess("A  |", -2.0)),
            r"hypotheses of an utterance must differ, but 'A \|' is there tw",
        ),
        (entry("a.flac", guess("A X Y |")), "units must be in the dictionary, but 'X', 'Y' are not"),
        (entry("a.flac", guess(score=float("nan"))), "`score` must be a finite number.*, but it is nan"),
        (entry("a.flac", guess(confidence=1.5)), r"`confidence` must be in \[0, 1\], a mean posterior, but it is 1\.5"),
        (entry("a.flac", guess() | {"weight": 0.9}), r"`weight` must be exp\(score\) .*, so 1, but they are \[0\.9\]"),
        (entry("a.flac", guess() | {"weight": 1}, guess("B |", -1)), r"so 0\.5, 0\.5, but they are \[1, None\]"),
        (entry("a.flac", guess(), guess("B |", -0.5)), "must stand best first, but their scores are -1, -0.5"),
    ],
)
def test_a_fault_is_named_with_file_line_and_rule(line: str, message: str, manifest: Manifest) -> None:
    path = nbest_path(manifest.path)
    path.write_text(f"{line}\n{entry('b/c.flac', guess())}\n")
    with pytest.raises(ValueError, match=f"(?s)train.nbest.jsonl cannot be used:.*{message}"):
        read_nbest(path, manifest, ["A", "B", "|"])


def test_another_number_of_lines_is_refused(manifest: Manifest) -> None:
    path = nbest_path(manifest.path)
    write_nbest(path, ENTRIES[:1])
    with pytest.raises(ValueError, match=r"a line for each of the 2 utterances of .*train\.tsv, but it has 1; write"):
        read_nbest(path, manifest)


def test_many_faults_are_cut(tmp_path: Path) -> None:
    write_manifest(tmp_path / "many.tsv", ".", [(f"{i}.flac", 8000) for i in range(7)])
    path = tmp_path / "many.nbest.jsonl"
    path.write_text("x\n" * 7)
    with pytest.raises(ValueError, match=r"cannot be used:\n(  .*a line must be.*\n){5}  and 2 more$"):
        read_nbest(path, read_manifest(tmp_path / "many.tsv"))


def test_a_missing_file_is_named(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match=r"the n-best file must be a readable file.*s3distill pseudo-label"):
        read_nbest(nbest_path(manifest.path), manifest)


def test_an_utterance_that_decoding_left_out_has_an_empty_list(manifest: Manifest) -> None:
    path = nbest_path(manifest.path)
    path.write_text(f"{entry('a.flac')}\n{entry('b/c.flac', guess())}\n")
    assert [len(found.hypotheses) for found in read_nbest(path, manifest, ["A", "B", "|"])] == [0, 1]
