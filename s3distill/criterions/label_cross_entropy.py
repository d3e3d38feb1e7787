"""`label_cross_entropy`: one class per utterance."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import metrics
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass

from s3distill.losses import label_loss


@dataclass
class LabelCrossEntropyConfig(FairseqDataclass):
    """`label_cross_entropy` has no options."""


@register_criterion("label_cross_entropy", dataclass=LabelCrossEntropyConfig)
class LabelCrossEntropy(FairseqCriterion):
    """Cross-entropy over utterances; logs ``loss`` (nats per utterance) and ``accuracy`` (per cent of the utterances)."""

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> Any:
        """Returns (loss summed over utterances, their number, sums to log), as fairseq's trainer expects."""
        logits = model.get_logits(model(**sample["net_input"]))
        loss, num_correct = label_loss(logits, sample["target"])
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss.item()} at update {model.num_updates} (utterances {sample['id'].tolist()[:8]}): lower "
                "optimization.lr, train in float32 or bf16 instead of fp16, or check these utterances with `s3distill check`; the last "
                "checkpoint is untouched"
            )
        size = len(sample["target"])
        log = {"loss": loss.detach(), "num_correct": num_correct}
        return loss, size, log | {"ntokens": size, "nsentences": size, "sample_size": size}

    @classmethod
    def reduce_metrics(cls, logging_outputs: Any) -> None:
        """Sums over batches and ranks, so that a small last batch counts for what it is."""
        total = sum(log["sample_size"] for log in logging_outputs)
        for name, key, factor, digits in (("loss", "loss", 1, 5), ("accuracy", "num_correct", 100, 2)):
            value = sum(log[key] for log in logging_outputs) * factor / max(total, 1)
            metrics.log_scalar(name, value, total, round=digits)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
