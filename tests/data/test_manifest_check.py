"""Checking manifests: every kind of fault is listed with file, line, rule and remedy, and stops a training run."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from s3distill.data.manifest import (
    check_manifest,
    read_labels,
    read_manifest,
    validate_for_training,
    write_dictionary,
    write_lines,
    write_manifest,
)
from s3distill.data.manifest_check import num_frames


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Three faultless utterances of 0.5 s with labels and dictionary; returns the manifest."""
    (tmp_path / "audio").mkdir()
    entries = []
    for index in range(3):
        name = f"audio/{index}.flac"
        soundfile.write(tmp_path / name, np.random.default_rng(index).uniform(-0.5, 0.5, 8000), 16000)
        entries.append((name, 8000))
    write_manifest(tmp_path / "train.tsv", ".", entries)
    write_lines(tmp_path / "train.ltr", ["A B |", "B A | A |", "C |"])
    write_lines(tmp_path / "train.wrd", ["AB", "BA A", "C"])
    write_dictionary(tmp_path / "dict.ltr.txt", {"|": 4, "A": 3, "B": 2, "C": 1})
    return tmp_path / "train.tsv"


def edit(path: Path, line: int, text: str | None) -> None:
    """Replaces a line (counted from 1), or removes it."""
    lines = path.read_text().split("\n")
    lines[line - 1 : line] = [] if text is None else [text]
    path.write_text("\n".join(lines))


def check(manifest: Path) -> list[str]:
    return [str(fault) for fault in check_manifest(manifest, ["ltr", "wrd"], progress=False)]


@pytest.mark.parametrize("num_samples", [399, 400, 719, 720, 1040, 16000, 16001, 251_113])
def test_frames_are_those_of_the_conv_layers(num_samples):
    frames = num_samples
    for kernel, stride in [(10, 5)] + [(3, 2)] * 4 + [(2, 2)] * 2:
        frames = max(0, (frames - kernel) // stride + 1)
    assert num_frames(num_samples) == frames


def test_no_faults(corpus):
    assert check(corpus) == []
    assert validate_for_training(corpus, corpus.with_suffix(".ltr"), corpus.with_name("dict.ltr.txt")) == read_manifest(
        corpus
    )


LINE_FAULTS = {
    "a.flac 8000": "a line must be `path<TAB>number of samples`, but it is 'a.flac 8000'; correct or remove the line",
    "a.flac\t8e3": "a line must be `path<TAB>number of samples`, but it is 'a.flac\\t8e3'; correct or remove the line",
    "a.flac\t0": "a line must be `path<TAB>number of samples`, but it is 'a.flac\\t0'; correct or remove the line",
    "a.flac\t8000\tx": "a line must be `path<TAB>number of samples`, but it is 'a.flac\\t8000\\tx'; correct or",
    "": "a line must be `path<TAB>number of samples`, but it is empty; correct or remove the line",
    "audio/0.flac\t8000": "an audio file must be listed once, but 'audio/0.flac' is on line 2 too; remove one",
}


@pytest.mark.parametrize("line", LINE_FAULTS)
def test_malformed_manifest_line(corpus, line):
    edit(corpus, 3, line)
    (fault,) = check(corpus)
    assert fault.startswith(f"{corpus}:3: {LINE_FAULTS[line]}")
    with pytest.raises(ValueError, match=re.escape(f"{corpus}:3: {LINE_FAULTS[line]}")):
        read_manifest(corpus)
    with pytest.raises(ValueError, match=re.escape(f"{corpus}:3: {LINE_FAULTS[line]}")):
        validate_for_training(corpus)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            ":1: line 1 must be the root folder of the audio, but the file is empty; write it with `s3distill manifest",
        ),
        ("\na\t1\n", ":1: line 1 must be the root folder of the audio, but it is empty"),
        (
            "a\t1\n",
            r":1: line 1 must be the root folder of the audio, but it is 'a\t1'; put the root, or `.` for this folder",
        ),
        (".\n", ":1: a manifest must list at least one audio file, but it has none below its root"),
    ],
)
def test_manifest_without_root_or_entries(tmp_path, text, message):
    path = tmp_path / "a.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        read_manifest(path)
    assert f"{path}{message}" in str(check_manifest(path, progress=False)[0])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(
        ValueError, match=r"no\.tsv: the manifest must be a readable file, but reading it gave 'No such file"
    ):
        read_manifest(tmp_path / "no.tsv")
    (tmp_path / "latin.ltr").write_bytes(b"A \xe9")
    with pytest.raises(
        ValueError, match=r"latin\.ltr: the label file must be UTF-8 text, but byte 2 is not UTF-8; convert it"
    ):
        read_labels(tmp_path / "latin.ltr")


def test_missing_root_is_one_fault(corpus):
    edit(corpus, 1, "/nowhere/at/all")
    message = (
        f"{corpus}:1: line 1 must be the root folder of the audio, but there is no folder /nowhere/at/all; correct it"
    )
    (fault,) = check(corpus)
    assert fault.startswith(message)
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_for_training(corpus)


def break_audio(folder: Path, kind: str) -> None:
    path, samples = folder / "audio/1.flac", np.full(8000, 0.1)
    if kind == "missing":
        path.unlink()
    elif kind == "rate":
        soundfile.write(path, samples, 8000)
    elif kind == "stereo":
        soundfile.write(path, np.stack([samples, samples], 1), 16000)
    elif kind == "length":
        soundfile.write(path, samples[:7999], 16000)
    else:
        path.write_bytes(path.read_bytes()[:9000])


