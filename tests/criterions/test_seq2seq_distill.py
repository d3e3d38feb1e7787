"""`seq2seq_distill` on its task: both levels against loops over single utterances, what the teacher is needed for, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("fairseq")

from fairseq.criterions import build_criterion
from omegaconf import OmegaConf

from s3distill.criterions.seq2seq_distill import Seq2SeqDistillConfig
from s3distill.data.nbest import Hypothesis, NbestEntry, write_nbest
from tests.models import seq2seq

NBEST = [
    [("A B | C |", -0.1), ("A B |", -0.4), ("C |", -2.0)],
    [("D E A D |", -0.2)],
    [("B E | A |", -0.3), ("B | A | D E |", -0.5)],
    [("C A B |", -0.2), ("C A |", -0.2)],
    [("E |", -0.1), ("D |", -3.0), ("E E |", -4.0)],
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = seq2seq.write_corpus(tmp_path_factory.mktemp("corpus"))
    entries = [
        NbestEntry(f"train/{i}.flac", tuple(Hypothesis(text, score, 0.5) for text, score in hypotheses))
        for i, hypotheses in enumerate(NBEST)
    ]
    write_nbest(folder / "train.nbest.jsonl", entries)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seq2seq.write_backbone(tmp_path_factory.mktemp("backbone") / "pretrained.pt")


@pytest.fixture(scope="module")
def teacher(data: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    task, model, cfg = seq2seq.build(data, backbone, "wav2vec_seq2seq")
    seq2seq.make_talkative(model)
    return seq2seq.save(tmp_path_factory.mktemp("teacher") / "teacher.pt", task, model, cfg)


def build(
    data: Path, backbone: Path, teacher: Path | None, task: dict[str, Any] | None = None, **criterion: Any
) -> tuple[Any, Any, Any]:
    """(task, student, criterion) as fairseq builds them, with what it checks."""
    model_options = criterion.pop("model", {})
    options = {"_name": "audio_seq2seq_distill", "teacher_path": teacher and str(teacher), **(task or {})}
    built_task, model, _ = seq2seq.build(data, backbone, task=options, **model_options)
    seq2seq.make_talkative(model)
    config = OmegaConf.structured(Seq2SeqDistillConfig(**criterion))
    OmegaConf.set_struct(config, False)
    config._name = "seq2seq_distill"
    return built_task, model.eval(), built_task.build_criterion(config)


def run(parts: tuple[Any, Any, Any], rows: tuple[int, ...], split: str = "train") -> tuple[Tensor, int, dict[str, Any]]:
    task, model, criterion = parts
    return criterion(model, seq2seq.batch(task, split, rows))


def probabilities(model: Any, task: Any, row: int, text: str) -> Tensor:
    """log p of the next symbol at each position of a text, [U, V], and its symbols behind it as the last column's index."""
    sample = seq2seq.batch(task, rows=(row,))
    numbers = symbols(task, text)
    read = torch.tensor([[task.target_dictionary.eos(), *numbers[:-1]]])
    with torch.no_grad():
        encoder_out = model.encoder(source=sample["net_input"]["source"], padding_mask=None)
        return model.decoder(read, encoder_out=encoder_out)[0][0]


def symbols(task: Any, text: str) -> list[int]:
    return [*(task.target_dictionary.index(s) for s in text.split()), task.target_dictionary.eos()]


def cross_entropy(model: Any, task: Any, row: int, text: str) -> tuple[float, int]:
    log_p, said = probabilities(model, task, row, text).log_softmax(-1), symbols(task, text)
    return -sum(log_p[u, s].item() for u, s in enumerate(said)), len(said)


def test_word_level_is_the_loop_over_utterances(data: Path, backbone: Path, teacher: Path) -> None:
    parts = task, model, _ = build(data, backbone, teacher, alpha=0.3, temperature=2.0)
    ce = kd = size = 0
    for row, text in enumerate(seq2seq.TEXTS):
        loss, length = cross_entropy(model, task, row, text)
        p, q = ((probabilities(m, task, row, text) / 2).log_softmax(-1).double() for m in (task.teacher._model, model))
        ce, size = ce + loss, size + length
        kd += 4 * (p.exp() * (p - q)).sum().item()
    loss, got_size, log = run(parts, (0, 1, 2, 3, 4))
    assert got_size == size and log["ce"].item() == pytest.approx(ce, rel=1e-4)
    assert kd > 1 and log["kd"].item() == pytest.approx(kd, rel=1e-4)
    assert loss.item() == pytest.approx(0.3 * ce + 0.7 * kd, rel=1e-4)


