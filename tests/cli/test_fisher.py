"""`s3distill fisher` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("fairseq")

from s3distill.analysis.fisher_file import read_fisher
from s3distill.cli.main import main
from tests.data.ctc_corpus import SHAPE, write_corpus
from tests.encoder import checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fisher")
    write_corpus(folder)
    checkpoints.save(checkpoints.fine_tuned("wav2vec2", SHAPE)[0], folder / "ctc.pt")
    checkpoints.save(checkpoints.pretrained("wav2vec2", SHAPE)[0], folder / "pretrained.pt")
    return folder


def fisher(folder: Path, *arguments: str) -> int:
    known = {"ctc.pt", "pretrained.pt", "train.tsv"}
    return main(["fisher", *(str(folder / a) if a in known or a.endswith(".safetensors") else a for a in arguments)])


def test_a_file_and_its_parts_combined(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fisher(folder, "ctc.pt", "train.tsv", "-o", "all.safetensors") == 0
    out, err = capsys.readouterr()
    assert "4 utterances, transcripts: labels" in out and "encoder.layers.1" in out and "4/4" in err
    assert fisher(folder, "ctc.pt", "train.tsv", "--max-utterances", "1", "-o", "one.safetensors") == 0
    assert fisher(folder, "--combine", "all.safetensors", "one.safetensors", "-o", "both.safetensors") == 0
    whole, one, both = (read_fisher(folder / f"{name}.safetensors") for name in ("all", "one", "both"))
    assert (whole.num_utterances, one.num_utterances, both.num_utterances) == (4, 1, 5)
    name = "w2v_encoder.proj.weight"
    torch.testing.assert_close(both.values[name], (4 * whole.values[name] + one.values[name]) / 5)


def test_from_model_needs_no_labels(folder: Path, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path)
    manifest.with_suffix(".ltr").unlink()
    output = str(tmp_path / "own.safetensors")
    assert main(["fisher", str(folder / "ctc.pt"), str(manifest), "--from-model", "-o", output]) == 0
    assert read_fisher(output).targets == "sampled"


def test_faults_leave_the_old_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = folder / "old.safetensors"
    old.write_bytes(b"old")
    other = checkpoints.fine_tuned("wav2vec2", SHAPE, seed=1)[0]
    for part, state in (("c", checkpoints.fine_tuned("wav2vec2", SHAPE)[0]), ("d", other)):
        checkpoints.save(state, tmp_path / f"{part}.pt")
        command = ["fisher", str(tmp_path / f"{part}.pt"), str(folder / "train.tsv"), "--max-utterances", "1"]
        assert main([*command, "-o", str(tmp_path / f"{part}.safetensors")]) == 0
    masked = {
        **other,
        "model": {**other["model"], "w2v_encoder.w2v_model.encoder.layers.0.fc1.scores": torch.ones(48, 32)},
    }
    checkpoints.save(masked, tmp_path / "masked.pt")
    without = {key: value for key, value in other.items() if key != "task_state"}
    checkpoints.save(without, tmp_path / "without.pt")
    (folder / "dict.ltr.txt").write_text("| 1\nE 1\n")
    capsys.readouterr()
    parts = [str(tmp_path / f"{part}.safetensors") for part in "cd"]
    for arguments, fault in [
        (["pretrained.pt", "train.tsv"], "must be a recogniser with a CTC head, but is a wav2vec2 without one"),
        ([str(tmp_path / "masked.pt"), "train.tsv"], "multiply them in first: s3distill masks bake"),
        (
            [str(tmp_path / "without.pt"), "train.tsv"],
            "for each of the 9 rows of the head, but has 6 (four of them special)",
        ),
        (["ctc.pt"], "given are 1 paths and 0 files"),
        (["ctc.pt", "train.tsv", "--combine", *parts], "given are 2 paths and 2 files"),
        (["--combine", *parts], "must be of one model, but"),
        (["ctc.pt", "train.tsv", "--labels", "wrd"], "the label file must be a readable file"),
    ]:
        assert fisher(folder, *arguments, "-o", "old.safetensors") == 2
        assert fault in capsys.readouterr().err
        assert old.read_bytes() == b"old"
    assert fisher(folder, "ctc.pt", "train.tsv", "-o", str(tmp_path / "model.pt")) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    assert fisher(folder, "ctc.pt", "train.tsv", "-o", str(tmp_path / "no" / "f.safetensors")) == 2
    assert "the folder of the file must exist" in capsys.readouterr().err
