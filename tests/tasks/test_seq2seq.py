"""Models with a decoder in the real `fairseq-generate`: beam search, scores, n-best files; batches of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

from fairseq import options
from fairseq_cli import generate

from s3distill.data.manifest import read_manifest
from s3distill.data.nbest import Hypothesis, NbestEntry, read_nbest
from s3distill.scoring.s3_wer import S3WerScorer
from s3distill.tasks._texts import TextDataset
from tests.models import seq2seq

STUDENT, STOCK = "wav2vec_seq2seq_student", "wav2vec_seq2seq"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seq2seq.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def checkpoints(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each model one whose ``w2v_path`` is gone."""
    folder = tmp_path_factory.mktemp("models")
    backbone = seq2seq.write_backbone(folder / "pretrained.pt")
    paths = {}
    for name in (STOCK, STUDENT):
        task, model, cfg = seq2seq.build(data, backbone, name)
        seq2seq.make_talkative(model)
        paths[name] = seq2seq.save(folder / f"{name}.pt", task, model, cfg)
    backbone.unlink()
    return paths


def decode(data: Path, model: Path, results: Path, *arguments: str, batch_size: int = 3) -> S3WerScorer:
    """fairseq-generate in this process; returns the scorer."""
    parser = options.get_generation_parser()
    parser.add_argument("--arch", "-a", default="wav2vec2")
    command = [
        str(data),
        "--task",
        "audio_ctc",
        "--labels",
        "ltr",
        "--path",
        str(model),
        "--gen-subset",
        "valid",
        "--cpu",
    ]
    command += [
        "--batch-size",
        str(batch_size),
        "--num-workers",
        "0",
        "--scoring",
        "s3_wer",
        "--post-process",
        "letter",
    ]
    command += ["--beam", "4", "--max-len-b", "8", "--unkpen", "100", "--results-path", str(results), *arguments]
    return generate.main(options.parse_args_and_arch(parser, command))


def transcripts(results: Path, model: Path) -> list[str]:
    return (results / f"hypo.units-{model.name}-valid.txt").read_text().splitlines()


