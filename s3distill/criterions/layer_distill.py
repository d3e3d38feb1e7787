"""`layer_distill`: match the teacher's hidden states, and keep the student's expected size on its target."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq import metrics
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from s3distill.encoder.teacher import Teacher
from s3distill.gates.lagrangian import target_at
from s3distill.losses import COSINES, LossWeights, hidden_state_loss

logger = logging.getLogger(__name__)


@dataclass
class LayerDistillConfig(FairseqDataclass):
    """Options of `layer_distill`; defaults are DPHuBERT's."""

    l1_weight: float = field(default=1.0, metadata={"help": "weight of mean |prediction - target|"})
    l2_weight: float = field(default=0.0, metadata={"help": "weight of mean (prediction - target)^2"})
    cosine_weight: float = field(default=1.0, metadata={"help": "weight of the cosine term"})
    cosine_type: ChoiceEnum(list(COSINES)) = field(  # type: ignore[valid-type]
        default="raw", metadata={"help": "raw: -cos; log_sig: -log sigmoid(cos)"}
    )
    layer_weights: str = field(
        default="", metadata={"help": "one weight per matched layer, e.g. '0.1,0.1,1'; empty: 1 each, summed"}
    )
    target_sparsity: float = field(
        default=0.0,
        metadata={"help": "share of the reference cost (model.prune_measure) to remove; needs model.prune_units"},
    )
    sparsity_warmup: int = field(
        default=5000,
        metadata={"help": "updates in which the target rises linearly from 0 (a smaller student: from its own)"},
    )


