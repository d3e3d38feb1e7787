"""All terms together: each is the one of its own module, weighted as the docstring says."""

from __future__ import annotations

import pytest
import torch

from s3distill.losses import (
    DistillationTerms,
    FrameWeights,
    LossWeights,
    TeacherStates,
    TemporalWeights,
    distillation_loss,
    hidden_state_loss,
    masked_hidden_state_loss,
    normalize_target,
    temporal_relation_loss,
)

PAIRS, TEMPORAL_PAIRS = ((0, 0), (2, 4)), ((1, 2), (2, 4))
WEIGHTS = LossWeights(0.7, 1.3, 2.0)
LENGTHS = [7, 4]


@pytest.fixture
def case() -> dict[str, torch.Tensor | dict[int, torch.Tensor] | list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def states(channels: int, layers: int) -> dict[int, torch.Tensor]:
        return {i: torch.randn(2, 7, channels, generator=generator, dtype=torch.float64) for i in range(layers)}

    padding_mask = torch.arange(7) >= torch.tensor(LENGTHS)[:, None]
    masked = torch.tensor(
        [[True, False, True, True, False, False, True], [False, True, True, False, False, False, False]]
    )
    student = {i: x.requires_grad_() for i, x in states(3, 3).items()}
    head = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    predictions = [student[s] @ head for s, _ in PAIRS]
    return {
        **{"clean": states(5, 5), "other": states(5, 5), "student": student, "predictions": predictions},
        **{"padding_mask": padding_mask, "masked": masked},
    }


def run(terms: DistillationTerms, case: dict, two_targets: bool = False, layer_weights: list[float] | None = None):
    teacher = TeacherStates(case["clean"], case["other"] if two_targets else None)
    return distillation_loss(
        *(terms, PAIRS, case["predictions"] if terms.hidden_states is not None else [], teacher, case["padding_mask"]),
        *(case["masked"], case["student"], TEMPORAL_PAIRS, layer_weights),
    )


def test_the_default_is_the_sum_over_layers(case: dict) -> None:
    got = run(DistillationTerms(WEIGHTS), case, layer_weights=[0.25, 3.0])
    layers = [
        hidden_state_loss(p, case["clean"][t], case["padding_mask"], WEIGHTS)
        for p, (_, t) in zip(case["predictions"], PAIRS, strict=True)
    ]
    assert got.total.item() == pytest.approx(0.25 * layers[0].total.item() + 3 * layers[1].total.item(), rel=1e-12)
    assert set(got.parts) == {"loss_layer0", "loss_layer4", "l1", "l2", "cosine"} and got.num_frames == 11
    assert torch.equal(got.parts["loss_layer4"], layers[1].total)
    torch.testing.assert_close(got.parts["l1"], layers[0].l1 + layers[1].l1)
    assert got.total.requires_grad and not any(part.requires_grad for part in got.parts.values())


@pytest.mark.parametrize("kind", ["instance", "layer"])
def test_normalised_targets(case: dict, kind: str) -> None:
    got = run(DistillationTerms(WEIGHTS, target_norm=kind), case)
    expected = sum(
        hidden_state_loss(
            p, normalize_target(case["clean"][t], case["padding_mask"], kind), case["padding_mask"], WEIGHTS
        ).total
        for p, (_, t) in zip(case["predictions"], PAIRS, strict=True)
    )
    assert got.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert got.total.item() != pytest.approx(run(DistillationTerms(WEIGHTS), case).total.item(), rel=1e-3)


@pytest.mark.parametrize("two_targets", [False, True])
def test_masked_frames(case: dict, two_targets: bool) -> None:
    frames = FrameWeights(0.7, 0.4)
    got = run(DistillationTerms(WEIGHTS, frames, target_norm="layer"), case, two_targets, [0.5, 2.0])
    clean, other = (
        {t: normalize_target(h, case["padding_mask"], "layer") for t, h in case[side].items()}
        for side in ("clean", "other")
    )
    layers = [
        masked_hidden_state_loss(
            *(p, clean[t], case["masked"], case["padding_mask"], WEIGHTS, frames, other[t] if two_targets else None)
        )
        for p, (_, t) in zip(case["predictions"], PAIRS, strict=True)
    ]
    assert got.total.item() == pytest.approx(0.5 * layers[0].total.item() + 2 * layers[1].total.item(), rel=1e-12)
    parts = got.parts["loss_masked"] + got.parts["loss_unmasked"]
    assert parts.item() == pytest.approx(got.total.item(), rel=1e-12)


def test_temporal_relations_weigh_the_same_whichever_frames_count(case: dict) -> None:
    """Divided by the frames that count, as the trainer does, their share of the loss is their mean over valid frames."""
    temporal = TemporalWeights(0.5, 0.25, 2.0)
    relation = temporal_relation_loss(case["student"], case["clean"], TEMPORAL_PAIRS, case["padding_mask"], temporal)
    for frames in (None, FrameWeights(1.0, 0.0), FrameWeights(1.0, 1.0)):
        without, with_it = (run(DistillationTerms(WEIGHTS, frames, t), case) for t in (TemporalWeights(), temporal))
        assert without.num_frames == with_it.num_frames == (11 if frames is None or frames.unmasked else 6)
        share = (with_it.total - without.total).item() / with_it.num_frames
        assert share == pytest.approx(relation.total.item() / 11, rel=1e-9)
        for name in ("layer", "intra", "inter"):
            part = with_it.parts[f"temporal_{name}"].item() / with_it.num_frames
            assert part == pytest.approx(getattr(relation, name).item() / 11, rel=1e-9)


def test_temporal_relations_alone(case: dict) -> None:
    temporal = TemporalWeights(layer=1.0)
    got = run(DistillationTerms(None, None, temporal), case)
    relation = temporal_relation_loss(case["student"], case["clean"], TEMPORAL_PAIRS, case["padding_mask"], temporal)
    assert got.total.item() == pytest.approx(relation.total.item(), rel=1e-12)
    assert set(got.parts) == {"temporal_layer"} and got.num_frames == 11
    masked = run(DistillationTerms(None, FrameWeights(), temporal), case)
    assert masked.num_frames == 11 and torch.equal(masked.total, got.total)


def test_every_option_changes_the_gradient(case: dict) -> None:
    """What has a weight acts."""
    gradients = []
    for terms, two_targets in (
        (DistillationTerms(WEIGHTS), False),
        (DistillationTerms(WEIGHTS, target_norm="instance"), False),
        (DistillationTerms(WEIGHTS, target_norm="layer"), False),
        (DistillationTerms(WEIGHTS, FrameWeights(1.0, 0.0)), False),
        (DistillationTerms(WEIGHTS, FrameWeights(1.0, 0.5)), False),
        (DistillationTerms(WEIGHTS, FrameWeights(1.0, 0.5)), True),
        (DistillationTerms(WEIGHTS, None, TemporalWeights(layer=0.1)), False),
        (DistillationTerms(WEIGHTS, None, TemporalWeights(intra=0.1)), False),
        (DistillationTerms(WEIGHTS, None, TemporalWeights(inter=0.1)), False),
        (DistillationTerms(WEIGHTS, None, TemporalWeights(inter=0.1, norm="cosine")), False),
    ):
        (gradient,) = torch.autograd.grad(run(terms, case, two_targets).total, case["student"][2], retain_graph=True)
        gradients.append(gradient)
    for i, a in enumerate(gradients):
        assert all((a - b).abs().max() > 1e-6 for b in gradients[:i]), i


def test_a_distillation_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="a distillation needs a loss"):
        DistillationTerms(None)
