"""Decoders of `audio_ctc` through the real `fairseq-generate`: beam, lexicon and n-gram, n-best files, word times, bad options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

from s3distill.cli.main import main
from s3distill.data.manifest import read_manifest
from s3distill.data.nbest import read_nbest
from s3distill.decoding.ctc import CtcHypothesis
from s3distill.encoder.model import SpeechEncoder
from s3distill.tasks._ctc_generator import CtcGenerator, _samples_per_frame
from s3distill.tasks._decoding import refuse_decoders
from s3distill.tasks.audio_ctc import AudioCtcConfig, AudioCtcTask
from tests.masks import runs
from tests.tasks.test_audio_ctc import (
    KINDS,
    LETTERS,
    SAMPLES,
    _command,
    _generate,
    _lines,
    checkpoints,  # noqa: F401  a fixture
    corpus,  # noqa: F401  a fixture
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # hydra's, about fairseq's use of it

BEAM = ("--decoder", "beam", "--beam", "20", "--nbest", "4")


def texts(folder: Path, kind: str = "word", model: str = "wav2vec_ctc") -> list[str]:
    return [line.rpartition(" (")[0] for line in _lines(folder / f"hypo.{kind}-{model}.pt-test.txt")]


@pytest.mark.parametrize("kind", KINDS)
def test_beam_batched_and_single_give_the_same_lists(
    kind: str,
    corpus: Path,  # noqa: F811
    checkpoints: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    entries, timed = [], []
    for batch_size in (1, 5):
        out = tmp_path / str(batch_size)
        _generate([*_command(corpus, checkpoints[kind], batch_size=batch_size), *BEAM], out)
        lists = [json.loads(line)["hypotheses"] for line in _lines(out / "test.nbest.jsonl")]
        entries.append([[h["units"] for h in hypotheses] for hypotheses in lists])
        timed.append([json.loads(line) for line in _lines(out / "test.words.jsonl")])
    assert entries[0] == entries[1]
    for single, batched in zip(*timed, strict=True):
        assert single["text"] == batched["text"] != ""
        assert [w["word"] for w in single["words"]] == [w["word"] for w in batched["words"]]
        assert [w["start_s"] for w in single["words"]] == [w["start_s"] for w in batched["words"]]


def test_the_n_best_file_is_one_that_training_reads(
    corpus: Path,  # noqa: F811
    checkpoints: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    _generate([*_command(corpus, checkpoints["wav2vec_ctc"]), *BEAM], tmp_path)
    entries = read_nbest(tmp_path / "test.nbest.jsonl", read_manifest(corpus / "test.tsv"), LETTERS)
    assert max(len(entry.hypotheses) for entry in entries) == 4
    # the random model also says <unk>, which no label may have
    heard = [(text, e) for text, e in zip(texts(tmp_path, "units"), entries, strict=True) if "<unk>" not in text]
    assert len(heard) > 2 and all(text == entry.hypotheses[0].units for text, entry in heard)


def test_times_and_confidences(
    corpus: Path,  # noqa: F811
    checkpoints: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    _generate(_command(corpus, checkpoints["wav2vec_ctc"]), tmp_path)
    lines = [json.loads(line) for line in _lines(tmp_path / "test.words.jsonl")]
    assert [line["audio"] for line in lines] == [f"{i}.flac" for i in range(5)]
    assert [line["text"] for line in lines] == texts(tmp_path)
    assert any(line["words"] for line in lines)
    for line, num_samples in zip(lines, SAMPLES, strict=True):
        assert [w["word"] for w in line["words"]] == line["text"].split() and 0 < line["confidence"] <= 1
        moments = [moment for w in line["words"] for moment in (w["start_s"], w["end_s"])]
        assert moments == sorted(moments) and moments[-1] <= num_samples / 16000 + 0.02
        assert all(round(moment / 0.02, 3) == int(round(moment / 0.02, 3)) for moment in moments), "frames of 20 ms"
    assert not (tmp_path / "test.nbest.jsonl").exists(), "one hypothesis is no list"


def test_an_ensemble_and_its_only_model_twice_are_one(
    corpus: Path,  # noqa: F811
    checkpoints: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    path = checkpoints["wav2vec_ctc"]
    for name, models in (("one", path), ("two", f"{path}:{path}")):
        scorer = _generate([*_command(corpus, models), *BEAM])
        (tmp_path / name).write_text("\n".join(t.hypothesis for t in scorer.transcripts.in_order()))
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text() != ""


def test_a_mask_bank_decodes_with_a_beam(tmp_path: Path) -> None:
    data = runs.write_corpus(tmp_path / "data")
    backbone = runs.write_backbone(tmp_path / "backbone.pt")
    runs.write_run(tmp_path / "nl.pt", backbone, data)
    assert main(["masks", "pack", str(tmp_path / "nl.pt"), "--name", "nl", "--bank", str(tmp_path / "bank.st")]) == 0
    found = []
    for model in (
        [str(tmp_path / "nl.pt")],
        [str(backbone), "--mask-bank", str(tmp_path / "bank.st"), "--mask-name", "nl"],
    ):
        scorer = _generate([*_command(data, model[0]), *model[1:], *BEAM])
        found.append([(t.hypothesis, [w.start_s for w in t.times]) for t in scorer.transcripts.in_order()])
    assert found[0] == found[1] and all(text for text, _ in found[0])


def test_lexicon_and_language_model(
    corpus: Path,  # noqa: F811
    checkpoints: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("flashlight.lib.text")
    pytest.importorskip("kenlm")
    lexicon, model = tmp_path / "lexicon.txt", tmp_path / "lm.arpa"
    lexicon.write_text("alpha\tA B |\nbeta\tC |\ngamma\tD |\ngamma\tE |\n")  # words that are not what their letters say
    model.write_text(
        "\\data\\\nngram 1=6\nngram 2=1\n\n\\1-grams:\n-5\t<unk>\n-99\t<s>\t0\n-1\t</s>\n-4\talpha\t0\n-0.1\tbeta\t0\n-4\tgamma\t0\n\n"
        "\\2-grams:\n-0.1\tbeta beta\n\n\\end\\\n"
    )
    command = _command(corpus, checkpoints["wav2vec_ctc"])
    decoded = {}
    for name, options in {
        "lexicon": (),
        "model": ("--ngram-lm", str(model), "--lm-weight", "8"),
        "few": ("--word-score", "-50"),
    }.items():
        _generate(
            [*command, "--decoder", "lexicon", "--lexicon", str(lexicon), "--beam", "30", *options], tmp_path / name
        )
        decoded[name] = texts(tmp_path / name)
        lines = [json.loads(line) for line in _lines(tmp_path / name / "test.words.jsonl")]
        assert [" ".join(w["word"] for w in line["words"]) for line in lines] == decoded[name]
        assert {word for text in decoded[name] for word in text.split()} <= {"alpha", "beta", "gamma"}
    words = {name: " ".join(found).split() for name, found in decoded.items()}
    assert len(words["few"]) < len(words["lexicon"]) > 0
    assert words["model"].count("beta") / len(words["model"]) > words["lexicon"].count("beta") / len(words["lexicon"])
    with pytest.raises(ValueError, match=r"must know the symbols of the model, but knows none of \| A B C D E"):
        _generate([*command, "--decoder", "ngram", "--ngram-lm", str(model), "--lm-weight", "1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nbest 2", r"--nbest 2 has no effect on --decoder greedy, it is for beam and lexicon and ngram"),
        ("--decoder beam --nbest 6", r"--nbest must be at most --beam, but they are 6 and 5; pass more --beam"),
        ("--decoder beam --lexicon x", r"--lexicon x has no effect on --decoder beam, it is for lexicon; leave it out"),
        ("--decoder beam --lm-weight 2", r"--lm-weight 2\.0 has no effect on --decoder beam"),
        ("--decoder lexicon", r"--decoder lexicon needs --lexicon FILE; pass it, or --decoder beam"),
        ("--decoder ngram", r"--decoder ngram needs --ngram-lm FILE"),
        ("--decoder ngram --ngram-lm x", r"--ngram-lm has no effect at --lm-weight 0, fairseq-generate's default"),
        ("--decoder ngram --ngram-lm x --word-score 1", r"--word-score 1\.0 has no effect on --decoder ngram"),
        ("--symbol-threshold 5", r"--symbol-threshold 5\.0 has no effect on --decoder greedy"),
        ("--decoder beam --symbol-threshold -1", r"`symbol_threshold` must be above 0 nats"),
    ],
)
def test_options_that_cannot_work_are_refused(
    options: str,
    message: str,
    corpus: Path,  # noqa: F811
    checkpoints: dict[str, Path],  # noqa: F811
) -> None:
    with pytest.raises(ValueError, match=message):
        _generate([*_command(corpus, checkpoints["wav2vec_ctc"]), *options.split()])


def test_models_with_a_decoder_take_none_of_these_options() -> None:
    refuse_decoders(AudioCtcConfig())
    for option, value in {"decoder": "beam", "lexicon": "x", "word_score": 1.0, "symbol_threshold": 5.0}.items():
        with pytest.raises(ValueError, match=rf"--{option.replace('_', '-')} {value} is for CTC models"):
            refuse_decoders(AudioCtcConfig(**{option: value}))


def test_frames_of_stock_models_and_ours(corpus: Path, checkpoints: dict[str, Path]) -> None:  # noqa: F811
    from fairseq import checkpoint_utils

    for kind in KINDS:
        (model,), _ = checkpoint_utils.load_model_ensemble(
            [str(checkpoints[kind])], arg_overrides={"data": str(corpus)}
        )
        assert _samples_per_frame(model) == 320
        for encoder in (m for m in model.modules() if isinstance(m, SpeechEncoder)):
            assert encoder.config.frame_stride == 320
    with pytest.raises(RuntimeError, match="word times need the frame rate of the model, but Linear has no"):
        _samples_per_frame(torch.nn.Linear(2, 2))


def test_lists_leave_out_what_training_cannot_use(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    task = AudioCtcTask(AudioCtcConfig(data=str(corpus), labels="ltr"))
    dictionary = task.target_dictionary
    generator = CtcGenerator(dictionary, dictionary.bos(), _never, {}, {})
    a, unknown, padding = dictionary.index("A"), dictionary.unk(), dictionary.pad()

    def hypothesis(*tokens: int) -> CtcHypothesis:
        places = torch.arange(len(tokens))
        return CtcHypothesis(
            torch.tensor(tokens, dtype=torch.int64), -1.0, torch.zeros(len(tokens)), places, places + 1
        )

    frames = torch.zeros(3, len(dictionary))
    kept = generator._hypotheses(7, [hypothesis(), hypothesis(a), hypothesis(a, padding), hypothesis(unknown)], frames)
    assert [g.units for g in kept] == ["A"]
    assert generator._hypotheses(7, [hypothesis()], frames) == []
    assert "utterance 7 has no hypothesis that training could use" in caplog.text


def _never(*_: Any) -> Any:
    raise AssertionError("nothing is searched here")