@pytest.mark.parametrize("name", [STOCK, STUDENT])
def test_batch_and_single_give_the_same_text(
    data: Path, checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    model = checkpoints[name]
    for batch_size in (1, 3):
        decode(data, model, tmp_path / str(batch_size), batch_size=batch_size)
    single, batch = (transcripts(tmp_path / str(batch_size), model) for batch_size in (1, 3))
    assert single == batch and len(single) == 5
    assert len(set(single)) > 2, "what is said must depend on the audio"
    scores = json.loads((tmp_path / "3" / "scores-valid.json").read_text())
    assert scores["unit"]["num_reference"] == sum(len(text.split()) for text in seq2seq.TEXTS)
    assert scores["word"]["num_reference"] == 8 and scores["audio_seconds"] == sum(seq2seq.SAMPLES) / 16000


def test_scores_count_neither_eos_nor_padding(data: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    decode(data, checkpoints[STUDENT], tmp_path)
    references = (tmp_path / f"ref.units-{STUDENT}.pt-valid.txt").read_text().splitlines()
    assert references == [f"{text} (None-{i})" for i, text in enumerate(seq2seq.TEXTS)]
    assert not any("<" in line for line in transcripts(tmp_path, checkpoints[STUDENT]))


def test_nbest_lists_are_written_for_training(data: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    decode(data, checkpoints[STUDENT], tmp_path, "--nbest", "3", "--gen-subset", "train")
    entries = read_nbest(tmp_path / "train.nbest.jsonl", read_manifest(data / "train.tsv"), seq2seq.LETTERS)
    assert [len(entry.hypotheses) for entry in entries] == [3] * 5
    lines = (tmp_path / "generate-train.txt").read_text().splitlines()
    found: dict[int, list[float]] = {}
    for line in lines:
        kind, _, rest = line.partition("-")
        if kind == "H":
            number, score, _ = rest.split("\t")
            found.setdefault(int(number), []).append(float(score))
    for number, entry in enumerate(entries):
        in_bits = torch.tensor([hypothesis.score for hypothesis in entry.hypotheses]) / torch.tensor(2.0).log()
        assert in_bits.tolist() == pytest.approx(found[number], rel=1e-4)


def test_without_nbest_no_list_is_written(data: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    decode(data, checkpoints[STUDENT], tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))


def test_hypotheses_that_training_cannot_use_are_left_out(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    from s3distill.scoring._nbest_lists import NbestLists
    from s3distill.tasks._seq2seq_generator import Seq2SeqGenerator

    dictionary = seq2seq.build(data, seq2seq.write_backbone(data / "b.pt"))[0].target_dictionary
    eos, unknown, a = dictionary.eos(), dictionary.unk(), dictionary.index("A")
    said = [[eos], [a, unknown, eos], [a, eos], [dictionary.bos(), a, eos], [a, a, eos]]
    hypotheses = [
        {"tokens": torch.tensor(t), "score": torch.tensor(-k / 2), "positional_scores": torch.full((len(t),), -0.5)}
        for k, t in enumerate(said)
    ]

    class Search:
        def generate(self, models: Any, sample: Any) -> Any:
            return [hypotheses, hypotheses[:2]]

    lists = NbestLists({"train": ["0.flac", "1.flac"]}, 5)
    generator = Seq2SeqGenerator(Search(), dictionary, {}, lists)
    net_input = {"source": torch.zeros(2, 800), "padding_mask": None}
    generator.generate([], {"id": torch.tensor([1, 0]), "target": torch.tensor([[a, eos]] * 2), "net_input": net_input})
    useless, useful = lists.entries("train")
    assert (
        useless == NbestEntry("0.flac", ()) and "utterance 0 has no hypothesis that training could use" in caplog.text
    )
    kept = tuple(Hypothesis(u, s, pytest.approx(0.6065, rel=1e-3)) for u, s in (("A", -1.0), ("A A", -2.0)))
    assert useful == NbestEntry("1.flac", kept)


def test_error_rates_of_validation_are_fairseqs(data: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """`task.eval_wer` searches with fairseq's own generator and leaves `s3_wer` alone."""
    pytest.importorskip("editdistance")
    backbone = seq2seq.write_backbone(tmp_path / "pretrained.pt")
    before = S3WerScorer.run
    search = {"beam": 2, "max_len_b": 8}
    task, model, cfg = seq2seq.build(data, backbone, STUDENT, {"eval_wer": True, "eval_wer_config": search})
    cfg.criterion.sentence_avg = False
    criterion = task.build_criterion(cfg.criterion)
    log = task.valid_step(seq2seq.batch(task, "valid"), model.eval(), criterion)[2]
    assert log["_num_words"] == 8 and log["_num_word_errors"] > 0
    assert S3WerScorer.run is before


def text_of(tokens: torch.Tensor, dictionary: Any) -> str:
    return dictionary.string(tokens, extra_symbols_to_ignore={dictionary.pad()})


def test_texts_of_a_batch_stand_beside_their_utterances(data: Path, tmp_path: Path) -> None:
    backbone = seq2seq.write_backbone(tmp_path / "pretrained.pt")
    task, _, _ = seq2seq.build(data, backbone)
    task.load_dataset("train")
    dictionary = task.target_dictionary
    lists = [[("A B", -1.0), ("C", -2.0)], [("D", -1.0)], [("E E E", -1.0), ("E", -1.5)], [("A", 0.0)], [("B", 0.0)]]
    entries = [NbestEntry("", tuple(Hypothesis(u, s, 1.0) for u, s in texts)) for texts in lists]
    dataset = TextDataset(task.dataset("train"), dictionary, entries)
    batch = dataset.collater([dataset[i] for i in (2, 0, 1)])
    said = [text_of(text, dictionary) for text in batch["nbest"]["target"]]
    assert said == ["E E E", "E", "A B", "C", "D"]
    assert batch["nbest"]["utterances"].tolist() == [0, 0, 1, 1, 2] and batch["nbest"]["ranks"].tolist() == [
        0,
        1,
        0,
        1,
        0,
    ]
    assert batch["nbest"]["scores"].tolist() == [[-1.0, -1.5], [-1.0, -2.0], [-1.0, -torch.inf]]
    for texts in (batch["nbest"], {**batch, **batch["net_input"]}):
        eos, pad = dictionary.eos(), dictionary.pad()
        for read, target in zip(texts["prev_output_tokens"].tolist(), texts["target"].tolist(), strict=True):
            length = target.index(eos)
            assert read[: length + 1] == [eos, *target[:length]] and set(read[length + 1 :]) <= {pad}
    assert [text_of(text, dictionary) for text in batch["target"]] == [seq2seq.TEXTS[i] for i in (2, 0, 1)]
