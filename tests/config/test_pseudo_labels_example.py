"""The parts of examples/pseudo_labels: the split of a labelled manifest, and its tables."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from s3distill.data.manifest import read_manifest, write_manifest

FOLDER = Path(__file__).parents[2] / "examples" / "pseudo_labels"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(FOLDER / script), run_name="__main__")


def test_each_utterance_is_labelled_or_in_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for split, number in (("train", 6), ("valid", 2), ("test", 1)):
        write_manifest(data / f"{split}.tsv", ".", [(f"{split}/{i}.flac", 8000 + i) for i in range(number)])
        for ending in ("ltr", "wrd"):
            (data / f"{split}.{ending}").write_text("".join(f"{split}{i}\n" for i in range(number)))
    (data / "dict.ltr.txt").write_text("A 1\n")
    run(monkeypatch, "split.py", data, out, "--labelled", 2)
    labelled, pool = (read_manifest(out / f"{name}.tsv") for name in ("labelled", "pool"))
    assert len(labelled.entries) == 2 and len(pool.entries) == 4
    assert sorted(labelled.entries + pool.entries) == [(f"train/{i}.flac", 8000 + i) for i in range(6)]
    assert labelled.root == pool.root == read_manifest(out / "valid.tsv").root == data
    for name, manifest in (("labelled", labelled), ("pool", pool)):
        expected = [f"train{num_samples - 8000}" for _, num_samples in manifest.entries]
        assert (out / f"{name}.ltr").read_text().split() == (out / f"{name}.wrd").read_text().split() == expected
    assert (out / "dict.ltr.txt").read_text() == "A 1\n" and len(read_manifest(out / "test.tsv").entries) == 1
    with pytest.raises(SystemExit):
        run(monkeypatch, "split.py", data, out, "--labelled", 6)


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, removed in (("raw", 0), ("filtered", 3)):
        (tmp_path / "labels" / name).mkdir(parents=True)
        report = {
            "utterances": {"kept": 10 - removed},
            "hours": {"kept": 0.5},
            "removed": {"empty": {"utterances": 0}, "score": {"utterances": removed}},
            "label_wer": {"kept": 12.345},
        }
        (tmp_path / "labels" / name / "train.report.json").write_text(json.dumps(report))
    for run_name in ("teacher", "raw_one_best", "filtered_ranked"):
        (tmp_path / run_name / "decode").mkdir(parents=True)
        scores = {"wer": 10.0, "uer": 5.0, "word": {"errors": 2, "num_reference": 20}}
        (tmp_path / run_name / "decode" / "scores-test.json").write_text(json.dumps(scores))
    run(monkeypatch, "table.py", tmp_path, "teacher", "raw_one_best", "filtered_ranked")
    lines = capsys.readouterr().out.splitlines()
    assert "| raw | 10 | 0.500 | 12.35 |" in lines
    assert "| filtered (removed: score 3) | 7 | 0.500 | 12.35 |" in lines
    assert "| student: raw 1-best | 10.00 | 5.00 | 2 of 20 |" in lines
    assert "| student: filtered K-best, ranked | 10.00 | 5.00 | 2 of 20 |" in lines


def test_the_script_says_what_it_takes() -> None:
    usage = subprocess.run([FOLDER / "run.sh", "--help"], capture_output=True, text=True)
    assert usage.returncode == 2 and "usage: [OPTION=...] examples/pseudo_labels/run.sh" in usage.stderr
