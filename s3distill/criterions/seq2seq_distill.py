"""`seq2seq_distill`: texts, and what a teacher with a decoder makes of them, word by word or as whole hypotheses."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq import metrics
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import Tensor

from s3distill.criterions._seq2seq_checks import check_options, check_teacher
from s3distill.losses import hidden_state_loss
from s3distill.losses.sequence import SEQUENCE_WEIGHTS, hypothesis_weights
from s3distill.losses.word_level import TextLoss, nbest_cross_entropy, text_cross_entropy, word_level_divergence

_WORD_LEVEL = "none"
_PARTS = ("ce", "kd", "encoder")


@dataclass
class Seq2SeqDistillConfig(FairseqDataclass):
    """Options of `seq2seq_distill`."""

    alpha: float = field(
        default=0.5, metadata={"help": "weight of the labels; the teacher has 1 - alpha. 1 trains on the labels alone"}
    )
    temperature: float = field(
        default=2.0, metadata={"help": "of word-level distillation: both models' logits are divided by it"}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "share of the labels' probability that is spread over all symbols"}
    )
    seq_kd: ChoiceEnum([_WORD_LEVEL, *SEQUENCE_WEIGHTS]) = field(  # type: ignore[valid-type]
        default=_WORD_LEVEL,
        metadata={
            "help": "none: word-level distillation, symbol by symbol of the label. Else sequence-level, on the teacher's hypotheses "
            "(task.nbest=true): the best one, or all, weighted by their probability (uniform) and their rank too (ranked)"
        },
    )
    seq_beta: float = field(default=2.0, metadata={"help": "of ranked: rank k counts exp(-beta (k - 1)); 0 is uniform"})
    encoder_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of the distance (l1 - cosine) between what the two decoders attend to; needs "
            "wav2vec_seq2seq_student and a decoder of the teacher's width"
        },
    )


@register_criterion("seq2seq_distill", dataclass=Seq2SeqDistillConfig)
class Seq2SeqDistill(FairseqCriterion):
    """Distillation of a model with a decoder.

        word-level      L = alpha CE(y) + (1 - alpha) tau^2 KL(p_T || p_S) at each symbol of the label y
        sequence-level  L = alpha CE(y) + (1 - alpha) |y| sum_k w_k CE(y_k) / |y_k|, y_k the teacher's hypotheses
        and             + encoder_weight |y| D(encoder of the student, encoder of the teacher), D = mean over the frames

    Sums over utterances, divided by the symbols of all labels, eos included: padding and the size of batches do not count. In
    sequence-level distillation an utterance so has the weight of its label's length in both terms. Validation takes the same,
    on splits without hypotheses the labels alone. The teacher hears the audio without SpecAugment's masks.
    """

    def __init__(self, cfg: Seq2SeqDistillConfig, task: Any) -> None:
        super().__init__(task)
        check_options(cfg)
        self.cfg, self.task = cfg, task
        self.seq_kd = str(getattr(cfg.seq_kd, "value", cfg.seq_kd))
        self.word_level = self.seq_kd == _WORD_LEVEL

    def check(self, model: Any, task: Any) -> None:
        """Student, teacher and task fit, told before training starts; the teacher is read here where it is needed."""
        check_teacher(self.cfg, self.word_level, model, task)

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Any:
        """Returns (loss, symbols of the labels, sums to log), as fairseq's trainer expects."""
        labels, parts = self._terms(model, sample)
        size = int(labels.num_symbols.sum())
        loss = sum(weight * parts[name] for name, weight in self._weights(parts).items())
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss.item()} (utterances {sample['id'].tolist()[:8]}): lower optimization.lr, train in float32 or "
                "bf16 instead of fp16, or check these utterances with `s3distill check`; the last checkpoint is untouched"
            )
        log: Dict[str, Any] = {name: part.detach() for name, part in parts.items()}
        log |= {"loss": loss.detach(), "num_correct": labels.num_correct, "ntokens": size, "sample_size": size}
        return loss, size, log | {"nsentences": len(sample["target"])}

    def _weights(self, parts: Dict[str, Tensor]) -> Dict[str, float]:
        alpha = self.cfg.alpha if "kd" in parts else 1.0
        weights = {"ce": alpha, "kd": 1 - alpha, "encoder": self.cfg.encoder_weight}
        return {name: weights[name] for name in parts}

    def _terms(self, model: Any, sample: Dict[str, Any]) -> Tuple[TextLoss, Dict[str, Tensor]]:
        """The labels' loss, and the terms of L without their weights, each a sum over the batch."""
        nbest = self._counted(sample)
        logits, states, of_hypotheses = self._run(model, sample["net_input"], nbest)
        labels = text_cross_entropy(logits, sample["target"], self.padding_idx, self.cfg.label_smoothing)
        parts = {"ce": labels.per_text.sum()}
        if nbest is not None:
            per_symbol = self._sequence_level(of_hypotheses, nbest, len(labels.per_text))
            parts["kd"] = (labels.num_symbols * per_symbol).sum()
        if not self._needs_teacher:
            return labels, parts
        teacher_logits, teacher_states = self.task.teacher(sample["net_input"])
        if self.cfg.alpha < 1 and self.word_level:
            texts = sample["target"], self.padding_idx
            parts["kd"] = word_level_divergence(logits, teacher_logits, *texts, self.cfg.temperature)
        if self.cfg.encoder_weight > 0:
            parts["encoder"] = labels.num_symbols.sum() * _encoder_distance(states, teacher_states)
        return labels, parts

    @property
    def _needs_teacher(self) -> bool:
        return self.cfg.encoder_weight > 0 or (self.word_level and self.cfg.alpha < 1)

    def _counted(self, sample: Dict[str, Any]) -> Optional[Dict[str, Tensor]]:
        """The hypotheses of a batch that have a weight, which is beside them as ``weights`` [N]; None: they do not count."""
        if "nbest" not in sample or self.cfg.alpha == 1 or self.word_level:
            return None
        nbest = sample["nbest"]
        weights = hypothesis_weights(nbest["scores"], self.seq_kd, self.cfg.seq_beta)
        weights = weights[nbest["utterances"], nbest["ranks"]]
        counted = {name: nbest[name][weights > 0] for name in ("prev_output_tokens", "target", "utterances")}
        return {**counted, "weights": weights[weights > 0]}

    def _run(self, model: Any, net_input: Dict[str, Any], nbest: Optional[Dict[str, Tensor]]) -> Any:
        """Logits of the labels [B, U, V], the encoder's output, and logits of the hypotheses [N, U', V] or None; one forward."""
        if nbest is None:
            logits, extra = model(**net_input)
            return logits, extra.get("encoder_out"), None
        labels, hypotheses = net_input["prev_output_tokens"], nbest["prev_output_tokens"]
        length = max(labels.shape[1], hypotheses.shape[1])
        texts = [F.pad(t, (0, length - t.shape[1]), value=self.padding_idx) for t in (labels, hypotheses)]
        rows = torch.arange(len(labels), device=labels.device)
        logits, extra = model(
            source=net_input["source"],
            padding_mask=net_input.get("padding_mask"),
            prev_output_tokens=torch.cat(texts),
            utterances=torch.cat([rows, nbest["utterances"]]),
        )
        of_labels, of_hypotheses = logits.split([len(labels), len(hypotheses)])
        return of_labels[:, : labels.shape[1]], extra["encoder_out"], of_hypotheses[:, : hypotheses.shape[1]]

    def _sequence_level(self, logits: Tensor, nbest: Dict[str, Tensor], size: int) -> Tensor:
        """Nats per symbol of the hypotheses of each of ``size`` utterances, [B]."""
        texts = text_cross_entropy(logits, nbest["target"], self.padding_idx, self.cfg.label_smoothing)
        return nbest_cross_entropy(texts.per_text, texts.num_symbols, nbest["weights"], nbest["utterances"], size)

    @classmethod
    def reduce_metrics(cls, logging_outputs: Any) -> None:
        """Nats per symbol of the labels, and the share of their symbols that would be written, per cent."""
        total = sum(log["sample_size"] for log in logging_outputs)
        scalars = [
            ("loss", "loss", 1, 4),
            *((name, name, 1, 4) for name in _PARTS),
            ("accuracy", "num_correct", 100, 2),
        ]
        for name, key, factor, digits in scalars:
            if any(key in log for log in logging_outputs):
                value = sum(float(log.get(key, 0)) for log in logging_outputs) * factor / max(total, 1)
                metrics.log_scalar(name, value, total, round=digits)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def _encoder_distance(student: Dict[str, Any], teacher: Dict[str, Any]) -> Tensor:
    """Mean over the valid frames of the distance between encoders' outputs, [T, B, C] each."""
    states = (s["encoder_out"].transpose(0, 1) for s in (student, teacher))
    distance = hidden_state_loss(*states, student["padding_mask"])
    return distance.total / max(distance.num_frames, 1)
