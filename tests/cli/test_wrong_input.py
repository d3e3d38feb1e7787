"""What a new user gets wrong at `pseudo-label`, `fisher`, `tune-lm` and `old-head`: one line, before anything is decoded or written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from s3distill import compat
from s3distill.cli.main import main
from s3distill.data.manifest import read_dictionary
from s3distill.data.manifest_lines import parse_dictionary
from s3distill.decoding.lexicon import read_lexicon
from tests.cli.test_pseudo_label import SYMBOLS, manifest, teacher, write_teacher  # noqa: F401  fixtures


def refused(words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    (line,) = (text for text in capsys.readouterr().err.splitlines() if ": error: " in text)
    return line.partition(": error: ")[2]


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    words = [*SYMBOLS[4:], "AB"]
    unigrams = "".join(f"-1\t{word}\t0\n" for word in words)
    path = tmp_path / "lm.arpa"
    path.write_text(
        f"\\data\\\nngram 1={3 + len(words)}\nngram 2=1\n\n\\1-grams:\n-2\t<unk>\t0\n-99\t<s>\t0\n-1\t</s>\n{unigrams}\n"
        f"\\2-grams:\n-0.5\t<s> {words[0]}\n\n\\end\\\n"
    )
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "a/b"], "--name must be that of a split, without folders, but is 'a/b'; pass those as -o"),
        (["--name", "../b"], "--name must be that of a split, without folders"),
        (["--ngram-lm", "nowhere.arpa"], "`ngram_lm` has no effect at `lm_weight` 0, the default; give a weight"),
        (["--ngram-lm", "nowhere.arpa", "--lm-weight", "1"], "must be files, but nowhere.arpa is none; check the path"),
        (["--lexicon", "."], "lexicon and language model must be files, but . is none"),
    ],
)
def test_pseudo_label_refuses_before_it_decodes(
    options: list[str],
    message: str,
    manifest: Path,  # noqa: F811
    teacher: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert message in refused(["pseudo-label", manifest, "--teacher", teacher, "-o", out, *options], capsys)
    assert not out.exists()


def test_pseudo_label_refuses_a_file_as_its_folder(
    manifest: Path,  # noqa: F811
    teacher: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["pseudo-label", manifest, "--teacher", teacher, "-o", teacher]
    assert f"-o must be a folder, but {teacher} is a file" in refused(command, capsys)


def test_a_damaged_journal_is_named(
    manifest: Path,  # noqa: F811
    teacher: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["pseudo-label", manifest, "--teacher", teacher, "-o", tmp_path, "--codec", "none", "--no-progress"]
    assert main([str(word) for word in command]) == 0
    (part,) = (tmp_path / "pool.journal").iterdir()
    header = part.read_text().splitlines()[0]
    part.write_text(f'{header}\n{{"x": 1}}\n')
    assert f"{part} is damaged" in refused([*command, "--overwrite"], capsys)


def test_a_language_model_of_random_bytes_is_named(
    manifest: Path,  # noqa: F811
    teacher: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("kenlm")
    (tmp_path / "lm.bin").write_bytes(bytes(range(255, 0, -1)) * 2)
    command = ["pseudo-label", manifest, "--teacher", teacher, "-o", tmp_path / "out"]
    found = refused([*command, "--ngram-lm", tmp_path / "lm.bin", "--lm-weight", 1], capsys)
    assert f"must be an .arpa file or KenLM's own binary, but {tmp_path / 'lm.bin'} is not" in found


def test_a_byte_order_mark_is_no_part_of_a_symbol_or_word(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("| 1\nA 1\n", encoding="utf-8-sig")
    assert "but it starts with a byte order mark" in str(parse_dictionary(path)[1][0])
    with pytest.raises(ValueError, match="save it as UTF-8 without one"):
        read_dictionary(path)
    path.write_text("A\tA |\r\nA\u2028B\tA A |\n", encoding="utf-8-sig")  # U+2028 ends no line
    with pytest.raises(ValueError, match=r"must be spelled in the model's symbols, but it has no 'B' \(line 2\)"):
        read_lexicon(path, {"|": 4, "A": 5})
    path.write_text("A\tA |\r\n", encoding="utf-8-sig")
    assert read_lexicon(path, {"|": 4, "A": 5}) == {"A": [[5, 4]]}


def test_tune_lm_prints_a_line_that_decodes_where_no_language_model_is_best(
    manifest: Path,  # noqa: F811
    teacher: Path,  # noqa: F811
    arpa: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("kenlm")
    command = ["tune-lm", manifest, "--model", teacher, "--ngram-lm", arpa, "--lm-weights", "0", "--no-progress"]
    assert main([str(word) for word in command]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  --decoder beam --beam 50"  # ngram would need --ngram-lm


@pytest.mark.parametrize("command", ["tune-lm", "fisher"])
def test_a_device_that_is_not_there(
    command: str,
    manifest: Path,  # noqa: F811
    teacher: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words: dict[str, list[object]] = {
        "tune-lm": [manifest, "--model", teacher, "--lexicon", "x"],
        "fisher": [teacher, manifest, "-o", tmp_path / "f.safetensors"],
    }
    found = refused([command, *words[command], "--device", "cuda:99"], capsys)
    assert found == "--device must be one that is there, but 'cuda:99' is not; pass cpu"


def test_tune_lm_needs_a_batch(
    manifest: Path,  # noqa: F811
    teacher: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["tune-lm", manifest, "--model", teacher, "--lexicon", "x", "--batch-size", 0]
    assert refused(command, capsys) == "--batch-size must be at least 1, but is 0"


def test_fisher_refuses_options_without_effect_and_keeps_its_inputs(
    manifest: Path,  # noqa: F811
    teacher: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two, out = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "out"))
    # the labels by their path, as the help of find_utterances allows
    assert (
        main([str(w) for w in ["fisher", teacher, manifest, "-o", one, "--labels", manifest.with_suffix(".ltr")]]) == 0
    )
    assert main([str(w) for w in ["fisher", teacher, manifest, "-o", two, "--max-utterances", 2]]) == 0
    before = one.read_bytes()
    combine: list[object] = ["fisher", "--combine", one, two, "-o"]
    assert "-o must be another file than what is combined" in refused([*combine, one], capsys)
    assert "--max-utterances is about utterances" in refused([*combine, out, "--max-utterances", 2], capsys)
    assert "given each file once" in refused(["fisher", "--combine", one, one, "-o", out], capsys)
    assert "pass --from-model" in refused(["fisher", teacher, manifest, "-o", out, "--seed", 2], capsys)
    negative = ["fisher", teacher, manifest, "-o", out, "--seed", -1, "--from-model"]
    assert refused(negative, capsys) == "--seed must be at least 0, but is -1"
    out.mkdir()
    assert f"must be a file, but {out} is a folder" in refused([*combine, out], capsys)
    assert one.read_bytes() == before


def test_fisher_of_a_model_without_dictionary_takes_that_of_the_labels(
    manifest: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    silent = write_teacher(tmp_path / "silent.pt", None)
    dictionary = manifest.with_name("dict.ltr.txt")
    dictionary.write_text("".join(f"{symbol} 1\n" for symbol in SYMBOLS[4:]))
    words = ["fisher", silent, manifest, "-o", tmp_path / "f.safetensors", "--labels", manifest.with_suffix(".ltr")]
    try:
        assert main([str(word) for word in words]) == 0
    finally:
        os.unlink(dictionary)


def test_old_head_refuses_models_that_hear_audio_differently(
    teacher: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = compat.load_checkpoint(teacher)
    loud = tmp_path / "loud.pt"
    options = json.loads(json.dumps(state["cfg"]["model"])) | {"normalize": False}
    options["w2v_args"]["task"]["normalize"] = False
    task = {"_name": "audio_finetuning", "normalize": False}
    compat.write_checkpoint(loud, state["model"], options, task, {"target_dictionary": {"symbols": SYMBOLS}})
    found = refused(["old-head", teacher, loud, tmp_path / "out.pt"], capsys)
    assert "RUN and OLD must hear audio alike, but normalize is True in" in found
    assert not (tmp_path / "out.pt").exists()
