"""`s3distill manifest` and `s3distill check` as a user runs them."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from s3distill.cli.main import main
from s3distill.data.manifest import read_dictionary, read_labels, read_manifest

EXAMPLE = Path(__file__).parents[2] / "manifests" / "example" / "example.tsv"


@pytest.fixture
def audio(tmp_path) -> Path:
    """Ten utterances of 0.5 s in two folders, with LibriSpeech transcripts."""
    folder = tmp_path / "audio"
    for index in range(10):
        path = folder / str(index % 2) / f"{index}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(index).uniform(-0.5, 0.5, 8000), 16000)
        with (path.parent / "x.trans.txt").open("a") as stream:
            stream.write(f"{index} {'CAT' if index else 'A ZOO'}\n")
    return folder


def manifest(audio: Path, *arguments: str) -> int:
    return main(["manifest", str(audio), "--out", str(audio.parent / "out"), "--no-progress", *arguments])


def check(path: Path, *arguments: str) -> int:
    return main(["check", str(path), "--no-progress", *arguments])


def test_manifest_then_check(audio, capsys):
    out = audio.parent / "out"
    assert manifest(audio, "--valid-fraction", "0.2", "--test-fraction", "0.1") == 0
    assert f"{out}/train.tsv: 7 utterances, 0.00 hours, with .wrd and .ltr" in capsys.readouterr().out
    splits = {name: read_manifest(out / f"{name}.tsv") for name in ("train", "valid", "test")}
    assert {name: len(split.entries) for name, split in splits.items()} == {"train": 7, "valid": 2, "test": 1}
    listed = sorted(path for split in splits.values() for path, _ in split.entries)
    assert listed == sorted(str(path.relative_to(audio)) for path in audio.rglob("*.flac"))
    for name, split in splits.items():
        assert (out / f"{name}.tsv").read_text().split("\n")[0] == str(audio)
        for (path, num_samples), words in zip(split.entries, read_labels(out / f"{name}.wrd"), strict=True):
            assert (words, num_samples) == ("A ZOO" if path == "0/0.flac" else "CAT", 8000)
        assert check(out / f"{name}.tsv") == 0
    assert "no faults (audio, ltr, wrd checked)" in capsys.readouterr().out


def test_the_seed_decides_the_split(audio):
    def valid(seed: str) -> list:
        assert manifest(audio, "--valid-fraction", "0.4", "--seed", seed) == 0
        return read_manifest(audio.parent / "out/valid.tsv").entries

    assert valid("1") == valid("1") != valid("2")


def test_letters_that_only_valid_has_are_in_the_dictionary(audio):
    for seed in map(str, range(40)):  # until the one ZOO falls into valid
        out = audio.parent / seed
        assert main(["manifest", str(audio), "--out", str(out), "--seed", seed, "--no-progress"]) == 0
        if read_labels(out / "valid.wrd") == ["A ZOO"]:
            assert read_dictionary(out / "dict.ltr.txt") == {"A": 9, "C": 9, "T": 9, "|": 9, "O": 0, "Z": 0}
            return
    pytest.fail("never drawn")


def test_one_named_split_and_lengths(audio, capsys):
    soundfile.write(audio / "0/long.wav", np.full(32000, 0.1), 16000)
    assert manifest(audio, "--split", "dev-clean", "--max-seconds", "1") == 0
    assert len(read_manifest(audio.parent / "out/dev-clean.tsv").entries) == 10
    assert not (audio.parent / "out/train.tsv").exists()
    assert manifest(audio, "--split", "long", "--min-seconds", "1", "--ext", "wav") == 0
    assert "no transcripts found, no labels" in capsys.readouterr().out
    assert read_manifest(audio.parent / "out/long.tsv").entries == [("0/long.wav", 32000)]


def test_missing_transcripts_stop_it_unless_asked(audio, capsys):
    soundfile.write(audio / "0/new.flac", np.full(8000, 0.1), 16000)
    (audio / "1/x.trans.txt").write_text("1 CAT\n3 CAT\n5 CAT 5\n7 CAT\n9 CAT\n")
    assert manifest(audio) == 2
    error = capsys.readouterr().err
    assert "2 of 11 files have no usable transcript, the others do; add them, or pass --skip-untranscribed" in error
    assert "0/new.flac: there is no transcript" in error and "1/5.flac: a transcript must be spelled out" in error
    assert not (audio.parent / "out").exists()
    assert manifest(audio, "--skip-untranscribed", "--split", "all") == 0
    assert len(read_manifest(audio.parent / "out/all.tsv").entries) == 9
    assert check(audio.parent / "out/all.tsv") == 0


def test_wrong_audio_is_listed_and_nothing_is_written(audio, capsys):
    soundfile.write(audio / "0/0.flac", np.full(8000, 0.1), 8000)
    soundfile.write(audio / "1/1.flac", np.full((8000, 2), 0.1), 16000)
    assert manifest(audio) == 2
    error = capsys.readouterr().err
    assert "2 of 10 audio files cannot be used" in error
    assert "0/0.flac: the sample rate must be 16000 Hz, but it is 8000 Hz; convert it: sox '0.flac' -r 16000" in error
    assert "1/1.flac: audio must be mono, but it has 2 channels" in error
    assert not (audio.parent / "out").exists()


def test_a_dictionary_that_is_there_is_kept(audio, capsys):
    out = audio.parent / "out"
    out.mkdir()
    (out / "dict.ltr.txt").write_text("Z 1\nO 1\n| 1\nA 1\nT 1\n")
    assert manifest(audio) == 2
    assert "the dictionary that is there must hold every letter, but lacks 'C'; delete it" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["dict.ltr.txt"]
    (out / "dict.ltr.txt").write_text("Z 1\nO 1\n| 1\nA 1\nT 1\nC 1\n")
    assert manifest(audio) == 0
    assert list(read_dictionary(out / "dict.ltr.txt")) == ["Z", "O", "|", "A", "T", "C"]


def test_old_labels_are_never_left_beside_a_new_manifest(audio, capsys):
    assert manifest(audio) == 0
    before = (audio.parent / "out/train.tsv").read_bytes()
    assert manifest(audio, "--no-labels", "--seed", "5") == 2
    assert "label files must match their manifest, but this one is of an earlier run" in capsys.readouterr().err
    assert (audio.parent / "out/train.tsv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--valid-fraction", "1.5"], "`valid_fraction` must be in [0, 1), but is 1.5"),
        (["--valid-fraction", "0.5", "--test-fraction", "0.5"], "must leave something to train on"),
        (["--min-seconds", "2", "--max-seconds", "1"], "`min_seconds` must be at most `max_seconds`"),
        (["--min-seconds", "2"], "no file is within the lengths asked for"),
        (["--split", "a/b"], "`split` must be a file name without folders, but is 'a/b'"),
        (["--ext", "ogg"], "there must be audio files ending in .ogg, but there are none"),
    ],
)
def test_bad_options(audio, capsys, arguments, message):
    assert manifest(audio, *arguments) == 2
    assert message in capsys.readouterr().err


def test_no_such_folder(tmp_path, capsys):
    assert manifest(tmp_path / "nowhere") == 2
    assert "nowhere: the folder of the audio must exist, but there is none; correct the path" in capsys.readouterr().err


def test_check_prints_each_fault_and_returns_1(audio, capsys):
    assert manifest(audio, "--split", "all") == 0
    path = audio.parent / "out/all.tsv"
    (audio / "1/1.flac").unlink()
    (audio.parent / "out/all.wrd").write_text("CAT\n")
    capsys.readouterr()
    assert check(path) == 1
    lines = capsys.readouterr().out.strip().split("\n")
    assert len(lines) == 4 and lines[-1] == f"{path}: 3 faults"
    assert lines[0].startswith(f"{path}:7: {audio}/1/1.flac: an audio file must exist, but there is none")
    assert lines[1].startswith(f"{path.with_suffix('.wrd')}: a label file must have a line for each of the 10")
    assert "the letters must spell the words" in lines[2]
    assert check(path, "--labels", "ltr", "--dict", str(audio.parent / "no.txt")) == 1
    assert "no.txt: the dictionary must be a readable file" in capsys.readouterr().out


def test_classes_of_utterances_need_no_dictionary(audio, capsys):
    assert manifest(audio, "--valid-fraction", "0.2") == 0
    train = audio.parent / "out/train.tsv"
    classes = train.with_suffix(".digit")
    classes.write_text("seven\none\n" * 4)
    assert check(train, "--labels", "digit") == 0
    classes.write_text("seven\n\n" * 3 + "one\n")
    capsys.readouterr()
    assert check(train, "--labels", "digit") == 1
    listed = capsys.readouterr().out
    assert "train.digit:2: a label line must not be empty" in listed
    assert "must have a line for each of the 8 utterances" in listed and "it has 7" in listed
    classes.write_text("seven one\n" * 8)
    assert check(train, "--labels", "digit") == 1, "several symbols a line are no classes"
    assert "dict.digit.txt" in capsys.readouterr().out
    classes.write_text("seven\n" * 8)
    (train.parent / "dict.digit.txt").write_text("one 1\n")
    assert check(train, "--labels", "digit") == 1, "a dictionary that is there counts"
    assert "'seven'" in capsys.readouterr().out


def test_the_example_that_ships_is_faultless(capsys):
    assert check(EXAMPLE) == 0
    assert "example.tsv: 3 utterances, 0.00 hours, no faults (audio, ltr, wrd checked)" in capsys.readouterr().out
