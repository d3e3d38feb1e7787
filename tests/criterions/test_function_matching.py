"""`ctc_distill` on mixed, masked, unlabelled and uncertain audio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

from s3distill.losses import logit_distillation
from s3distill.losses.mixup import draw_mixup_coefficients, mix_waveforms
from tests.models import ctc_models

LENGTHS, LABELS = (9000, 6500, 8000), ([4, 5, 6], [5, 6], [4, 6])
MASKS = {"apply_mask": True, "mask_prob": 0.3, "mask_length": 4, "mask_channel_prob": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ctc_models.write_dictionary(tmp_path_factory.mktemp("matching"))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> str:
    return str(ctc_models.write_ctc(folder / "teacher.pt"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> str:
    return str(ctc_models.write_encoder(folder / "encoder.pt", seed=2))


def build(folder: Path, teacher: str, model: dict, criterion: dict, **task: Any) -> tuple[Any, Any, Any]:
    task, built, loss_of = ctc_models.build(folder, model, criterion, teacher_path=teacher, **task)
    return task, built.train(), loss_of


def heard(model: Any, task: Any) -> tuple[list[Any], list[Any]]:
    """(source, masked) of every forward of the student's encoder and of the teacher's."""
    calls: tuple[list[Any], list[Any]] = [], []
    for encoder, found in ((model.encoder, calls[0]), (task.teachers[0]._encoder, calls[1])):
        encoder.register_forward_pre_hook(
            lambda _, args, options, found=found: found.append((args[0], options["masked"])), with_kwargs=True
        )
    return calls


def test_both_hear_the_same_mix_and_labels_do_not_count(folder: Path, teacher: str, encoder: str) -> None:
    options = {"alpha": 0.0, "mixup_alpha": 1.0}
    task, model, criterion = build(folder, teacher, {"w2v_path": encoder}, options)
    sample = ctc_models.batch(LENGTHS, LABELS)
    model.set_num_updates(7)
    student_calls, teacher_calls = heard(model, task)
    loss, _, log = criterion(model, sample)
    shares = draw_mixup_coefficients(1.0, [(1, 7, i, 1) for i in range(3)])
    mixed, _ = mix_waveforms(*sample["net_input"].values(), shares, False)
    assert torch.equal(student_calls[0][0], mixed) and torch.equal(teacher_calls[0][0], mixed)
    assert not torch.equal(mixed, sample["net_input"]["source"]) and "ctc_sum" not in log
    assert loss.item() == pytest.approx(log["loss_logits"].item())
    again = criterion(model, sample)[0]
    assert again.item() == loss.item(), "seed, update and utterance decide"
    model.set_num_updates(8)
    assert criterion(model, sample)[0].item() != loss.item()
    model.eval()
    criterion(model, sample)
    assert torch.equal(student_calls[-1][0], sample["net_input"]["source"]), "validation hears what there is"


def test_labels_of_unmixed_utterances_count(folder: Path, teacher: str, encoder: str) -> None:
    """Where half is mixed, the CTC term is that of the rest, alone."""
    options = {"alpha": 0.4, "mixup_alpha": 1.0, "mixup_prob": 0.5}
    _, model, criterion = build(folder, teacher, {"w2v_path": encoder}, options)
    sample = ctc_models.batch(LENGTHS, LABELS)
    seen = set()
    for update in range(12):
        model.set_num_updates(update)
        _, _, log = criterion(model, sample)
        seen.add(log.get("ctc_tokens", 0))
    assert seen & {2, 3, 4, 5} and len(seen) > 1, seen  # sums of some of 3, 2 and 2 labels
    _, plain, plain_criterion = build(folder, teacher, {"w2v_path": encoder}, {"alpha": 0.4})
    assert plain_criterion(plain, sample)[2]["ctc_tokens"] == 7


def test_unlabelled_utterances_have_no_ctc_term(folder: Path, teacher: str, encoder: str) -> None:
    _, model, criterion = build(folder, teacher, {"w2v_path": encoder}, {"alpha": 0.4})
    sample = ctc_models.batch(LENGTHS, LABELS)
    whole = criterion(model, sample)
    sample["labelled"] = torch.tensor([False, True, False])
    part = criterion(model, sample)
    n = LENGTHS[1]
    alone = criterion(model, ctc_models.collate([1], [sample["net_input"]["source"][1, :n]], [LABELS[1]]))
    assert part[2]["ctc_tokens"] == 2 and part[2]["ctc_sum"].item() == pytest.approx(
        alone[2]["ctc_sum"].item(), rel=1e-4
    )
    assert part[2]["loss_logits"].item() == pytest.approx(whole[2]["loss_logits"].item(), rel=1e-5)
    expected = 0.4 * alone[2]["ctc_sum"] / 2 * alone[1] + 0.6 * part[2]["loss_logits"]
    assert part[0].item() == pytest.approx(expected.item(), rel=1e-4)
    sample["labelled"] = torch.zeros(3, dtype=torch.bool)
    none = criterion(model, sample)
    assert none[0].item() == pytest.approx(0.6 * none[2]["loss_logits"].item(), rel=1e-5) and none[1] == whole[1]


@pytest.mark.parametrize("training", [True, False])
def test_batches_with_and_without_labels_log_the_same(training: bool, folder: Path, teacher: str, encoder: str) -> None:
    """fairseq adds the logs of ranks up by position: what one of them lacks would shift all that is behind it."""
    _, model, criterion = build(folder, teacher, {"w2v_path": encoder}, {"alpha": 0.4})
    assert criterion.logging_outputs_can_be_summed()
    sample, logs = ctc_models.batch(LENGTHS, LABELS), []
    for labelled in (True, False):
        sample["labelled"] = torch.full((3,), labelled)
        logs.append(criterion(model.train(training), sample)[2])
    kinds = [[(name, torch.is_tensor(value)) for name, value in log.items()] for log in logs]
    assert kinds[0] == kinds[1] and logs[1]["ctc_tokens"] == 0


@pytest.mark.parametrize("share", [True, False])
def test_time_masks_are_shared_or_the_students_own(share: bool, folder: Path, teacher: str, encoder: str) -> None:
    options = {"alpha": 0.0, **({"teacher_mask": "same"} if share else {})}
    task, model, criterion = build(folder, teacher, {"w2v_path": encoder, **MASKS}, options)
    student_calls, teacher_calls = heard(model, task)
    criterion(model, ctc_models.batch(LENGTHS, LABELS))
    if share:
        assert student_calls[0][1].any() and torch.equal(student_calls[0][1], teacher_calls[0][1])
    else:
        assert student_calls[0][1] is None and teacher_calls[0][1] is None
    model.eval()
    criterion(model, ctc_models.batch(LENGTHS, LABELS))
    assert student_calls[-1][1] is None and teacher_calls[-1][1] is None


def test_a_student_that_is_its_teacher_agrees_under_shared_masks_only(folder: Path, teacher: str) -> None:
    sample, values = ctc_models.batch(LENGTHS, LABELS), {}
    for mask in ("same", "none"):
        options = {"alpha": 0.0, "teacher_mask": mask}
        _, model, criterion = build(folder, teacher, {"student_path": teacher, **MASKS}, options)
        values[mask] = criterion(model, sample)[0].item()
    assert abs(values["same"]) < 1e-3 < 0.1 < values["none"]


def test_one_extractor_for_both(folder: Path, teacher: str) -> None:
    sample, results = ctc_models.batch(LENGTHS, LABELS), []
    for shared in (True, False):
        model = {"student_path": teacher, "shares_extractor": shared, "distill_layers": "1"}
        task, built, criterion = build(folder, teacher, model, {"hidden_weight": 1.0})
        count = []
        for extractor in (built.feature_extractor, task.teachers[0]._encoder.feature_extractor):
            extractor.register_forward_hook(lambda *_, count=count: count.append(1))
        loss, _, _ = criterion(built, sample)
        loss.backward()
        results.append((loss.item(), len(count)))
        assert all(p.grad is None for p in built.feature_extractor.parameters())
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5) and [n for _, n in results] == [1, 2]


def test_only_sure_frames_or_utterances_count(folder: Path, teacher: str, encoder: str) -> None:
    sample = ctc_models.batch(LENGTHS, LABELS)
    task, model, plain = build(folder, teacher, {"w2v_path": encoder}, {"alpha": 0.0})
    out = model(*sample["net_input"].values(), predict=True)
    answer = task.teachers[0].outputs(*sample["net_input"].values(), [], True)
    valid = ~answer.padding_mask
    top = answer.logits.softmax(-1).amax(-1)
    threshold = float(top[valid].median())
    student = out["encoder_out"].transpose(0, 1)
    for kind in ("frames", "utterances"):
        options = {"alpha": 0.0, "confidence": kind, "confidence_threshold": threshold}
        _, model, criterion = build(folder, teacher, {"w2v_path": encoder}, options)
        loss, num_frames, log = criterion(model, sample)
        weights = top >= threshold
        if kind == "utterances":
            spoken = valid & (answer.logits.argmax(-1) != 0)
            weights = ((top * spoken).sum(1) / spoken.sum(1) >= threshold)[:, None].expand_as(valid)
        expected = logit_distillation(student, answer.logits, answer.padding_mask, frame_weights=weights)
        assert loss.item() == pytest.approx(expected.total.item(), rel=1e-3)
        assert int(log["logit_share"]) == int((weights & valid).sum()) and num_frames == int(valid.sum())
    assert 0 < int((top >= threshold)[valid].sum()) < int(valid.sum())
    assert plain(model, sample)[0].item() > 0


def test_a_relative_threshold_follows_labelled_utterances_and_is_saved(
    folder: Path, teacher: str, encoder: str
) -> None:
    options = {"alpha": 0.0, "confidence": "frames", "confidence_relative": True, "confidence_decay": 0.5}
    _, model, criterion = build(folder, teacher, {"w2v_path": encoder}, options)
    sample = ctc_models.batch(LENGTHS, LABELS)
    sample["labelled"] = torch.zeros(3, dtype=torch.bool)
    assert int(criterion(model, sample)[2]["logit_share"]) == 0, "nothing is sure before the first labelled batch"
    sample["labelled"] = torch.tensor([True, False, False])
    criterion(model, sample)
    mean, count = criterion.confidence.relative.mean.clone(), int(criterion.confidence.relative.num_updates)
    assert 0 < float(mean) <= 1 and count == 1
    _, num_frames, log = criterion(model.eval(), sample)
    assert int(criterion.confidence.relative.num_updates) == 1, "validation leaves it alone"
    assert float(log["confidence_threshold"]) / num_frames == pytest.approx(0.9 * float(mean), rel=1e-5)
    from fairseq import utils

    assert utils.has_parameters(criterion), "what fairseq saves a criterion by"
    _, _, again = build(folder, teacher, {"w2v_path": encoder}, options)
    again.load_state_dict(criterion.state_dict())
    assert torch.equal(again.confidence.relative.mean, mean)
    again.load_state_dict(None)  # of a run that had no such threshold


def test_the_threshold_is_that_of_all_ranks(
    folder: Path, teacher: str, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank's sums (5 frames of posterior 0.5, here) count as if its utterances were in the batch."""
    options = {"alpha": 0.0, "confidence": "frames", "confidence_relative": True}
    sample, means = ctc_models.batch(LENGTHS, LABELS), []
    for others in (torch.zeros(2), torch.tensor([2.5, 5.0])):
        _, model, criterion = build(folder, teacher, {"w2v_path": encoder}, options)
        sums: list[torch.Tensor] = []
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(
            torch.distributed,
            "all_reduce",
            lambda x, others=others, sums=sums: sums.append(x.clone()) or x.add_(others),
        )
        criterion(model, sample)
        monkeypatch.undo()
        own = sums[0]
        assert float(criterion.confidence.relative.mean) == pytest.approx(float((own + others)[0] / (own + others)[1]))
        means.append(float(criterion.confidence.relative.mean))
    assert means[0] != means[1]


