"""`ctc_distill` on small models: its terms, padding, validation, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("fairseq")

from fairseq import metrics

from s3distill.criterions.ctc_distill import CtcDistill
from tests.models import ctc_models

LENGTHS, LABELS = (9000, 6500), ([4, 5, 6], [5, 6])
HEADS = {"distill_layers": "1,2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ctc_models.write_dictionary(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> str:
    return str(ctc_models.write_ctc(folder / "teacher.pt"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> str:
    return str(ctc_models.write_encoder(folder / "encoder.pt", seed=2))


def run(folder: Path, teacher: str | None, model: Any, criterion: Any, sample: Any = None, **task: Any) -> Any:
    _, built, loss_of = ctc_models.build(folder, model, criterion, teacher_path=teacher, **task)
    return loss_of(built.train(), sample or ctc_models.batch(LENGTHS, LABELS)), built


def test_each_term_is_what_the_docstring_says(folder: Path, teacher: str, encoder: str) -> None:
    sample = ctc_models.batch(LENGTHS, LABELS)
    options = {"alpha": 0.3, "temperature": 2.0, "hidden_weight": 0.7, "cosine_weight": 0.0}
    task, model, criterion = ctc_models.build(folder, {"w2v_path": encoder, **HEADS}, options, teacher_path=teacher)
    loss, num_frames, log = criterion(model.train(), sample)
    source, padding = sample["net_input"]["source"], sample["net_input"]["padding_mask"]
    out = model(source, padding, predict=True)
    heard = task.teachers[0].outputs(source, padding, [1, 2], True)
    logits, valid = out["encoder_out"].transpose(0, 1), ~out["padding_mask"]
    assert num_frames == int(valid.sum())
    ctc = F.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        sample["target"],
        valid.sum(1),
        sample["target_lengths"],
        reduction="sum",
    )
    teacher_p = (heard.logits[valid] / 2).softmax(-1)
    kl = (teacher_p * (teacher_p.log() - (logits[valid] / 2).log_softmax(-1))).sum(-1).mean()
    pairs = zip(out["predictions"], heard.hidden_states, strict=True)
    hidden = sum((p[valid] - h[valid]).abs().mean() for p, h in pairs)
    expected = 0.3 * ctc / 5 + 0.7 * 4 * kl + 0.7 * hidden
    assert (loss / num_frames).item() == pytest.approx(expected.item(), rel=1e-4)
    assert (log["ctc_sum"] / log["ctc_tokens"]).item() == pytest.approx((ctc / 5).item(), rel=1e-4)
    assert (log["loss_logits"] / num_frames).item() == pytest.approx((4 * kl).item(), rel=1e-4)


def test_padded_is_unpadded(folder: Path, teacher: str, encoder: str) -> None:
    sample = ctc_models.batch(LENGTHS, LABELS)
    options = {"alpha": 0.0, "hidden_weight": 1.0}
    _, model, criterion = ctc_models.build(folder, {"w2v_path": encoder, **HEADS}, options, teacher_path=teacher)
    model.train()  # no dropout, no masks: the same numbers
    whole = criterion(model, sample)
    parts = []
    for i, (n, label) in enumerate(zip(LENGTHS, LABELS, strict=True)):
        parts.append(criterion(model, ctc_models.collate([i], [sample["net_input"]["source"][i, :n]], [label])))
    assert whole[1] == sum(part[1] for part in parts)
    assert whole[0].item() == pytest.approx(sum(part[0].item() for part in parts), rel=1e-4)


def test_ctc_alone_has_the_gradient_of_fairseqs_own_criterion(folder: Path, encoder: str) -> None:
    from fairseq.criterions.ctc import CtcCriterion, CtcCriterionConfig

    sample = ctc_models.batch(LENGTHS, LABELS)
    task, model, criterion = ctc_models.build(folder, {"w2v_path": encoder}, {"alpha": 1.0})
    stock = CtcCriterion(CtcCriterionConfig(zero_infinity=True, sentence_avg=False), task)
    weight, gradients = model.w2v_encoder.proj.weight, []
    for each in (criterion, stock):
        model.zero_grad()
        loss, size, _ = each(model.train(), sample)
        loss.backward()
        gradients.append(weight.grad / size)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6) and gradients[0].abs().max() > 1e-3


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_logits(folder: Path, teacher: str) -> None:
    (loss, _, log), model = run(folder, teacher, {"student_path": teacher}, {"alpha": 0.0})
    loss.backward()
    assert abs(loss.item()) < 1e-4 and float(log["logit_share"]) > 0
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-3


def test_no_gradient_and_no_parameter_of_the_teacher(folder: Path, teacher: str, encoder: str) -> None:
    task, model, criterion = ctc_models.build(folder, {"w2v_path": encoder}, {"alpha": 0.2}, teacher_path=teacher)
    criterion(model.train(), ctc_models.batch(LENGTHS, LABELS))[0].backward()
    assert model.w2v_encoder.proj.weight.grad.abs().max() > 0
    assert not list(criterion.parameters()) and not [n for n in model.state_dict() if "teacher" in n]
    assert not any(p.requires_grad for p in task.teachers[0]._encoder.parameters())


def test_frozen_encoder_learns_the_head_and_prediction_heads_alone(folder: Path, teacher: str, encoder: str) -> None:
    model = {"w2v_path": encoder, **HEADS, "prune_units": ["ffn"], "freeze_finetune_updates": 5}
    criterion = {"hidden_weight": 1.0, "target_sparsity": 0.2, "sparsity_warmup": 10}
    _, built, loss_of = ctc_models.build(folder, model, criterion, teacher_path=teacher)
    built.train()
    loss, _, log = loss_of(built, ctc_models.batch(LENGTHS, LABELS))
    loss.backward()
    learn = {name for name, p in built.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert (
        learn and all(name.startswith(("heads.", "w2v_encoder.proj.")) for name in learn) and "size_penalty" not in log
    )
    built.set_num_updates(10)
    _, num_frames, log = loss_of(built, ctc_models.batch(LENGTHS, LABELS))
    assert log["size_target_sparsity"] / num_frames == pytest.approx(0.1), "the warm-up begins when the encoder thaws"


def test_validation_counts_errors_even_without_a_ctc_term(folder: Path, teacher: str, encoder: str) -> None:
    _, model, criterion = ctc_models.build(folder, {"w2v_path": encoder}, {"alpha": 0.0}, teacher_path=teacher)
    model.eval()
    with torch.no_grad(), metrics.aggregate("test") as found:
        loss, num_frames, log = criterion(model, ctc_models.batch(LENGTHS, LABELS))
        assert log["c_total"] == 5 and "c_errors" in log
        CtcDistill.reduce_metrics([log, log])
    values = found.get_smoothed_values()
    assert {"wer", "uer", "loss_ctc", "loss_logits"} <= set(values)
    assert values["loss"] == pytest.approx((loss / num_frames).item(), abs=1e-3), "in nats, as all losses here"


@pytest.mark.parametrize("num_symbols", [3, 5])
def test_dictionaries_are_matched_by_symbol(num_symbols: int, folder: Path, encoder: str, tmp_path: Path) -> None:
    """The teacher with another order of symbols, and one that knows more, teach the same as one in the student's order."""
    symbols = ("A", "B", "|", "'", "Z")[:num_symbols]
    order = [4 + symbols.index(s) for s in reversed(symbols)]
    plain = ctc_models.write_ctc(tmp_path / "plain.pt", symbols=symbols)
    from s3distill import compat

    state = torch.load(plain, weights_only=False)
    rows = [0, 1, 2, 3, *order]
    for name in ("weight", "bias"):
        key = f"w2v_encoder.proj.{name}"
        state["model"][key] = state["model"][key][rows]
    state["task_state"]["target_dictionary"] = ctc_models.dictionary_of(symbols[::-1])
    torch.save(state, tmp_path / "reversed.pt")
    assert compat.load_checkpoint(tmp_path / "reversed.pt")
    mode = {} if num_symbols == 3 else {"symbol_map": "by_symbol"}
    losses = [
        run(folder, str(tmp_path / f"{name}.pt"), {"w2v_path": encoder}, {"alpha": 0.0}, **mode)[0][0].item()
        for name in ("plain", "reversed")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 1
    if num_symbols > 3:
        with pytest.raises(ValueError, match="the student lacks \"'\", 'Z'"):
            run(folder, str(plain), {"w2v_path": encoder}, {"alpha": 0.0})


def test_a_teacher_without_a_dictionary_needs_one(folder: Path, encoder: str, tmp_path: Path) -> None:
    bare = str(ctc_models.write_ctc(tmp_path / "bare.pt", symbols=None))
    with pytest.raises(
        ValueError, match=r"carries no dictionary.*pass the one that it was trained with as task\.teacher_dictionary"
    ):
        run(folder, bare, {"w2v_path": encoder}, {"alpha": 0.0})
    given = str(folder / "dict.ltr.txt")
    found = run(folder, bare, {"w2v_path": encoder}, {"alpha": 0.0}, teacher_dictionary=given)[0][0]
    assert found.item() > 1
    short = ctc_models.write_dictionary(tmp_path / "short", ("A", "B")) / "dict.ltr.txt"
    with pytest.raises(ValueError, match="must name its head's 7 outputs, but has 6 symbols"):
        run(folder, bare, {"w2v_path": encoder}, {"alpha": 0.0}, teacher_dictionary=str(short))


@pytest.mark.parametrize(
    ("model", "criterion", "message"),
    [
        ({}, {"alpha": 1.5}, r"`criterion\.alpha` is the share of the CTC loss and must be in \[0, 1\], but is 1\.5"),
        (
            {},
            {"alpha": 1.0, "temperature": 2.0},
            r"`criterion\.temperature` is 2\.0, but criterion\.alpha=1 leaves the teacher's",
        ),
        (
            {},
            {"blank_threshold": 0.5},
            r"`criterion\.blank_threshold` is 0\.5, but criterion\.blank_frames=all counts every frame",
        ),
        (
            {},
            {"l2_weight": 1.0},
            r"`criterion\.l2_weight` is 1\.0, but criterion\.hidden_weight=0 leaves .*; leave it at 0\.0",
        ),
        ({}, {"temperature": 0.0}, "`temperature` divides logits and must be above 0"),
        ({}, {"hidden_weight": -1.0}, r"`criterion\.hidden_weight` must be at least 0, but is -1"),
        ({}, {"hidden_weight": 1.0}, r"`criterion\.hidden_weight` needs prediction heads"),
        (HEADS, {}, r"`model\.distill_layers` must be empty where criterion\.hidden_weight is 0"),
        ({"distill_layers": "9"}, {"hidden_weight": 1.0}, "layers to match must be within 0 to 2"),
        ({}, {"target_sparsity": 0.5}, r"`criterion\.target_sparsity` needs gates"),
        (
            {"prune_units": ["conv"]},
            {"target_sparsity": 0.1},
            r"`model\.feature_grad_mult` must be above 0 where conv channels",
        ),
        (
            {"shares_extractor": True},
            {},
            r"`model\.shares_extractor` runs the convolutions once .* the student's differ from",
        ),
        (
            {**HEADS, "extra_teacher_dims": [24]},
            {"hidden_weight": 1.0},
            r"`model\.extra_teacher_dims` must have one width",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    model: dict, criterion: dict, message: str, folder: Path, teacher: str, encoder: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ctc_models.build(folder, {"w2v_path": encoder, **model}, criterion, teacher_path=teacher)


def test_a_teacher_is_needed_for_what_it_teaches(folder: Path, encoder: str) -> None:
    with pytest.raises(
        ValueError, match=r"`task\.teacher_path` must name the teacher, but is empty \(criterion\.alpha=0\.5"
    ):
        ctc_models.build(folder, {"w2v_path": encoder}, {})
    with pytest.raises(
        ValueError, match=r"needs a teacher with a CTC head.*criterion\.alpha=1 for its hidden states alone"
    ):
        ctc_models.build(folder, {"w2v_path": encoder}, {}, teacher_path=encoder)
    pretrained = {"alpha": 1.0, "hidden_weight": 1.0}
    (loss, _, log), _ = run(folder, encoder, {"w2v_path": encoder, **HEADS}, pretrained)
    assert "loss_hidden" in log and "loss_logits" not in log and loss.isfinite()


def test_frames_of_another_rate_are_refused(folder: Path, encoder: str, tmp_path: Path) -> None:
    convs = "[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)]"
    fast = str(ctc_models.write_ctc(tmp_path / "fast.pt", conv_feature_layers=convs))
    with pytest.raises(
        ValueError, match="logits are matched frame by frame, but the student has one frame per 320 samples"
    ):
        ctc_models.build(folder, {"w2v_path": encoder}, {}, teacher_path=fast)


def test_another_model_is_refused(folder: Path, teacher: str) -> None:
    criterion = ctc_models.build(folder, {"student_path": teacher}, {}, teacher_path=teacher)[2]
    with pytest.raises(ValueError, match="`ctc_distill` trains wav2vec_ctc_student, but the model is Linear"):
        criterion.check_model(torch.nn.Linear(1, 1), [])