@pytest.mark.parametrize("weighting", ["one_best", "uniform", "ranked"])
def test_sequence_level_is_the_loop_over_hypotheses(data: Path, backbone: Path, weighting: str) -> None:
    options = {"alpha": 0.25, "seq_kd": weighting, "seq_beta": 1.5}
    parts = task, model, _ = build(data, backbone, None, {"nbest": True}, **options)
    expected = 0.0
    for row, (text, hypotheses) in enumerate(zip(seq2seq.TEXTS, NBEST, strict=True)):
        decay = {"one_best": math.inf, "uniform": 0.0, "ranked": 1.5}[weighting]
        weights = [math.exp(score - (decay * k if k else 0.0)) for k, (_, score) in enumerate(hypotheses)]
        gold, length = cross_entropy(model, task, row, text)
        expected += 0.25 * gold
        for weight, (hypothesis, _) in zip(weights, hypotheses, strict=True):
            loss, symbols_of_it = cross_entropy(model, task, row, hypothesis)
            expected += 0.75 * length * weight / sum(weights) * loss / symbols_of_it
    assert run(parts, (0, 1, 2, 3, 4))[0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seq_kd", ["none", "ranked"])
def test_a_batch_is_the_sum_of_its_utterances(data: Path, backbone: Path, teacher: Path, seq_kd: str) -> None:
    parts = build(data, backbone, teacher, {"nbest": seq_kd != "none"}, alpha=0.4, seq_kd=seq_kd)
    together = run(parts, (0, 1, 2, 3, 4))[0]
    alone = [run(parts, (row,))[0].item() for row in range(5)]
    assert together.item() == pytest.approx(sum(alone), rel=1e-4)


def test_labels_alone_need_neither_teacher_nor_hypotheses(data: Path, backbone: Path) -> None:
    parts = task, model, _ = build(data, backbone, None, alpha=1.0)
    loss, _, log = run(parts, (0, 3))
    expected = sum(cross_entropy(model, task, row, seq2seq.TEXTS[row])[0] for row in (0, 3))
    assert loss.item() == pytest.approx(expected, rel=1e-4) and "kd" not in log


def test_validation_without_hypotheses_takes_the_labels(data: Path, backbone: Path) -> None:
    parts = build(data, backbone, None, {"nbest": True}, alpha=0.25, seq_kd="ranked")
    loss, _, log = run(parts, (0, 1), "valid")
    assert loss.item() == log["ce"].item()


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(data: Path, backbone: Path, teacher: Path) -> None:
    parts = task, model, _ = build(data, backbone, teacher, alpha=0.0, encoder_weight=1.0)
    _, _, before = run(parts, (0, 1, 2))
    model.load_state_dict(task.teacher._model.state_dict())
    _, size, after = run(parts, (0, 1, 2))
    assert before["kd"] > 1 and after["kd"].item() == pytest.approx(0, abs=1e-3)
    assert after["encoder"].item() / size == pytest.approx(-1, rel=1e-4)  # no l1, and a cosine of 1 counts -1
    assert before["encoder"].item() / size > -0.5


def test_the_student_alone_learns_and_is_saved(data: Path, backbone: Path, teacher: Path) -> None:
    parts = task, model, criterion = build(data, backbone, teacher, alpha=0.5, encoder_weight=1.0)
    run(parts, (0, 1))[0].backward()
    assert model.decoder.embed_out.grad.abs().sum() > 0 and model.encoder.proj.weight.grad.abs().sum() > 0
    theirs = task.teacher._model
    assert not theirs.training and not any(p.requires_grad for p in theirs.parameters())
    assert not list(criterion.parameters()) and set(task.state_dict()) == {"target_dictionary"}


def test_the_teacher_hears_audio_without_masks(data: Path, backbone: Path, teacher: Path) -> None:
    masks = {"apply_mask": True, "mask_prob": 0.9, "mask_length": 2}
    task, model, criterion = build(data, backbone, teacher, alpha=0.5, model=masks)
    sample = seq2seq.batch(task, rows=(0, 1))
    first, again = (task.teacher(sample["net_input"])[0] for _ in range(2))
    assert torch.equal(first, again)
    model.train()
    assert criterion(model, sample)[0].item() != criterion(model, sample)[0].item()


def test_a_teacher_in_half_precision_is_close(data: Path, backbone: Path, teacher: Path) -> None:
    exact, rough = (
        run(build(data, backbone, teacher, {"teacher_dtype": dtype}), (0, 1))[2]["kd"].item()
        for dtype in ("float32", "bfloat16")
    )
    assert exact != rough and rough == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize(
    ("task", "criterion", "message"),
    [
        ({}, {"alpha": 1.5}, r"`criterion.alpha` must be in \[0, 1\], the weight of the labels, but is 1.5"),
        ({}, {"temperature": 0.0}, "`temperature` must be positive and finite, but is 0.0"),
        ({}, {"seq_beta": -1.0}, "`criterion.seq_beta` must be at least 0 and finite, but is -1"),
        ({"teacher_path": None}, {}, "`task.teacher_path` must name a trained model with a decoder, but is empty"),
        ({}, {"seq_kd": "ranked"}, "`criterion.seq_kd`=ranked trains on hypotheses, but task.nbest is false; pass"),
        ({"nbest": True}, {}, "`task.nbest` reads hypotheses that nothing would be trained on"),
        ({"nbest_dir": "there"}, {}, "`task.nbest_dir` is about task.nbest, which is false"),
        ({"normalize": True}, {}, "`task.normalize` must be what the teacher was trained with: .* has normalize=False"),
        ({"autoregressive": False}, {}, "`task.autoregressive` must stay true in audio_seq2seq_distill"),
        (
            {},
            {"encoder_weight": 1.0, "model": {"decoder_embed_dim": 32}},
            "model.decoder_embed_dim must be 16, as of teacher",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    data: Path, backbone: Path, teacher: Path, tmp_path: Path, task: dict, criterion: dict, message: str
) -> None:
    if task.get("normalize"):
        backbone = seq2seq.write_backbone(tmp_path / "normalised.pt", normalize=True)
    with pytest.raises(ValueError, match=message):
        build(data, backbone, teacher, task, **criterion)


def test_hypotheses_that_are_not_there_or_not_of_this_manifest_are_refused(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    parts = build(data, backbone, None, {"nbest": True, "nbest_dir": str(tmp_path)}, seq_kd="ranked")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*train.nbest.jsonl; decode train with the teacher"):
        run(parts, (0,))
    write_nbest(tmp_path / "train.nbest.jsonl", [NbestEntry("train/0.flac", (Hypothesis("A X |", -1.0, 0.5),))])
    with pytest.raises(ValueError, match="must have a line for each of the 5 utterances"):
        parts[0].load_dataset("train")


def test_a_teacher_without_a_decoder_and_stock_students_of_lists_are_refused(data: Path, backbone: Path) -> None:
    with pytest.raises(ValueError, match=r"must be of a model with a decoder, such as wav2vec_seq2seq"):
        build(data, backbone, backbone)
    task, model, _ = seq2seq.build(data, backbone, "wav2vec_seq2seq", {"_name": "audio_seq2seq_distill", "nbest": True})
    config = OmegaConf.structured(Seq2SeqDistillConfig(seq_kd="ranked"))
    criterion = build_criterion(OmegaConf.create({**config, "_name": "seq2seq_distill"}), task)
    with pytest.raises(
        ValueError, match=r"reads several texts per utterance, which model._name=wav2vec_seq2seq_student can"
    ):
        criterion.check(model, task)
    task, model, _ = seq2seq.build(data, backbone)
    with pytest.raises(ValueError, match=r"needs task._name=audio_seq2seq_distill, but the task is AudioCtcTask"):
        criterion.check(model, task)