AUDIO_FAULTS = {
    "missing": "an audio file must exist, but there is n",
    "rate": "the sample rate must be 16000 Hz, but it is 8000 Hz; convert it: sox",
    "stereo": "audio must be mono, but it has 2 channels; convert it: sox",
    "length": "the file must have the 8000 samples of this line, but it has 7999; write the manifest again",
    "truncated": "the file must hold the 8000 samples of its header, but",
}


@pytest.mark.parametrize("kind", AUDIO_FAULTS)
def test_audio_fault(corpus, kind):
    break_audio(corpus.parent, kind)
    (fault,) = check(corpus)
    assert fault.startswith(f"{corpus}:3: ") and AUDIO_FAULTS[kind] in fault and "audio/1.flac" in fault
    if kind == "truncated":
        validate_for_training(corpus)  # reads headers only
    else:
        with pytest.raises(ValueError, match=re.escape(AUDIO_FAULTS[kind])):
            validate_for_training(corpus)


def test_only_some_headers_are_probed(corpus):
    break_audio(corpus.parent, "rate")
    for probes in (1, 0):  # the file with the wrong rate is the second
        assert len(validate_for_training(corpus, probe_audio=probes).entries) > 1


def test_too_short(corpus):
    soundfile.write(corpus.parent / "audio/1.flac", np.full(399, 0.1), 16000)
    edit(corpus, 3, "audio/1.flac\t399")
    message = f"{corpus}:3: an utterance must have at least 400 samples, but 'audio/1.flac' has 399; remove the line"
    assert check(corpus)[0].startswith(message)
    validate_for_training(corpus)
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_for_training(corpus, min_samples=400)


@pytest.mark.parametrize(
    ("name", "line", "text", "place", "message"),
    [
        ("train.ltr", 2, "", "train.ltr:2", "a label line must not be empty, but it is; add the transcript"),
        ("train.ltr", 3, "C Q |", "train.ltr:3", "a label must be in the dictionary, but 'Q' is not; correct the line"),
        ("train.ltr", 1, "B A |", "train.ltr:1", "the letters must spell the words of"),
        ("dict.ltr.txt", 4, None, "train.ltr:3", "a label must be in the dictionary, but 'C' is not"),
        ("dict.ltr.txt", 4, "C one", "dict.ltr.txt:4", "a line must be `symbol count`, but it is 'C one'"),
        ("dict.ltr.txt", 4, "A 1", "dict.ltr.txt:4", "a symbol must stand once in a dictionary, but 'A' is"),
    ],
)
def test_label_fault(corpus, name, line, text, place, message):
    edit(corpus.with_name(name), line, text)
    fault = check(corpus)[0]
    assert fault.startswith(f"{corpus.parent}/{place}: {message}")
    arguments = (corpus, corpus.with_suffix(".ltr"), corpus.with_name("dict.ltr.txt"))
    if "spell" in message:
        validate_for_training(*arguments)
    else:
        with pytest.raises(ValueError, match=re.escape(fault)):
            validate_for_training(*arguments)


def test_label_count(corpus):
    edit(corpus.with_suffix(".ltr"), 3, None)
    message = f"a label file must have a line for each of the 3 utterances of {corpus}, but it has 2; write manifest"
    assert message in check(corpus)[0]
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_for_training(corpus, corpus.with_suffix(".ltr"))


def test_missing_or_empty_dictionary_is_one_fault(corpus):
    dictionary = corpus.with_name("dict.ltr.txt")
    dictionary.write_text("")
    assert check(corpus) == [
        f"{dictionary}:1: a dictionary must hold at least one symbol, but it is empty; "
        "write it with `s3distill manifest DIR --out DIR`"
    ]
    dictionary.unlink()
    (fault,) = check(corpus)
    assert fault.startswith(f"{dictionary}: the dictionary must be a readable file, but reading it gave 'No such file")


@pytest.mark.parametrize(("line", "possible"), [(["A", "B"] * 12, True), (["A"] * 12, True), (["A"] * 13, False)])
def test_a_line_too_long_for_ctc(corpus, line, possible):
    # 8000 samples are 24 frames: 24 different labels fit, and 12 equal ones with 11 blanks between
    edit(corpus.with_suffix(".ltr"), 3, " ".join(line))
    faults = check_manifest(corpus, ["ltr"], progress=False)
    message = f"CTC needs a frame for each of {len(line)} labels and {len(line) - 1} repeated ones, but there are 24"
    assert [message in str(fault) for fault in faults] == ([] if possible else [True])


def test_letters_without_a_last_boundary_are_fine(corpus):
    edit(corpus.with_suffix(".ltr"), 2, "B A | A")
    assert check(corpus) == []


def test_check_lists_all_at_once_and_training_the_first_five(corpus):
    break_audio(corpus.parent, "missing")
    for number in (1, 2, 3):
        edit(corpus.with_suffix(".ltr"), number, f"Q{number} |")
    edit(corpus.with_suffix(".wrd"), 1, "")
    edit(corpus.with_name("dict.ltr.txt"), 1, "| x")
    # the audio file, the dictionary line, three label lines, the empty line of words, and two that are not spelled so
    assert len(check(corpus)) == 1 + 1 + 3 + 1 + 2
    edit(corpus, 4, "x")
    with pytest.raises(ValueError) as caught:
        validate_for_training(corpus, corpus.with_suffix(".ltr"), corpus.with_name("dict.ltr.txt"))
    message = str(caught.value)
    assert message.startswith(f"{corpus} cannot be trained on:\n  {corpus}:4: ")
    assert message.endswith(f"and 1 more; `s3distill check {corpus}` lists all")
    assert message.count("\n") == 6