@register_criterion("layer_distill", dataclass=LayerDistillConfig)
class LayerDistill(FairseqCriterion):
    """sum_l w_l * loss(W_l h_student, h_teacher) over valid frames, plus the Lagrangian penalty of DPHuBERT (eq. 5-7)."""

    def __init__(self, cfg: LayerDistillConfig, task: Any) -> None:
        super().__init__(task)
        self.cfg = cfg
        self.weights = LossWeights(cfg.l1_weight, cfg.l2_weight, cfg.cosine_weight, str(cfg.cosine_type))
        self.layer_weights = _parse_layer_weights(cfg.layer_weights) if cfg.layer_weights else None
        if not 0 <= cfg.target_sparsity < 1:
            raise ValueError(
                f"`criterion.target_sparsity` must be in [0, 1), but is {cfg.target_sparsity}; 0.75 removes 75%"
            )
        if cfg.sparsity_warmup < 0:
            raise ValueError(
                f"`criterion.sparsity_warmup` counts updates and must be at least 0, but is {cfg.sparsity_warmup}"
            )

    def check_model(self, model: Any, teacher: Teacher) -> None:
        """What can be wrong between model, teacher and criterion; the task calls it before training starts.

        Raises:
            ValueError: with the option to change.
        """
        if model.heads is None:
            raise ValueError("`model.distill_layers` must name the layers to match, e.g. '0,4,8,12', but is empty")
        teacher.check_layers([layer for _, layer in model.heads.pairs])
        if model.heads.config.teacher_dim != teacher.config.embed_dim:
            raise ValueError(
                f"`model.teacher_dim` must be the width of {teacher.name}, {teacher.config.embed_dim}, but is "
                f"{model.heads.config.teacher_dim}; leave it out"
            )
        frames = [[(c.kernel, c.stride) for c in config.conv_layers] for config in (model.config, teacher.config)]
        if frames[0] != frames[1]:
            raise ValueError(
                f"student and teacher must cut audio into the same frames, but the student has one per {model.config.frame_stride} samples "
                f"and {teacher.name} one per {teacher.config.frame_stride}, (kernel, stride) {frames[0]} and {frames[1]}; take a student "
                "with the teacher's convolutions"
            )
        if max(model.masking.mask_prob, model.masking.mask_channel_prob) > 0:
            raise ValueError(
                "`model.mask_prob` and `model.mask_channel_prob` act in fine-tuning only: teacher and student of a distillation hear the "
                "same audio; leave them at 0"
            )
        if model.gates is not None and "conv" in model.gates.units and model.training_config.feature_grad_mult <= 0:
            raise ValueError(
                "`model.feature_grad_mult` must be above 0 where conv channels have gates, which would learn from the size alone; raise it "
                "or take 'conv' out of model.prune_units"
            )
        num_pairs = len(model.heads.pairs)
        if self.layer_weights is not None and len(self.layer_weights) != num_pairs:
            raise ValueError(
                f"`criterion.layer_weights` must have one weight per matched layer ({num_pairs}), but has {len(self.layer_weights)}"
            )
        if self.cfg.target_sparsity > 0:
            if model.gates is None:
                raise ValueError("`criterion.target_sparsity` needs gates; pass e.g. model.prune_units=[conv,head,ffn]")
            model.check_target_sparsity(self.cfg.target_sparsity)

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> Any:
        """Returns (loss summed over frames, number of valid frames, scalars to log), as fairseq's trainer expects."""
        inputs = sample["net_input"]
        source, padding_mask = inputs["source"], inputs.get("padding_mask")
        target_sparsity = None
        if model.gates is not None:
            start = min(model.initial_sparsity, self.cfg.target_sparsity)
            target_sparsity = target_at(model.num_updates, self.cfg.target_sparsity, self.cfg.sparsity_warmup, start)
        layers = [teacher_layer for _, teacher_layer in model.heads.pairs]
        targets, _ = self.task.teacher.hidden_states(source, padding_mask, layers)
        out = model(source, padding_mask, target_sparsity=target_sparsity)
        loss = source.new_zeros((), dtype=torch.float32)
        log: dict[str, Any] = {}
        num_frames = 0
        for i, (prediction, target) in enumerate(zip(out["predictions"], targets, strict=True)):
            terms = hidden_state_loss(prediction, target, out["padding_mask"], self.weights)
            num_frames = terms.num_frames
            loss = loss + terms.total * (1.0 if self.layer_weights is None else self.layer_weights[i])
            log[f"loss_layer{layers[i]}"] = terms.total.detach()
            for name, value in (("l1", terms.l1), ("l2", terms.l2), ("cosine", terms.cos)):
                log[name] = log.get(name, 0.0) + value
        log["loss_distill"] = loss.detach()
        if out["penalty"] is not None:
            # gradients are divided by the summed sample_size over ranks, so a term that is no sum over frames is multiplied
            loss = loss + out["penalty"] * num_frames
            log |= self._size_log(model, out, target_sparsity, num_frames)
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss.item()} at update {model.num_updates} (utterances {sample['id'].tolist()[:8]}): lower "
                "optimization.lr, train in float32 or bf16 instead of fp16, or check these utterances with `s3distill check`; the last "
                "checkpoint is untouched"
            )
        log |= {"loss": loss.detach(), "ntokens": num_frames, "nsentences": source.shape[0], "sample_size": num_frames}
        return loss, num_frames, log

    def _size_log(self, model: Any, out: Any, target_sparsity: Any, num_frames: int) -> dict[str, Any]:
        """Constraint and gates; weighted by frames, so that sums over batches and ranks average them."""
        values = {
            "penalty": out["penalty"].detach(),
            "expected_sparsity": out["expected_sparsity"].detach(),
            "target_sparsity": float(target_sparsity or 0.0),
            "lambda1": model.lagrangian.lambda1.detach(),
            "lambda2": model.lagrangian.lambda2.detach(),
        }
        values |= {
            f"kept_{unit}_{layer}": float(count)
            for unit, counts in model.gates.kept_counts().as_dict().items()
            if unit in model.gates.units
            for layer, count in enumerate(counts)
        }
        return {f"size_{name}": value * num_frames for name, value in values.items()}

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


def _parse_layer_weights(text: str) -> list[float]:
    weights = []
    for item in text.split(","):
        try:
            weights.append(float(item))
        except ValueError as error:
            raise ValueError(
                f"`criterion.layer_weights` must read like '0.1,0.1,1', but {item.strip()!r} is no number"
            ) from error
    return weights
