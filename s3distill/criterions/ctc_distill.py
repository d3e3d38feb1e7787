"""`ctc_distill`: CTC, the logits and the hidden states of a fine-tuned teacher, and the size constraint, in one loss."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Sequence, Tuple

from fairseq.criterions import register_criterion
from fairseq.criterions.ctc import CtcCriterion, CtcCriterionConfig
from fairseq.dataclass import ChoiceEnum
from torch import Tensor

from s3distill import compat, kernels
from s3distill.criterions._confidence import ConfidenceOptions, confidence_of
from s3distill.criterions._ctc_checks import (
    check_ctc_distillation,
    check_ctc_options,
    check_options_act,
    check_student,
    check_unlabelled,
)
from s3distill.criterions._ctc_labels import GivenLogits, Labelled, labelled_part, num_valid
from s3distill.criterions._ctc_metrics import COUNTERS, log_ctc_metrics, no_labels
from s3distill.criterions._distill_options import HiddenStateOptions, SizeOptions
from s3distill.criterions._distill_terms import parse_layer_weights, require_finite
from s3distill.criterions._forgetting import Forgetting, ForgettingOptions
from s3distill.criterions._hidden_term import hidden_term, teacher_layers
from s3distill.criterions._matching import MatchingOptions, View, check_matching_options, check_shared_masks, view_of
from s3distill.criterions._sequence_terms import (
    SequenceOptions,
    check_sequence_options,
    label_term,
)
from s3distill.criterions._size import check_size_options, size_log, target_at_update
from s3distill.encoder.ctc_teacher import CtcTeacher, TeacherOutput
from s3distill.encoder.symbols import SymbolMap
from s3distill.losses import (
    BLANK_FRAMES,
    DistillationTerms,
    LogitTerms,
    LossWeights,
    logit_distillation,
)
from s3distill.losses.precision import at_least_float32


@dataclass
class CtcDistillConfig(
    SequenceOptions,
    HiddenStateOptions,
    SizeOptions,
    MatchingOptions,
    ConfidenceOptions,
    ForgettingOptions,
    CtcCriterionConfig,
):
    """Options of `ctc_distill`: fairseq's of `ctc`, those of the terms that are shared or have a file, and the teacher's logits."""

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
        check_options_act(cfg, CtcDistillConfig)
        check_size_options(cfg)
        check_sequence_options(cfg, bool(getattr(task.cfg, "nbest", False)))
        self.logit_terms = LogitTerms(cfg.temperature, str(cfg.blank_frames), cfg.blank_threshold)
        weights = LossWeights(cfg.l1_weight, cfg.l2_weight, cfg.cosine_weight, str(cfg.cosine_type))
        self.hidden_terms = DistillationTerms(weights, target_norm=str(cfg.target_norm))
        self.layer_weights = parse_layer_weights(cfg.layer_weights) if cfg.layer_weights else None
        self.symbols: Optional[SymbolMap] = None
        check_matching_options(cfg, cfg.alpha)
        check_unlabelled(cfg, getattr(task.cfg, "unlabelled_subset", None))
        self.confidence = confidence_of(cfg, cfg.alpha)
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
        check_shared_masks(model, self.cfg)
        if self.forgetting is not None:
            self.forgetting.check_model(model)

    def load_state_dict(self, state_dict: Any, *values: Any, **options: Any) -> Any:
        """fairseq calls it where old heads learn, or a threshold follows; both may stay as they were built.

        That is at a new run's start, as the run before had other old tasks, and where a relative threshold is new.
        """
        if compat.starts_from_another_run():
            return None
        if state_dict is None:
            if self.forgetting is None or not len(self.forgetting.old_heads):
                return None
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
        padding_mask = sample["net_input"].get("padding_mask")
        target_sparsity = target_at_update(model, self.cfg, model.cfg.freeze_finetune_updates)
        view = view_of(self.cfg, model, sample, bool(self.task.cfg.normalize))
        conv_features = None
        if model.cfg.shares_extractor:  # in the teacher's precision, whatever the student's is
            with kernels.without_autocast(view.source.device):
                conv_features = model.extract(view.source, padding_mask)
        heard = self._teacher_output(model, view, padding_mask, conv_features)
        out = model(
            view.source,
            padding_mask,
            predict=True,
            target_sparsity=target_sparsity,
            masked=view.masked,
            conv_features=conv_features,
        )
        with kernels.without_autocast(view.source.device):
            loss, num_frames, log = self._terms(model, sample, view, out, heard)
        if out["penalty"] is not None:
            # gradients are divided by the summed sample_size over ranks, so a term that is no sum over frames is multiplied
            loss = loss + out["penalty"] * num_frames
            log |= size_log(model, out, target_sparsity, num_frames)
        require_finite(loss, model, sample, "" if self.zero_infinity else "pass criterion.zero_infinity=true, ")
        log |= {"loss": loss.detach(), "ntokens": num_frames, "nsentences": len(view.source), "sample_size": num_frames}
        return loss, num_frames, log

    def _teacher_output(
        self, model: Any, view: View, padding_mask: Optional[Tensor], conv_features: Optional[Tensor]
    ) -> Optional[TeacherOutput]:
        """What the terms compare with, or None where nothing is."""
        layers = teacher_layers(model.heads)
        if not layers and self.cfg.alpha == 1:
            return None
        teacher: CtcTeacher = self.task.teachers[0]
        return teacher.outputs(view.source, padding_mask, layers, self.cfg.alpha < 1, view.masked, conv_features)

    def _terms(
        self, model: Any, sample: Any, view: View, out: Any, heard: Optional[TeacherOutput]
    ) -> Tuple[Tensor, int, Dict[str, Any]]:
        """The weighted sum over valid frames of all terms but the penalty, the number of frames, and what to log."""
        cfg = self.cfg
        logits = model.get_logits(out)  # [T, B, V]
        num_frames = num_valid(logits, out["padding_mask"])
        loss, log = at_least_float32(logits.new_zeros(())), dict[str, Any]()
        part = labelled_part(sample, logits, out["padding_mask"], view.unmixed)
        # validation counts errors whatever the loss is
        if cfg.alpha > 0 or not model.training:
            log = no_labels(logits, model.training, str(cfg.seq_kd) != "none")
        if part is not None and log:
            labels, found = self._labels(part, model.training)
            log |= found
            if cfg.alpha > 0:
                loss = loss + cfg.alpha * labels * part.num_frames
        if cfg.alpha < 1:
            assert heard is not None
            divergence, parts = self._logits(logits, heard, out["padding_mask"], sample.get("labelled"), model.training)
            loss = loss + (1 - cfg.alpha) * divergence
            log |= parts
        if model.heads is not None:
            assert heard is not None
            hidden, parts = hidden_term(
                self.hidden_terms, model.heads, out, heard.hidden_states, self.layer_weights, num_frames
            )
            loss = loss + cfg.hidden_weight * hidden
            log |= parts
        if self.forgetting is not None:
            padding_mask = sample["net_input"].get("padding_mask")
            held, parts = self.forgetting(model, out["x"], view.source, padding_mask, out["padding_mask"])
            loss = loss + held * num_frames
            log |= {f"loss_{name}": value * num_frames for name, value in parts.items()}
        return loss, num_frames, log

    def _labels(self, part: Labelled, training: bool) -> Tuple[Tensor, Dict[str, Any]]:
        """The loss per label by fairseq's `ctc`, or of n-best lists, and what to log."""
        ctc, _, log = super().forward(GivenLogits(part, training), part.sample)
        found = {name: log[name] for name in COUNTERS if name in log}
        found |= {"ctc_sum": ctc.detach(), "ctc_tokens": log["ntokens"]}
        labels, parts = label_term(
            self.cfg, ctc / max(log["ntokens"], 1), part.logits, part.padding_mask, part.sample, self.blank_idx
        )
        return labels, found | parts

    def _logits(
        self,
        logits: Tensor,
        heard: TeacherOutput,
        padding_mask: Optional[Tensor],
        labelled: Optional[Tensor],
        training: bool,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """tau^2 KL summed over frames, and what to log."""
        assert heard.logits is not None
        symbols = self._match_symbols()
        teacher = symbols.select(heard.logits, symbols.teacher)
        student = symbols.select(logits.transpose(0, 1), symbols.student)
        blank = symbols.symbols.index(self.task.blank_symbol)
        weights, log = None, dict[str, Any]()
        if self.confidence is not None:
            weights, log = self.confidence(teacher, padding_mask, blank, labelled, training)
        found = logit_distillation(student, teacher, padding_mask, self.logit_terms, blank, weights)
        return found.total, log | {"loss_logits": found.total.detach(), "logit_share": found.num_counted}

    @classmethod
    def reduce_metrics(cls, logging_outputs: Any) -> None:
        log_ctc_metrics(logging_outputs)