@pytest.mark.parametrize(
    ("model", "criterion", "message"),
    [
        ({}, {"mixup_alpha": -1.0, "alpha": 0.0}, r"`criterion\.mixup_alpha` must be at least 0"),
        ({}, {"mixup_alpha": 1.0, "mixup_prob": 0.0}, r"`criterion\.mixup_prob` must be in \(0, 1\]"),
        ({}, {"mixup_prob": 0.5}, r"`criterion\.mixup_prob` is about mixup"),
        ({}, {"mixup_alpha": 1.0}, r"mixup_prob=1 mixes all of them, but criterion\.alpha=0\.5 weighs labels"),
        ({}, {"mixup_alpha": 1.0, "mixup_prob": 0.5, "alpha": 1.0}, r"criterion\.alpha=1 leaves them out"),
        ({}, {"teacher_mask": "same"}, r"there are none \(model\.apply_mask=False"),
        (
            {**MASKS, "mask_channel_prob": 0.1, "mask_channel_length": 4},
            {"teacher_mask": "same"},
            r"`model\.mask_channel_prob` is 0\.1, but criterion\.teacher_mask=same",
        ),
        (
            {},
            {"confidence": "frames", "confidence_threshold": 1.5},
            r"`criterion\.confidence_threshold` .*must be in \[0, 1\]",
        ),
        (
            {},
            {"confidence": "frames", "alpha": 1.0},
            "about the teacher's logits, which criterion\\.alpha=1 leaves out",
        ),
        (
            {},
            {"confidence_relative": True},
            r"`criterion\.confidence_relative` is True, but criterion\.confidence=none",
        ),
        (
            {},
            {"confidence": "frames", "confidence_decay": 0.5},
            r"`criterion\.confidence_decay` is of a relative threshold, but is 0\.5 where",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    model: dict, criterion: dict, message: str, folder: Path, teacher: str, encoder: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(folder, teacher, {"w2v_path": encoder, **model}, criterion)


def test_unlabelled_audio_needs_a_teacher(folder: Path, teacher: str, encoder: str) -> None:
    with pytest.raises(ValueError, match=r"task\.unlabelled_subset=more learn from the teacher alone"):
        build(folder, teacher, {"w2v_path": encoder}, {"alpha": 1.0}, unlabelled_subset="more")
