"""The demo corpus: deterministic, faultless, held-out sentences and voices, and never in anyone's way."""

import collections
import hashlib
import json
import random

import numpy as np
import pytest

from s3distill.cli.main import main
from s3distill.data import demo
from s3distill.data.audio import read_audio
from s3distill.data.demo import SPLITS, VARIANTS, make_demo_corpus
from s3distill.data.demo_grammar import SentenceSource
from s3distill.data.demo_languages import LANGUAGES
from s3distill.data.manifest import check_manifest, read_dictionary, read_labels, read_manifest

pytest.importorskip("espeakng_loader")
SMALL = {"train_minutes": 0.5, "valid_minutes": 0.1, "test_minutes": 0.1, "progress": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    make_demo_corpus(folder, **SMALL)
    return folder


def digest(folder) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_check_finds_nothing(corpus):
    for split in SPLITS:
        assert check_manifest(corpus / f"{split}.tsv", ["ltr", "wrd"], progress=False) == []


def test_same_seed_same_bytes_and_another_seed_other_bytes(corpus, tmp_path):
    make_demo_corpus(tmp_path / "again", **SMALL)
    assert digest(tmp_path / "again") == digest(corpus)
    make_demo_corpus(tmp_path / "other", **SMALL, seed=2)
    assert digest(tmp_path / "other").keys() != digest(corpus).keys() or read_labels(
        tmp_path / "other/train.wrd"
    ) != read_labels(corpus / "train.wrd")


def test_splits_share_no_sentence_and_no_voice(corpus):
    sentences = {split: set(read_labels(corpus / f"{split}.wrd")) for split in SPLITS}
    variants = {
        split: {path.rpartition("-")[2] for path, _ in read_manifest(corpus / f"{split}.tsv").entries}
        for split in SPLITS
    }
    for first, second in [("train", "valid"), ("train", "test"), ("valid", "test")]:
        assert not sentences[first] & sentences[second]
        assert not variants[first] & variants[second]
        assert not set(VARIANTS[first]) & set(VARIANTS[second])


def test_splits_share_no_sentence_where_they_are_large_either(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    monkeypatch.setattr(demo, "_speak", lambda *_: rng.integers(-9999, 9999, 3200, dtype=np.int16))  # 0.2 s each
    make_demo_corpus(tmp_path / "d", train_minutes=2, valid_minutes=1, test_minutes=1, progress=False)
    sentences = {split: read_labels(tmp_path / "d" / f"{split}.wrd") for split in SPLITS}
    assert [len(lines) for lines in sentences.values()] == [600, 300, 300]
    assert len(set(sentences["valid"] + sentences["test"])) == 600
    assert not set(sentences["train"]) & set(sentences["valid"] + sentences["test"])


@pytest.mark.parametrize("grammar", [language.grammar for language in LANGUAGES.values()], ids=LANGUAGES)
def test_every_word_is_about_equally_frequent_and_sentences_are_short(grammar):
    source = SentenceSource(random.Random(1), grammar)
    sentences = [source.next(set()) for _ in range(700)]
    counts = collections.Counter(word for sentence in sentences for word in sentence.split())
    assert set(counts) == set(grammar.vocabulary)
    assert max(counts.values()) < 1.15 * min(counts.values())
    assert {len(sentence.split()) for sentence in sentences} == {3, 4, 5}


def test_audio_is_trimmed_and_neither_silent_nor_clipped(corpus):
    manifest = read_manifest(corpus / "train.tsv")
    for index in range(len(manifest.entries)):
        samples = read_audio(manifest.audio_path(index))
        peak = np.abs(samples).max()
        loud = np.flatnonzero(np.abs(samples) > demo.SILENCE_LEVEL * peak) / 16000
        assert demo.PEAKS[0] - 0.01 < peak < demo.PEAKS[1] + 0.01
        assert 0.8 < len(samples) / 16000 < 4
        for edge in (loud[0], len(samples) / 16000 - loud[-1]):
            assert 0.045 < edge < 0.105


def test_english_sentences_are_the_ones_that_the_first_version_made():
    """Seed 1 keeps its bytes: recipes and reported numbers rest on them."""
    source = SentenceSource(random.Random("1 train"), LANGUAGES["en"].grammar)
    assert [source.next(set()) for _ in range(3)] == [
        "TWO RED SHIPS TODAY",
        "COUNT BLUE PENCILS UPSTAIRS",
        "LIFT SEVEN PINK MONKEYS OUTSIDE",
    ]


def test_another_language_has_its_own_words_voices_and_settings(tmp_path):
    make_demo_corpus(tmp_path / "nl", **SMALL, language="nl")
    words = {word for split in SPLITS for line in read_labels(tmp_path / f"nl/{split}.wrd") for word in line.split()}
    assert words == set(LANGUAGES["nl"].grammar.vocabulary)
    assert all("-nl-" in path for path, _ in read_manifest(tmp_path / "nl/train.tsv").entries)
    assert json.loads((tmp_path / "nl/demo.json").read_text())["settings"]["language"] == "nl"
    assert (tmp_path / "nl/README.txt").read_text().startswith("Demo speech of s3distill: Dutch\n====")


def test_what_is_written(corpus):
    record = json.loads((corpus / "demo.json").read_text())
    assert record["settings"] == {
        **{"format": 1, "synthetic": True, "seed": 1},
        **{name: SMALL[name] for name in ("train_minutes", "valid_minutes", "test_minutes")},
    }
    assert "SYNTHETIC" in (corpus / "README.txt").read_text()
    assert read_manifest(corpus / "train.tsv").root == corpus
    assert (corpus / "train.tsv").read_text().startswith(".\n")
    labels = " ".join(read_labels(corpus / "train.ltr")).split()
    assert read_dictionary(corpus / "dict.ltr.txt") == dict(collections.Counter(labels))
    minutes = [record["statistics"][split]["minutes"] for split in SPLITS]
    assert all(0 <= got - asked < 0.06 for got, asked in zip(minutes, (0.5, 0.1, 0.1), strict=True))


def test_the_same_settings_are_reused_and_damage_is_repaired(corpus, monkeypatch):
    before = digest(corpus)
    monkeypatch.setattr(demo, "write_corpus", lambda *_: pytest.fail("made again"))
    statistics = make_demo_corpus(corpus, **SMALL)
    assert statistics["train"]["utterances"] == len(read_manifest(corpus / "train.tsv").entries)
    monkeypatch.undo()
    read_manifest(corpus / "test.tsv").audio_path(0).unlink()
    make_demo_corpus(corpus, **SMALL)
    assert digest(corpus) == before


def test_other_settings_replace_a_demo_corpus(tmp_path):
    tiny = {"train_minutes": 0.05, "valid_minutes": 0.03, "test_minutes": 0.03, "progress": False}
    make_demo_corpus(tmp_path / "d", **tiny)
    make_demo_corpus(tmp_path / "d", **{**tiny, "train_minutes": 0.1})
    assert json.loads((tmp_path / "d/demo.json").read_text())["settings"]["train_minutes"] == 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError, match="must be a new or empty folder or an older demo corpus, but holds other files; choose"
    ):
        make_demo_corpus(tmp_path, **SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_speak", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_demo_corpus(tmp_path / "d", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path, capsys):
    lengths = ["--minutes", "0.05", "--valid-minutes", "0.03", "--test-minutes", "0.03"]
    assert main(["demo-data", str(tmp_path / "d"), *lengths, "--seed", "3", "--no-progress"]) == 0
    assert "synthetic speech (espeak-ng)" in capsys.readouterr().out
    assert json.loads((tmp_path / "d/demo.json").read_text())["settings"]["seed"] == 3
    assert main(["demo-data", str(tmp_path / "d"), "--minutes", "-1"]) == 2
    assert "`train_minutes` must be above 0, but is -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_minutes": 0}, "`train_minutes` must be above 0, but is 0"),
        ({"test_minutes": float("nan")}, "`test_minutes` must be above 0, but is nan"),
        ({"language": "nl-be"}, "must be some of en, nl, de, es, fr, it, but is 'nl-be' \\(unknown: 'nl-be'\\)"),
        ({"test_minutes": 60}, "must be at most 40 together, but are 60.1; the grammar has too few sentences"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_demo_corpus(tmp_path / "d", **{**SMALL, **settings})
