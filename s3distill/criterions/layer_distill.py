"""`layer_distill`: match the teachers' hidden states, and keep the student's expected size on its target."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import logging
import math
from dataclasses import dataclass, field
from typing import Any, List, Optional, Sequence, Tuple

import torch
from fairseq import metrics
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum
from torch import Tensor

from s3distill import kernels
from s3distill.criterions._distill_checks import (
    check_frames,
    check_gates,
    check_heads,
    check_masks,
    check_shared_extractor,
    check_temporal_layers,
    check_without_heads,
    target_of,
)
from s3distill.criterions._distill_options import HiddenStateOptions, SizeOptions, TemporalOptions
from s3distill.criterions._distill_terms import build_terms, parse_layer_weights, require_finite
from s3distill.criterions._size import check_size_options, size_log, target_at_update
from s3distill.encoder.teacher import Teacher
from s3distill.heads import parse_pairs_per_teacher
from s3distill.losses import TeacherStates, distillation_loss

logger = logging.getLogger(__name__)

Pairs = Sequence[Tuple[int, int]]  # (student layer, teacher layer)


@dataclass
class LayerDistillConfig(HiddenStateOptions, TemporalOptions, SizeOptions):
    """Options of `layer_distill`: the shared ones, and masked distillation."""

    mask_student: bool = field(
        default=False,
        metadata={"help": "the student hears audio with masked spans (model.mask_prob), the teachers all of it"},
    )
    masked_weight: float = field(default=1.0, metadata={"help": "of mask_student: weight of masked frames"})
    unmasked_weight: float = field(
        default=0.0, metadata={"help": "of mask_student: weight of the other frames; 0: LightHuBERT, 1: ARMHuBERT"}
    )
    unmasked_target: ChoiceEnum(["clean", "masked"]) = field(  # type: ignore[valid-type]
        default="clean",
        metadata={
            "help": "what the teachers hear for the targets of unmasked frames; masked: the student's audio (ARMHuBERT)"
        },
    )


@register_criterion("layer_distill", dataclass=LayerDistillConfig)
class LayerDistill(FairseqCriterion):
    """sum_k v_k sum_l w_l * loss(W_kl h_student, h_teacher_k) over frames, plus the Lagrangian penalty of DPHuBERT (eq. 5-7).

    Each teacher k has its heads W_k and its weight v_k (`task.teacher_weights`); see `distillation_loss` for all terms.
    """

    def __init__(self, cfg: LayerDistillConfig, task: Any) -> None:
        super().__init__(task)
        self.cfg = cfg
        self.terms = build_terms(cfg)
        self.layer_weights = parse_layer_weights(cfg.layer_weights) if cfg.layer_weights else None
        check_size_options(cfg)

    def check_model(self, model: Any, teachers: Sequence[Teacher]) -> None:
        """What can be wrong between model, teachers and criterion; the task calls it before training starts.

        Raises:
            ValueError: with the option to change.
        """
        cfg = self.cfg
        check_heads(model, teachers, self.terms.hidden_states is not None, self.layer_weights)
        if self.terms.hidden_states is None:
            check_without_heads(cfg)
        check_masks(model, cfg.mask_student, str(cfg.unmasked_target), cfg.unmasked_weight)
        for teacher, pairs in zip(teachers, self._temporal_pairs(model), strict=True):
            check_frames(model, teacher, self.terms.temporal.active)
            check_temporal_layers(model, teacher, pairs)
            self.terms.temporal.relations(pairs)
        check_shared_extractor(model, teachers)
        check_gates(model, target_of(model, cfg.target_sparsity, cfg.target_rtf))

    def _temporal_pairs(self, model: Any) -> List[Pairs]:
        """Per teacher the layers whose temporal relations are matched."""
        if not self.terms.temporal.active:
            return [()] * self.task.num_teachers
        if self.cfg.temporal_layers:
            return list(parse_pairs_per_teacher(self.cfg.temporal_layers, self.task.num_teachers))
        if model.heads is None:
            raise ValueError(
                "`criterion.temporal_layers` must name layers, e.g. '1,2,3', where model.distill_layers is empty"
            )
        return [heads.pairs for heads in model.heads.by_teacher]

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> Any:
        """Returns (loss summed over frames, number of frames that count, scalars to log), as fairseq's trainer expects."""
        source, padding_mask = sample["net_input"]["source"], sample["net_input"].get("padding_mask")
        target_sparsity = target_at_update(model, self.cfg)
        masked = self._draw_masks(model, sample) if self.cfg.mask_student else None
        conv_features = None
        if model.cfg.shares_extractor:  # in the teacher's precision, whatever the student's is
            with kernels.without_autocast(source.device):
                conv_features = model.extract(source, padding_mask)
        temporal_pairs = self._temporal_pairs(model)
        head_pairs = (
            [h.pairs for h in model.heads.by_teacher] if model.heads is not None else [()] * len(temporal_pairs)
        )
        states = [
            self._teacher_states(teacher, source, padding_mask, masked, conv_features, *pairs)
            for teacher, *pairs in zip(self.task.teachers, head_pairs, temporal_pairs, strict=True)
        ]
        read = [layer for pairs in temporal_pairs for layer in self.terms.temporal.layers_read(pairs)[0]]
        out = model(
            source,
            padding_mask,
            target_sparsity=target_sparsity,
            masked=masked,
            num_layers=max(read, default=0),
            conv_features=conv_features,
        )
        with kernels.without_autocast(source.device):
            loss, num_frames, log = self._distill(out, states, head_pairs, temporal_pairs)
        log["loss_distill"] = loss.detach()
        if out["penalty"] is not None:
            # gradients are divided by the summed sample_size over ranks, so a term that is no sum over frames is multiplied
            loss = loss + out["penalty"] * num_frames
            log |= size_log(model, out, target_sparsity, num_frames)
        require_finite(loss, model, sample)
        log |= {"loss": loss.detach(), "ntokens": num_frames, "nsentences": source.shape[0], "sample_size": num_frames}
        return loss, num_frames, log

    def _distill(
        self, out: Any, states: List[TeacherStates], head_pairs: List[Pairs], temporal_pairs: List[Pairs]
    ) -> Tuple[Tensor, int, dict[str, Any]]:
        """The teachers' losses, weighted and summed; of the second teacher on, names in the log carry its number."""
        student_states = dict(enumerate(out["hidden_states"]))
        predictions = [out["predictions"], *out["other_predictions"]] if out["predictions"] else [()] * len(states)
        loss, num_frames, log = out["hidden_states"][0].new_zeros((), dtype=torch.float32), 0, {}
        for k, weight in enumerate(self.task.teacher_weights):
            found = distillation_loss(
                self.terms,
                head_pairs[k],
                predictions[k],
                states[k],
                out["padding_mask"],
                out["masked"],
                student_states,
                temporal_pairs[k],
                self.layer_weights,
            )
            num_frames = found.num_frames
            loss = loss + weight * found.total
            prefix = f"teacher{k + 1}_" if k > 0 else ""
            log |= {f"{prefix}{name}": value for name, value in found.parts.items()}
            if len(states) > 1:
                log[f"loss_teacher{k + 1}"] = found.total.detach()
        return loss, num_frames, log

    def _draw_masks(self, model: Any, sample: Any) -> Tensor:
        """Masks that seed, update and utterance decide, so that a resumed run repeats them; in validation always the same."""
        inputs = sample["net_input"]
        update = model.num_updates if model.training else 0
        seeds = [(model.cfg.seed, update, utterance) for utterance in sample["id"].tolist()]
        return model.draw_masks(inputs["source"], inputs.get("padding_mask"), seeds)

    def _teacher_states(
        self,
        teacher: Teacher,
        source: Tensor,
        padding_mask: Optional[Tensor],
        masked: Optional[Tensor],
        conv_features: Optional[Tensor],
        head_pairs: Pairs,
        temporal_pairs: Pairs,
    ) -> TeacherStates:
        """The layers that a loss asks for, of the clean audio and, where they are targets, of the student's."""
        predicted = sorted({layer for _, layer in head_pairs})
        layers = sorted({*predicted, *self.terms.temporal.layers_read(temporal_pairs)[1]})
        clean, _ = teacher.hidden_states(source, padding_mask, layers, None, conv_features)
        other = None
        if str(self.cfg.unmasked_target) == "masked":
            states, _ = teacher.hidden_states(source, padding_mask, predicted, masked, conv_features)
            other = dict(zip(predicted, states, strict=True))
        return TeacherStates(dict(zip(layers, clean, strict=True)), other)

    @classmethod
    def reduce_metrics(cls, logging_outputs: Any) -> None:
        frames = sum(log["sample_size"] for log in logging_outputs)
        names = {name for log in logging_outputs for name in log} - {"ntokens", "nsentences", "sample_size"}
        for name in sorted(names):
            value = sum(log.get(name, 0.0) for log in logging_outputs) / max(frames, 1)
            metrics.log_scalar(name.removeprefix("size_"), value, frames, round=5 if math.isfinite(value) else None)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
