"""`label_cross_entropy`: what it returns, how batches and ranks average, and that a broken loss stops the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fairseq")

from fairseq import metrics

from s3distill.criterions.label_cross_entropy import LabelCrossEntropy
from s3distill.losses import label_loss


class Task:
    target_dictionary = None


class Model(nn.Module):
    """Its input is its output."""

    num_updates = 7

    def forward(self, source: Tensor, padding_mask: Tensor | None = None) -> dict[str, Any]:
        return {"encoder_out": source}

    def get_logits(self, net_output: dict[str, Any]) -> Tensor:
        return net_output["encoder_out"]


def batch(logits: Tensor, targets: list[int]) -> dict[str, Any]:
    inputs = {"source": logits, "padding_mask": None}
    return {"id": torch.arange(len(targets)) + 40, "net_input": inputs, "target": torch.tensor(targets)}


def draw(batch_size: int, seed: int = 0) -> Tensor:
    return torch.randn(batch_size, 3, generator=torch.Generator().manual_seed(seed))


def reduced(logs: list[dict[str, Any]]) -> dict[str, float]:
    with metrics.aggregate(new_root=True) as meters:
        LabelCrossEntropy.reduce_metrics(logs)
    return meters.get_smoothed_values()


def test_loss_size_and_log() -> None:
    logits = draw(4)
    best = logits.argmax(-1).tolist()
    targets = [*best[:3], (best[3] + 1) % 3]
    loss, size, log = LabelCrossEntropy(Task())(Model(), batch(logits, targets))
    torch.testing.assert_close(loss, label_loss(logits, torch.tensor(targets)).total)
    assert size == log["sample_size"] == log["nsentences"] == 4
    assert log["num_correct"] == 3 and log["loss"] == loss and not log["loss"].requires_grad
    assert reduced([log])["accuracy"] == 75.0


def test_batches_of_different_sizes_average_over_utterances() -> None:
    criterion, logits = LabelCrossEntropy(Task()), draw(7, 1)
    targets = torch.randint(3, (7,), generator=torch.Generator().manual_seed(2)).tolist()
    parts = [(0, 3), (3, 6), (6, 7)]
    logs = [criterion(Model(), batch(logits[a:b], targets[a:b]))[2] for a, b in parts]
    _, _, whole = criterion(Model(), batch(logits, targets))
    expected = reduced([whole])
    assert expected["loss"] == pytest.approx(whole["loss"].item() / 7, abs=1e-4)
    assert expected["accuracy"] == pytest.approx(100 * whole["num_correct"] / 7, abs=0.01)
    assert reduced(logs) == pytest.approx(expected, abs=1e-4)
    # ranks: sums are summed first; then batch after batch, as in validation
    assert LabelCrossEntropy.logging_outputs_can_be_summed()
    summed = {name: sum(log[name] for log in logs) for name in logs[0]}
    assert reduced([summed]) == pytest.approx(expected, abs=1e-4)
    with metrics.aggregate(new_root=True) as meters:
        for log in logs:
            LabelCrossEntropy.reduce_metrics([log])
    assert meters.get_smoothed_values() == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(value: float) -> None:
    logits = draw(2)
    logits[1] = value
    with pytest.raises(
        RuntimeError, match=r"the loss became nan at update 7 \(utterances \[40, 41\]\): lower optimization"
    ):
        LabelCrossEntropy(Task())(Model(), batch(logits, [0, 1]))
