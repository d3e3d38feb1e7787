"""`s3distill pseudo-label` as a user runs it: shards, kills, filters, what is written, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s3distill import compat
from s3distill.cli.main import main
from s3distill.data import pseudo_labels
from s3distill.data.manifest import check_manifest, read_manifest, write_manifest
from s3distill.data.nbest import nbest_path, read_nbest
from s3distill.encoder.checkpoint import config_from_options
from s3distill.encoder.model import SpeechEncoder

OPTIONS = {
    "conv_feature_layers": "[(8, 10, 5)] + [(8, 3, 2)] * 4 + [(8, 2, 2)] * 2",
    "encoder_layers": 1,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 16,
    "encoder_attention_heads": 2,
    "conv_pos": 8,
    "conv_pos_groups": 2,
}
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "|", "A", "B", "C"]
NUM_UTTERANCES = 7


def write_teacher(path: Path, symbols: list[str] | None, head: bool = True) -> Path:
    """A model with random weights, whose head likes to change its mind."""
    torch.manual_seed(3)
    encoder = SpeechEncoder(config_from_options(OPTIONS, "wav2vec2"))
    state = {f"w2v_encoder.w2v_model.{k}": v for k, v in encoder.state_dict().items()}
    bias = torch.zeros(8)
    bias[1:4] = -50.0  # special symbols are never spoken
    bias[7] = -1.0  # C now and then
    if head:
        state |= {"w2v_encoder.proj.weight": torch.randn(8, 16), "w2v_encoder.proj.bias": bias}
    options = {"_name": "wav2vec_ctc", "w2v_args": {"model": {"_name": "wav2vec2", **OPTIONS}, "task": {}}}
    task_state = None if symbols is None else {"target_dictionary": {"symbols": symbols}}
    compat.write_checkpoint(path, state, options, {"_name": "audio_finetuning", "normalize": True}, task_state)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt", SYMBOLS)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    generator = np.random.default_rng(5)
    entries = []
    for i in range(NUM_UTTERANCES):
        num_samples = int(generator.integers(4000, 12000))
        steps = np.repeat(generator.standard_normal(num_samples // 800 + 1), 800)[:num_samples]
        soundfile.write(folder / f"{i}.wav", 0.2 * np.sin(np.cumsum(0.2 + 0.15 * steps)), 16000)
        entries.append((f"{i}.wav", num_samples))
    write_manifest(folder / "pool.tsv", ".", entries)
    (folder / "pool.ltr").write_text("A B |\n" * NUM_UTTERANCES)
    return folder / "pool.tsv"


@pytest.fixture
def label(manifest: Path, teacher: Path) -> Callable[..., int]:
    def run(out: Path, *options: str, teacher: Path = teacher) -> int:
        words = ["pseudo-label", str(manifest), "--teacher", str(teacher), "-o", str(out), "--batch-size", "2"]
        return main([*words, "--no-progress", *options])

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_is_written_is_a_manifest_to_train_on(label: Callable[..., int], manifest: Path, tmp_path: Path) -> None:
    assert label(tmp_path, "--nbest", "3", "--codec", "none") == 0
    written = read_manifest(tmp_path / "pool.tsv")
    assert check_manifest(written.path, ["ltr", "wrd"], progress=False) == []
    assert (tmp_path / "dict.ltr.txt").read_text().split()[::2] == SYMBOLS[4:]
    entries = read_nbest(nbest_path(written.path), written, SYMBOLS[4:])
    assert len(entries) == len(written.entries) > 3
    assert [entry.hypotheses[0].units for entry in entries] == (tmp_path / "pool.ltr").read_text().splitlines()
    assert all(1 <= len(entry.hypotheses) <= 3 for entry in entries)
    assert max(len(entry.hypotheses) for entry in entries) == 3
    assert all(h.units.endswith(" |") for entry in entries for h in entry.hypotheses)
    confidences = [float(line) for line in (tmp_path / "pool.conf").read_text().split()]
    assert confidences == [entry.hypotheses[0].confidence for entry in entries]
    report = json.loads((tmp_path / "pool.report.json").read_text())
    assert report["utterances"] == {"all": NUM_UTTERANCES, "kept": len(entries)}
    assert sum(r["utterances"] for r in report["removed"].values()) == NUM_UTTERANCES - len(entries)
    assert (report["nbest"], report["beam"], report["filters"]) == (3, 10, {})


def test_the_result_does_not_depend_on_the_shards(
    label: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--nbest", "2", "--codec", "none")
    label(tmp_path / "one", *options)
    assert label(tmp_path / "three", *options, "--shard", "3/3") == 0
    assert label(tmp_path / "three", *options, "--merge") == 2
    assert "--merge needs every utterance decoded, but 5 of 7 are missing" in capsys.readouterr().err
    assert (
        label(tmp_path / "three", *options, "--shard", "1/3")
        == label(tmp_path / "three", *options, "--shard", "2/3")
        == 0
    )
    assert not (tmp_path / "three" / "pool.tsv").exists()
    assert "7 of 7 utterances decoded, all are; write the labels with --merge" in capsys.readouterr().out
    assert label(tmp_path / "three", *options, "--merge") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_killed_run_goes_on_where_it_was(
    label: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    read = pseudo_labels.read_audio

    def counted(path: Path) -> np.ndarray:
        decoded.append(path.name)
        if len(decoded) == 5:
            raise KeyboardInterrupt
        return read(path)

    label(tmp_path / "whole")
    monkeypatch.setattr(pseudo_labels, "read_audio", counted)
    with pytest.raises(KeyboardInterrupt):
        label(tmp_path / "killed")
    assert not (tmp_path / "killed" / "pool.tsv").exists()
    assert label(tmp_path / "killed") == 0
    assert len(decoded) == 5 + NUM_UTTERANCES - 4  # two batches of two were finished
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_filters_can_be_changed_without_decoding_again(
    label: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    label(tmp_path)
    confidences = sorted(float(line) for line in (tmp_path / "pool.conf").read_text().split())
    assert label(tmp_path, "--min-confidence", "0.1") == 2
    assert "pool.tsv must not be there yet, but is; pass --overwrite" in capsys.readouterr().err

    def never(path: Path) -> np.ndarray:
        raise AssertionError(f"{path} is decoded again")

    monkeypatch.setattr(pseudo_labels, "read_audio", never)
    assert label(tmp_path, "--min-confidence", str(confidences[2]), "--overwrite") == 0
    assert len(read_manifest(tmp_path / "pool.tsv").entries) == len(confidences) - 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["-", "confidence", "2"] for line in lines)


def test_doubt_is_the_utterances_and_text_is_each_hypothesis_own(label: Callable[..., int], tmp_path: Path) -> None:
    def hypotheses(out: Path) -> dict[str, list[tuple[str, float]]]:
        manifest = read_manifest(out / "pool.tsv")
        entries = read_nbest(nbest_path(manifest.path), manifest)
        return {entry.audio: [(h.units, h.score / len(h.units.split())) for h in entry.hypotheses] for entry in entries}

    label(tmp_path / "raw", "--nbest", "4")
    raw = hypotheses(tmp_path / "raw")
    limit = sorted(guesses[0][1] for guesses in raw.values())[2]
    label(tmp_path / "sure", "--nbest", "4", "--min-score", str(limit))
    sure = hypotheses(tmp_path / "sure")
    assert sure == {audio: guesses for audio, guesses in raw.items() if guesses[0][1] >= limit}
    assert any(score < limit for guesses in sure.values() for _, score in guesses)
    most = min(len(guesses[0][0].split("|")) for guesses in raw.values())  # words of the shortest, and one
    lengths = [len(units.split("|")) for guesses in raw.values() for units, _ in guesses]
    assert max(lengths) > most
    label(tmp_path / "few", "--nbest", "4", "--reference", "ltr", "--max-word-ratio", str(most - 1))
    few = hypotheses(tmp_path / "few")
    assert few == {
        audio: [guess for guess in guesses if len(guess[0].split("|")) <= most]
        for audio, guesses in raw.items()
        if len(guesses[0][0].split("|")) <= most
    }


def test_the_surest_share_is_kept(label: Callable[..., int], tmp_path: Path) -> None:
    label(tmp_path / "raw")
    manifest = read_manifest(tmp_path / "raw" / "pool.tsv")
    sureness = {
        entry.audio: entry.hypotheses[0].score / len(entry.hypotheses[0].units.split())
        for entry in read_nbest(nbest_path(manifest.path), manifest)
    }
    assert len(sureness) == 7
    label(tmp_path / "sure", "--keep-best", "0.5")
    kept = [audio for audio, _ in read_manifest(tmp_path / "sure" / "pool.tsv").entries]
    surest = sorted(sureness, key=lambda audio: -sureness[audio])[:4]
    assert kept == [audio for audio, _ in manifest.entries if audio in surest], "half of seven, rounded up, in order"
    report = json.loads((tmp_path / "sure" / "pool.report.json").read_text())
    assert report["removed"]["keep_best"]["utterances"] == 3 and report["utterances"]["kept"] == 4


def test_an_empty_result_is_an_error_and_nothing_is_written(
    label: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(tmp_path, "--max-chars-per-second", "0.01") == 2
    error = capsys.readouterr().err
    assert "an utterance must be left to train on, but all 7 of" in error and "(too_fast 7)" in error
    assert contents(tmp_path) == {}


def test_a_reference_filters_words_and_gives_the_error_rate(
    label: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label(tmp_path, "--reference", "ltr", "--max-word-ratio", "2", "--codec", "none")
    report = json.loads((tmp_path / "pool.report.json").read_text())
    words = [line.split() for line in (tmp_path / "pool.wrd").read_text().splitlines()]
    assert max(map(len, words)) <= 2 and report["removed"]["too_many_words"]["utterances"] > 0
    # the reference is AB everywhere: every other word is an error
    assert report["label_wer"]["kept"] <= report["label_wer"]["all"]
    assert "WER of the labels against the reference" in capsys.readouterr().out


def test_text_is_written_in_the_target_dictionary(label: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text("a 1\nb 1\n| 1\n")
    label(tmp_path / "out", "--dict", str(tmp_path / "dict.txt"), "--codec", "none", "--nbest", "2")
    report = json.loads((tmp_path / "out" / "pool.report.json").read_text())
    assert report["removed"]["not_in_dictionary"]["utterances"] > 0  # those with a C
    assert set((tmp_path / "out" / "pool.ltr").read_text().split()) <= {"a", "b", "|"}
    assert (tmp_path / "out" / "dict.ltr.txt").read_text().split()[::2] == ["a", "b", "|"]


def test_a_dictionary_of_other_splits_is_kept(
    label: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dict.ltr.txt").write_text("| 9\nA 8\nB 7\nC 6\n")
    assert label(tmp_path) == 0
    assert (tmp_path / "dict.ltr.txt").read_text() == "| 9\nA 8\nB 7\nC 6\n"
    (tmp_path / "dict.ltr.txt").write_text("A 8\n| 9\nB 7\nC 6\n")
    assert label(tmp_path, "--overwrite") == 2
    assert "must have the symbols of these labels in their order, since other splits use it" in capsys.readouterr().err


def test_another_teacher_does_not_go_on_with_the_first_ones_journal(
    label: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label(tmp_path, "--shard", "1/2")
    assert label(tmp_path, "--nbest", "2") == 2
    assert "was decoded with another beam, nbest; pass --overwrite to decode again" in capsys.readouterr().err
    assert label(tmp_path, "--nbest", "2", "--overwrite") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nbest", "0"), "`nbest` must be at least 1, but is 0"),
        (("--nbest", "3", "--beam", "2"), "`beam` must be at least `nbest`.* but they are 2 and 3"),
        (("--shard", "5/4"), "a shard must be I/N with I from 1 to N, but is 5/4; the first of four is 1/4"),
        (("--shard", "1/2", "--merge"), "--merge and --shard exclude each other"),
        (("--max-word-ratio", "2"), "pass --reference ltr, or leave them out"),
        (("--codec", "none", "--max-compression-ratio", "2"), "--max-compression-ratio needs a --codec"),
        (("--min-confidence", "2"), r"`min_confidence` must be in \[0, 1\], a mean posterior, but is 2.0"),
        (("--keep-best", "0"), r"--keep-best must be in \(0, 1\], but is 0.0; 0.8 keeps the surest 80%"),
        (("--device", "abacus"), "--device must be one that is there, but 'abacus' is not; pass cpu"),
        (("--reference", "wrd"), "the label file must be a readable file"),
        (("--dict", "nowhere.txt"), "the dictionary must be a readable file"),
    ],
)
def test_bad_options_are_named(
    options: tuple[str, ...],
    message: str,
    label: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert label(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert contents(tmp_path) == {}


def test_teachers_that_cannot_label_are_named(
    label: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert label(out, teacher=write_teacher(tmp_path / "pretrained.pt", SYMBOLS, head=False)) == 2
    assert "the teacher must be a CTC model, but" in capsys.readouterr().err
    silent = write_teacher(tmp_path / "silent.pt", None)
    assert label(out, teacher=silent) == 2
    assert "holds none; pass --teacher-dict with the one it was trained with" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("| 1\n")
    (tmp_path / "long.txt").write_text("".join(f"{letter} 1\n" for letter in "|ABCD"))
    (tmp_path / "other.txt").write_text("X 1\nY 1\n")
    assert label(out, "--teacher-dict", str(tmp_path / "long.txt"), teacher=silent) == 2
    assert (
        "must have the symbols of the teacher's 8 outputs, 4 special ones included, but makes 9"
        in capsys.readouterr().err
    )
    assert label(out, "--teacher-dict", str(tmp_path / "other.txt")) == 2
    assert "must be the teacher's dictionary, but" in capsys.readouterr().err
    assert label(out, "--dict", str(tmp_path / "other.txt")) == 2
    assert "must hold symbols of the teacher, but has none of | A B C" in capsys.readouterr().err


def test_a_teachers_own_dictionary_can_be_given(label: Callable[..., int], tmp_path: Path) -> None:
    label(tmp_path / "held")
    (tmp_path / "dict.txt").write_text("| 1\nA 1\nB 1\nC 1\n")
    teacher = write_teacher(tmp_path / "silent.pt", None)
    label(tmp_path / "given", "--teacher-dict", str(tmp_path / "dict.txt"), teacher=teacher)
    assert contents(tmp_path / "held") == contents(tmp_path / "given")


def test_the_manifest_itself_is_never_overwritten(
    label: Callable[..., int], manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = manifest.read_bytes()
    assert label(manifest.parent, "--overwrite") == 2
    assert "must not overwrite the manifest that they are made of" in capsys.readouterr().err
    assert manifest.read_bytes() == before


def test_labelled_utterances_can_stand_in_front(label: Callable[..., int], manifest: Path, tmp_path: Path) -> None:
    gold = tmp_path / "gold"
    gold.mkdir()
    soundfile.write(gold / "g.wav", np.zeros(9000), 16000)
    write_manifest(gold / "labelled.tsv", ".", [("g.wav", 9000)])
    (gold / "labelled.ltr").write_text("A B | C\n")
    label(tmp_path / "alone", "--nbest", "2")
    assert label(tmp_path / "joined", "--nbest", "2", "--add", str(gold / "labelled.tsv")) == 0
    written = read_manifest(tmp_path / "joined" / "pool.tsv")
    assert check_manifest(written.path, ["ltr", "wrd"], progress=False) == []
    first, *others = read_nbest(nbest_path(written.path), written, SYMBOLS[4:])
    assert written.audio_path(0) == gold / "g.wav"
    assert [(h.units, h.score, h.confidence) for h in first.hypotheses] == [("A B | C |", 0.0, 1.0)]
    alone = read_manifest(tmp_path / "alone" / "pool.tsv")
    assert [e.hypotheses for e in others] == [e.hypotheses for e in read_nbest(nbest_path(alone.path), alone)]
    assert [written.audio_path(i + 1) for i in range(len(others))] == [alone.audio_path(i) for i in range(len(others))]
    report = json.loads((tmp_path / "joined" / "pool.report.json").read_text())
    assert report["labelled_utterances"] == 1 and report["utterances"]["kept"] == len(others)


def test_labels_that_do_not_fit_are_named(
    label: Callable[..., int], manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(tmp_path / "out", "--add", str(manifest)) == 2
    assert "must be different files, but 7 are in both" in capsys.readouterr().err
    soundfile.write(tmp_path / "x.wav", np.zeros(9000), 16000)
    write_manifest(tmp_path / "x.tsv", ".", [("x.wav", 9000)])
    (tmp_path / "x.ltr").write_text("X |\n")
    assert label(tmp_path / "out", "--add", str(tmp_path / "x.tsv")) == 2
    assert (
        "x.ltr:1: labels must be of the dictionary of the pseudo-labels (| A B C ...), but" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_a_lexicon_limits_what_the_teacher_says(
    label: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flashlight.lib.text")
    (tmp_path / "lexicon.txt").write_text("AB\tA B |\nBA\tB A |\nCAB\tC A B |\n")
    assert label(tmp_path / "out", "--lexicon", str(tmp_path / "lexicon.txt"), "--word-score", "1", "--nbest", "2") == 0
    words = set((tmp_path / "out" / "pool.wrd").read_text().split())
    assert words and words <= {"AB", "BA", "CAB"}
    (tmp_path / "lexicon.txt").write_text("AB\tA B |\n")
    options = ("--lexicon", str(tmp_path / "lexicon.txt"), "--word-score", "1", "--nbest", "2")
    assert label(tmp_path / "out", *options, "--name", "other") == 0  # a journal of its own
    capsys.readouterr()
    (tmp_path / "lexicon.txt").write_text("BA\tB A |\n")
    (tmp_path / "out" / "other.tsv").unlink()
    assert label(tmp_path / "out", *options, "--name", "other", "--overwrite", "--merge") == 2, "of another lexicon"
    capsys.readouterr()
    assert label(tmp_path / "out", "--lm-weight", "2", "--overwrite") == 2
    assert "`lm_weight` and `word_score` need a language model or lexicon, but there is none" in capsys.readouterr().err
