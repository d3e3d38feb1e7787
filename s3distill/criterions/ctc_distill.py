"""`ctc_distill`: CTC, the logits and the hidden states of a fine-tuned teacher, and the size constraint, in one loss."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import logging
import math
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Sequence, Tuple

from fairseq import metrics, utils
from fairseq.criterions import register_criterion
from fairseq.criterions.ctc import CtcCriterion, CtcCriterionConfig
from fairseq.dataclass import ChoiceEnum
from torch import Tensor

from s3distill import compat, kernels
from s3distill.criterions._ctc_checks import check_ctc_distillation, check_ctc_options, check_student
from s3distill.criterions._distill_options import HiddenStateOptions, SizeOptions
from s3distill.criterions._distill_terms import parse_layer_weights, require_finite
from s3distill.criterions._forgetting import Forgetting, ForgettingOptions
from s3distill.criterions._sequence_terms import (
    SEQUENCE_SUMS,
    SequenceOptions,
    check_sequence_options,
    label_term,
    log_sequence_term,
)
from s3distill.criterions._size import check_size_options, size_log, target_at_update
from s3distill.encoder.ctc_teacher import CtcTeacher, TeacherOutput
from s3distill.encoder.symbols import SymbolMap
from s3distill.losses import (
    BLANK_FRAMES,
    DistillationTerms,
    LogitTerms,
    LossWeights,
    TeacherStates,
    distillation_loss,
    logit_distillation,
)
from s3distill.losses.precision import at_least_float32

logger = logging.getLogger(__name__)

# what fairseq's `ctc` counts in validation
_COUNTERS = ("w_errors", "wv_errors", "w_total", "c_errors", "c_total")
_SUMS = ("ntokens", "nsentences", "sample_size", "ctc_sum", "ctc_tokens", *SEQUENCE_SUMS, *_COUNTERS)


@dataclass
class CtcDistillConfig(SequenceOptions, HiddenStateOptions, SizeOptions, ForgettingOptions, CtcCriterionConfig):
    """Options of `ctc_distill`: fairseq's of `ctc`, of hidden states, size, n-best lists and old tasks, and of the teacher's logits."""

    alpha: float = field(
        default=0.5,
        metadata={
            "help": "weight of the CTC loss per label; the teacher's logits have 1 - alpha; 1: no logits, 0: no labels"
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "that softens the distributions of teacher and student, above 0"}
    )
    blank_frames: ChoiceEnum(list(BLANK_FRAMES)) = field(  # type: ignore[valid-type]
        default="all",
        metadata={"help": "frames whose logits count: all, or those where the teacher is unsure whether it is blank"},
    )
    blank_threshold: float = field(
        default=0.95,
        metadata={"help": "of unsure: the teacher's probability of the blank from which a frame is left out"},
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "weight of the teacher's hidden states (model.distill_layers), per frame"}
    )


@register_criterion("ctc_distill", dataclass=CtcDistillConfig)
class CtcDistill(CtcCriterion):
    """L = alpha CTC + (1 - alpha) tau^2 KL + hidden_weight * hidden + penalty  (Hinton et al., 2015; DPHuBERT, eq. 5-7).

    CTC is the negative log-likelihood per label of the batch, KL and hidden are means over its valid frames (see
    `logit_distillation`, `distillation_loss`). ``sample_size`` is the number of valid frames: across micro-batches and ranks
    KL and hidden are means over all frames, and CTC is a mean over batches, weighted by the frames of their labelled utterances.
    With ``seq_kd`` the teacher's n-best hypotheses take the place of the labels (see `label_term`).
    """

    def __init__(self, cfg: CtcDistillConfig, task: Any) -> None:
        super().__init__(cfg, task)
        self.cfg = cfg
        check_ctc_options(cfg)
        check_size_options(cfg)
        check_sequence_options(cfg, bool(getattr(task.cfg, "nbest", False)))
        self.logit_terms = LogitTerms(cfg.temperature, str(cfg.blank_frames), cfg.blank_threshold)
        weights = LossWeights(cfg.l1_weight, cfg.l2_weight, cfg.cosine_weight, str(cfg.cosine_type))
        self.hidden_terms = DistillationTerms(weights, target_norm=str(cfg.target_norm))
        self.layer_weights = parse_layer_weights(cfg.layer_weights) if cfg.layer_weights else None
        self.symbols: Optional[SymbolMap] = None
        forgetting = Forgetting(cfg, task.target_dictionary.symbols, task.cfg)
        self.forgetting = forgetting if forgetting.active else None

    def check_model(self, model: Any, teachers: Sequence[CtcTeacher]) -> None:
        """What can be wrong between model, teacher and criterion; the task calls it before training starts.

        Raises:
            ValueError: with the option to change.
        """
        check_student(model)
        teacher = teachers[0] if teachers else None
        check_ctc_distillation(model, teacher, self.cfg, self.layer_weights)
        if self.cfg.alpha < 1:
            self._match_symbols()
        if self.forgetting is not None:
            self.forgetting.check_model(model)

    def load_state_dict(self, state_dict: Any, *values: Any, **options: Any) -> Any:
        """fairseq calls it where old heads learn; a run that had none (``finetune_from_model``) leaves them as their files have them."""
        if state_dict is None and compat.starts_from_another_run():
            return None
        if state_dict is None:
            raise ValueError(
                "the checkpoint must have the old heads of criterion.old_model_paths, but was trained without; go on with its own options, "
                "or start a new run from it: model.student_path"
            )
        return super().load_state_dict(state_dict, *values, **options)

    def _match_symbols(self) -> SymbolMap:
        if self.symbols is None:
            self.symbols = self.task.match_symbols()
        return self.symbols

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> Any:  # type: ignore[override]
        """Returns (loss summed over valid frames, their number, scalars to log), as fairseq's trainer expects."""
        source, padding_mask = sample["net_input"]["source"], sample["net_input"].get("padding_mask")
        target_sparsity = target_at_update(model, self.cfg, model.cfg.freeze_finetune_updates)
        conv_features = None
        if model.cfg.shares_extractor:  # in the teacher's precision, whatever the student's is
            with kernels.without_autocast(source.device):
                conv_features = model.extract(source, padding_mask)
        heard = self._teacher_output(model, source, padding_mask, conv_features)
        out = model(source, padding_mask, predict=True, target_sparsity=target_sparsity, conv_features=conv_features)
        with kernels.without_autocast(source.device):
            loss, num_frames, log = self._terms(model, sample, out, heard)
        if out["penalty"] is not None:
            # gradients are divided by the summed sample_size over ranks, so a term that is no sum over frames is multiplied
            loss = loss + out["penalty"] * num_frames
            log |= size_log(model, out, target_sparsity, num_frames)
        require_finite(loss, model, sample, "" if self.zero_infinity else "pass criterion.zero_infinity=true, ")
        log |= {"loss": loss.detach(), "ntokens": num_frames, "nsentences": source.shape[0], "sample_size": num_frames}
        return loss, num_frames, log

    def _teacher_output(
        self, model: Any, source: Tensor, padding_mask: Optional[Tensor], conv_features: Optional[Tensor]
    ) -> Optional[TeacherOutput]:
        """What the terms compare with, or None where nothing is."""
        layers = sorted({layer for _, layer in model.heads.pairs}) if model.heads is not None else []
        if not layers and self.cfg.alpha == 1:
            return None
        teacher: CtcTeacher = self.task.teachers[0]
        return teacher.outputs(source, padding_mask, layers, self.cfg.alpha < 1, None, conv_features)

    def _terms(
        self, model: Any, sample: Any, out: Any, heard: Optional[TeacherOutput]
    ) -> Tuple[Tensor, int, Dict[str, Any]]:
        """The weighted sum over valid frames of all terms but the penalty, the number of frames, and what to log."""
        cfg = self.cfg
        logits = model.get_logits(out)  # [T, B, V]
        num_frames = _num_valid(logits, out["padding_mask"])
        loss, log = at_least_float32(logits.new_zeros(())), dict[str, Any]()
        if cfg.alpha > 0 or not model.training:  # validation counts errors whatever the loss is
            ctc, log = self._ctc(logits, out["padding_mask"], sample, model.training)
            if cfg.alpha > 0:
                labels, parts = label_term(
                    cfg, ctc / max(log["ctc_tokens"], 1), logits, out["padding_mask"], sample, self.blank_idx
                )
                loss = loss + cfg.alpha * labels * num_frames
                log |= parts
        if cfg.alpha < 1:
            assert heard is not None
            assert heard.logits is not None
            symbols = self._match_symbols()
            found = logit_distillation(
                symbols.select(logits.transpose(0, 1), symbols.student),
                symbols.select(heard.logits, symbols.teacher),
                out["padding_mask"],
                self.logit_terms,
                symbols.symbols.index(self.task.blank_symbol),
            )
            loss = loss + (1 - cfg.alpha) * found.total
            log |= {"loss_logits": found.total.detach(), "logit_share": found.num_counted}
        if model.heads is not None:
            assert heard is not None
            hidden, parts = self._hidden(model, out, heard, num_frames)
            loss = loss + cfg.hidden_weight * hidden
            log |= parts
        if self.forgetting is not None:
            inputs = sample["net_input"]
            held, parts = self.forgetting(
                model, out["x"], inputs["source"], inputs.get("padding_mask"), out["padding_mask"]
            )
            loss = loss + held * num_frames
            log |= {f"loss_{name}": value * num_frames for name, value in parts.items()}
        return loss, num_frames, log

    def _ctc(
        self, logits: Tensor, padding_mask: Optional[Tensor], sample: Any, training: bool
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """fairseq's `ctc` on these logits: summed loss, and its counts."""
        loss, _, log = super().forward(_Given(logits, padding_mask, training), sample)
        found = {name: log[name] for name in _COUNTERS if name in log}
        return loss, found | {"ctc_sum": loss.detach(), "ctc_tokens": log["ntokens"]}

    def _hidden(self, model: Any, out: Any, heard: TeacherOutput, num_frames: int) -> Tuple[Tensor, Dict[str, Any]]:
        """The distance of hidden states, as a mean over frames times ``num_frames``."""
        layers = sorted({layer for _, layer in model.heads.pairs})
        states = TeacherStates(dict(zip(layers, heard.hidden_states, strict=True)))
        found = distillation_loss(
            self.hidden_terms,
            model.heads.pairs,
            out["predictions"],
            states,
            out["prediction_padding_mask"],
            layer_weights=self.layer_weights,
        )
        share = num_frames / max(found.num_frames, 1)
        parts = {name: value * share for name, value in found.parts.items()}
        return found.total * share, parts | {"loss_hidden": found.total.detach() * share}

    @classmethod
    def reduce_metrics(cls, logging_outputs: Any) -> None:
        total = {name: utils.item(sum(log.get(name, 0) for log in logging_outputs)) for name in _names(logging_outputs)}
        frames = max(total["sample_size"], 1)
        # fairseq's own prints losses in bits; here all are in nats, as those of `layer_distill`
        stock = {"loss": total["loss"] * math.log(2), "ntokens": frames, "sample_size": frames}
        CtcCriterion.reduce_metrics([stock | {n: total.get(n, 0) for n in ("nsentences", *_COUNTERS)}])
        if total.get("ctc_tokens"):
            metrics.log_scalar("loss_ctc", total["ctc_sum"] / total["ctc_tokens"], total["ctc_tokens"], round=5)
        log_sequence_term(total)
        for name in sorted(set(total) - {"loss", *_SUMS}):
            value = total[name] / frames
            metrics.log_scalar(name.removeprefix("size_"), value, frames, round=5 if math.isfinite(value) else None)


class _Given:
    """A model that has computed its logits already, for fairseq's `ctc`."""

    def __init__(self, logits: Tensor, padding_mask: Optional[Tensor], training: bool) -> None:
        self.logits, self.padding_mask, self.training = logits, padding_mask, training

    def __call__(self, **_: Any) -> Dict[str, Any]:
        return {"padding_mask": self.padding_mask}

    def get_normalized_probs(self, net_output: Any, log_probs: bool) -> Tensor:
        assert log_probs
        return utils.log_softmax(self.logits.float(), dim=-1)  # type: ignore[no-any-return]


def _num_valid(logits: Tensor, padding_mask: Optional[Tensor]) -> int:
    """Valid frames of a batch; logits [T, B, V]."""
    return logits.shape[0] * logits.shape[1] if padding_mask is None else int((~padding_mask).sum())


def _names(logging_outputs: Any) -> set[str]:
    return {name for log in logging_outputs for name in log} | {"loss", "sample_size"}
