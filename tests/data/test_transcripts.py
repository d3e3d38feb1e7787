"""Transcripts: normalised without loss, spelled reversibly, and found beside the audio."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3distill.data.transcripts import count_symbols, find_transcripts, normalise, spell


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world!", "HELLO WORLD"),
        ("  it\u2019s  a well-known\tfact ", "IT'S A WELL KNOWN FACT"),
        ("She said 'stop' twice.", "SHE SAID STOP TWICE"),
        ("'TIS THE DOGS' BONE", "'TIS THE DOGS' BONE"),  # LibriSpeech: as it is
        ("ne\u0301e \u00fcber", "N\u00c9E \u00dcBER"),
        ("isn`t it\u00b4s", "ISN'T IT'S"),  # accents typed for apostrophes
        ("...", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize("character", ["7", "&", "$", "\u00bd"])
def test_what_cannot_be_spelled_is_refused(character):
    with pytest.raises(ValueError) as caught:
        normalise(f"a {character}")
    assert str(caught.value) == (
        f"a transcript must be spelled out in letters, but has {character!r} in {f'a {character}'!r}; write it as words"
    )


@given(st.text(st.characters(categories=["L", "P", "Z"], exclude_characters="&%@#")))
def test_normalise_twice_is_once(text):
    once = normalise(text)
    assert normalise(once) == once


@given(st.lists(st.text("ABC'\u00c9", min_size=1), min_size=1))
def test_spelling_can_be_undone(words):
    line = spell(" ".join(words))
    assert line.replace(" ", "").replace("|", " ").split() == words
    assert line.endswith(" |") and "  " not in line


def test_count_symbols_is_ordered_by_count_then_symbol():
    assert list(count_symbols(["B A |", "A C |", "A |"]).items()) == [("A", 3), ("|", 3), ("B", 1), ("C", 1)]


def touch(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [root / name for name in names]


def test_librispeech(tmp_path):
    paths = touch(tmp_path, "1/2/1-2-0000.flac", "1/2/1-2-0001.flac", "1/3/1-3-0000.flac")
    (tmp_path / "1/2/1-2.trans.txt").write_text("1-2-0000 HE IS\n1-2-0001 SHE WAS\n")
    assert find_transcripts(paths, tmp_path) == {paths[0]: "HE IS", paths[1]: "SHE WAS"}


def test_text_beside_the_audio(tmp_path):
    paths = touch(tmp_path, "a.wav", "b.wav", "c.wav")
    (tmp_path / "a.txt").write_text("one line\n")
    (tmp_path / "c.txt").write_text("\n")
    assert find_transcripts(paths, tmp_path) == {paths[0]: "one line"}


@pytest.mark.parametrize("metadata", ["LJ-1|In 1, he|in one, he\nLJ-2|and she\n", "LJ-1|in one, he|\nLJ-2|and she|\n"])
def test_ljspeech(tmp_path, metadata):
    paths = touch(tmp_path, "wavs/LJ-1.wav", "wavs/LJ-2.wav")
    (tmp_path / "metadata.csv").write_text(metadata)
    assert find_transcripts(paths, tmp_path) == {paths[0]: "in one, he", paths[1]: "and she"}


def test_comma_separated_with_header(tmp_path):
    paths = touch(tmp_path, "clips/a.flac", "clips/b.flac")
    (tmp_path / "metadata.csv").write_text('file_name,speaker,transcription\nclips/a.flac,x,"yes, sir"\nb.flac,y,no\n')
    assert find_transcripts(paths, tmp_path) == {paths[0]: "yes, sir", paths[1]: "no"}


def test_metadata_above_the_root_is_not_used(tmp_path):
    paths = touch(tmp_path, "corpus/a.wav")
    (tmp_path / "metadata.csv").write_text("a|not mine\n")
    assert find_transcripts(paths, tmp_path / "corpus") == {}


def test_malformed_metadata_names_the_line(tmp_path):
    (path,) = touch(tmp_path, "a.wav")
    (tmp_path / "metadata.csv").write_text("a|yes\nb no\n")
    with pytest.raises(
        ValueError, match=r"metadata\.csv:2: a line must be `name\|text` or .* but it is 'b no'; correct"
    ):
        find_transcripts([path], tmp_path)


def test_a_transcript_that_is_not_utf8_is_named(tmp_path):
    (path,) = touch(tmp_path, "a.wav")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: a transcript must be UTF-8 text, but byte 3 is not; convert it"):
        find_transcripts([path], tmp_path)


def test_a_bare_name_that_fits_several_files_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("1|ONE TEXT\nb/2|NAMED BY FOLDER\n3|ANOTHER\n", encoding="utf-8")
    paths = [tmp_path / name for name in ("a/1.wav", "b/1.wav", "b/2.wav", "b/3.wav")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
    found = find_transcripts(paths, tmp_path)
    assert found == {paths[2]: "NAMED BY FOLDER", paths[3]: "ANOTHER"}


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("1|ONE\u2028TEXT\n", encoding="utf-8")
    assert find_transcripts([tmp_path / "1.wav"], tmp_path) == {tmp_path / "1.wav": "ONE\u2028TEXT"}
