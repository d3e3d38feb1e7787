"""The multilingual demo corpus: a folder per language and the pooled one; whole, the same each time, and reused."""

import collections
import hashlib
import itertools
import json

import pytest

from s3distill.cli.main import main
from s3distill.data import demo, demo_multilingual
from s3distill.data.demo import SPLITS, make_demo_corpus
from s3distill.data.demo_languages import LANGUAGES
from s3distill.data.demo_multilingual import make_multilingual_corpus
from s3distill.data.manifest import (
    check_manifest,
    read_dictionary,
    read_labels,
    read_manifest,
    validate_for_training,
)

pytest.importorskip("espeakng_loader")
SMALL = {"train_minutes": 0.4, "valid_minutes": 0.1, "test_minutes": 0.1, "progress": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    make_multilingual_corpus(folder, ["es", "en", "nl"], **SMALL)
    return folder


def digest(folder) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_check_finds_nothing(corpus):
    for folder in ("en", "nl", "es", "all"):
        for split in SPLITS:
            assert check_manifest(corpus / folder / f"{split}.tsv", ["ltr", "wrd"], progress=False) == []
            labels, symbols = corpus / folder / f"{split}.ltr", corpus / folder / "dict.ltr.txt"
            validate_for_training(corpus / folder / f"{split}.tsv", labels, symbols)


def test_all_lists_every_utterance_of_every_language_in_one_order(corpus):
    assert (corpus / "all/train.tsv").read_text().startswith("..\nen/train/00000-en-us-")
    for split in SPLITS:
        pooled = read_manifest(corpus / f"all/{split}.tsv")
        assert pooled.root == corpus
        own = {name: read_manifest(corpus / name / f"{split}.tsv").entries for name in ("en", "nl", "es")}
        assert pooled.entries == [(f"{name}/{path}", n) for name, entries in own.items() for path, n in entries]
        for ending in ("wrd", "ltr"):
            lines = [line for name in own for line in read_labels(corpus / name / f"{split}.{ending}")]
            assert read_labels(corpus / f"all/{split}.{ending}") == lines


def test_a_dictionary_holds_the_letters_of_its_language_and_that_of_all_their_union(corpus):
    symbols = {folder: read_dictionary(corpus / folder / "dict.ltr.txt") for folder in ("en", "nl", "es", "all")}
    for language in ("en", "nl", "es"):
        assert symbols[language].keys() == {"|", *"".join(LANGUAGES[language].grammar.vocabulary)}
    assert "Ñ" in symbols["es"] and "Ñ" not in symbols["nl"]
    own = [collections.Counter(symbols[language]) for language in ("en", "nl", "es")]
    assert symbols["all"] == dict(sum(own, collections.Counter()))


def test_pooled_splits_share_no_sentence_and_no_voice(corpus):
    sentences = {split: set(read_labels(corpus / f"all/{split}.wrd")) for split in SPLITS}
    variants = {
        split: {path.rpartition("-")[2] for path, _ in read_manifest(corpus / f"all/{split}.tsv").entries}
        for split in SPLITS
    }
    for first, second in itertools.combinations(SPLITS, 2):
        assert not sentences[first] & sentences[second]
        assert not variants[first] & variants[second]


def test_the_languages_do_not_say_the_same_thing_in_turn(corpus):
    """Other decks per language: the word of a slot is not at the same place of its list in each of them."""

    def places(language):
        grammar = LANGUAGES[language].grammar
        lines = [line.split() for line in read_labels(corpus / language / "train.wrd")]
        return tuple(next(grammar.thing.index(word) for word in words if word in grammar.thing) for words in lines[:10])

    assert len({places(language) for language in ("en", "nl", "es")}) == 3


def test_english_is_the_corpus_that_the_command_makes_without_the_option(corpus, tmp_path):
    make_demo_corpus(tmp_path / "en", **SMALL)
    assert digest(tmp_path / "en") == digest(corpus / "en")


def test_same_languages_in_any_order_same_bytes_and_a_language_does_not_depend_on_the_others(corpus, tmp_path):
    make_multilingual_corpus(tmp_path / "again", ["nl", "es", "en"], **SMALL)
    assert digest(tmp_path / "again") == digest(corpus)
    make_multilingual_corpus(tmp_path / "one", ["nl"], **SMALL)
    assert digest(tmp_path / "one/nl") == digest(corpus / "nl")


def test_the_same_settings_are_reused_and_damage_is_repaired(corpus, monkeypatch):
    before = digest(corpus)
    statistics = json.loads((corpus / "demo.json").read_text())["statistics"]
    monkeypatch.setattr(demo_multilingual, "fresh_folder", lambda *_: pytest.fail("made again"))
    assert make_multilingual_corpus(corpus, ["es", "nl", "en"], **SMALL) == statistics
    monkeypatch.undo()
    (corpus / "all/test.ltr").unlink()
    read_manifest(corpus / "nl/test.tsv").audio_path(0).unlink()
    make_multilingual_corpus(corpus, ["es", "nl", "en"], **SMALL)
    assert digest(corpus) == before


def test_another_language_speaks_only_that_language(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "d"
    make_multilingual_corpus(folder, ["nl"], **SMALL)
    spoken, write = [], demo.write_corpus
    monkeypatch.setattr(demo_multilingual, "write_corpus", lambda *a: spoken.append(a[1].language) or write(*a))
    make_multilingual_corpus(folder, ["nl", "es", "en"], **SMALL)
    assert sorted(spoken) == ["en", "es"]
    assert digest(folder) == digest(corpus)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_multilingual, "_write_pooled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_multilingual_corpus(
            tmp_path / "d", ["it"], train_minutes=0.05, valid_minutes=0.03, test_minutes=0.03, progress=False
        )
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_beside_the_folders(corpus):
    record = json.loads((corpus / "demo.json").read_text())
    assert record["settings"]["languages"] == ["en", "nl", "es"]
    assert record["settings"]["synthetic"] is True
    readme = (corpus / "README.txt").read_text()
    assert "SYNTHETIC" in readme and "    es:  Spanish\n" in readme and "fr:" not in readme
    total = record["statistics"]["all"]["train"]
    assert total["utterances"] == len(read_manifest(corpus / "all/train.tsv").entries)
    assert total["words"] == sum(len(line.split()) for line in read_labels(corpus / "all/train.wrd"))
    assert sorted(path.name for path in corpus.iterdir()) == ["README.txt", "all", "demo.json", "en", "es", "nl"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="must be a new or empty folder or an older demo corpus, but holds other"):
        make_multilingual_corpus(tmp_path, ["nl"], **SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_command(tmp_path, capsys):
    out = str(tmp_path / "d")
    lengths = ["--minutes", "0.05", "--valid-minutes", "0.03", "--test-minutes", "0.03", "--no-progress"]
    assert main(["demo-data", out, *lengths, "--languages", "fr, de"]) == 0
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["README.txt", "all", "de", "demo.json", "fr"]
    printed = capsys.readouterr().out
    assert "\n  de  train " in printed and "\n  all test " in printed
    assert main(["demo-data", out, *lengths, "--languages", "fr,klingon"]) == 2
    assert "must be some of en, nl, de, es, fr, it, but is 'fr,klingon'" in capsys.readouterr().err
