"""Learning without forgetting: what an old task needs of the weights (EWC), and what its model still says (task alignment)."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import logging
import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch.nn.functional as F
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import Tensor, nn

from s3distill import compat
from s3distill.analysis.fisher import Fisher
from s3distill.analysis.fisher_file import read_fisher
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.ctc_teacher import CtcTeacher
from s3distill.losses import check_fisher_fits, ewc_penalty, task_alignment_loss
from s3distill.losses.ewc import check_starts_there
from s3distill.losses.precision import at_least_float32
from s3distill.masks.state import SCORES, baked

logger = logging.getLogger(__name__)

OLD_HEADS = ("learn", "frozen")
_HEAD = "w2v_encoder.proj."
_MODEL = "w2v_encoder."


@dataclass
class ForgettingOptions(FairseqDataclass):
    """What keeps a recogniser from forgetting the tasks that it learned before."""

    ewc_paths: List[str] = field(
        default_factory=list,
        metadata={
            "help": "files of `s3distill fisher`, one per old task: weights that it needs are held where it left them"
        },
    )
    ewc_lambda: float = field(
        default=0.0, metadata={"help": "weight of sum F (theta - theta*)^2, against a loss that is a mean"}
    )
    ewc_normalize: bool = field(
        default=False,
        metadata={
            "help": "divide the F of each file by its mean over parameters: a model that knows its data by heart has an F near 0, which "
            "asks for another lambda than an F of a model that does not"
        },
    )
    ewc_head: bool = field(
        default=True,
        metadata={
            "help": "hold the CTC head too; false: it is free, as it must be where the new task has other symbols"
        },
    )
    old_model_paths: List[str] = field(
        default_factory=list,
        metadata={
            "help": "CTC checkpoints of old tasks: on the new audio, the learning encoder must give through the head of each what its "
            "frozen model gives (task alignment, learning without forgetting)"
        },
    )
    tac_gamma: float = field(default=0.0, metadata={"help": "weight of that, per frame"})
    old_heads: ChoiceEnum(list(OLD_HEADS)) = field(  # type: ignore[valid-type]
        default="learn",
        metadata={
            "help": "learn: the old heads follow the encoder (learning without forgetting), for `s3distill old-head`; frozen: they stay"
        },
    )


class Forgetting(nn.Module):
    """The terms of `ForgettingOptions`; old heads that learn are its parameters, so that checkpoints hold them.

    Args:
        cfg: `ForgettingOptions`.
        symbols: dictionary of the new task.
        task_cfg: its other options, of which ``normalize`` and the teacher's precision count.
    Raises:
        FileNotFoundError, ValueError: an option is out of range, or a file is none of its kind.
    """

    def __init__(self, cfg: Any, symbols: Sequence[str], task_cfg: Any) -> None:
        super().__init__()
        _check_options(cfg)
        self.ewc_lambda, self.tac_gamma, self.holds_head = cfg.ewc_lambda, cfg.tac_gamma, cfg.ewc_head
        self.fishers = [_read_fisher(path, symbols, cfg.ewc_head, cfg.ewc_normalize) for path in cfg.ewc_paths]
        self.sources = list(cfg.ewc_paths)
        self.started = False
        dtype = str(getattr(task_cfg, "teacher_dtype", "float32"))
        old = [_read_old_model(path, bool(task_cfg.normalize), dtype) for path in cfg.old_model_paths]
        self.old_models = [model for model, _ in old]
        heads = [head for _, head in old]
        self.frozen_heads = [head.requires_grad_(False) for head in heads] if str(cfg.old_heads) == "frozen" else []
        self.old_heads = nn.ModuleList([] if self.frozen_heads else heads)

    @property
    def active(self) -> bool:
        return bool(self.fishers or self.old_models)

    def check_model(self, model: nn.Module) -> None:
        """The model must be shaped as the old ones (`ValueError`)."""
        held = self._held(model)
        for fisher, source in zip(self.fishers, self.sources, strict=True):
            check_fisher_fits(fisher.values, held, source)
            if not any(held[name].requires_grad and bool(value.any()) for name, value in fisher.values.items()):
                raise ValueError(
                    f"`criterion.ewc_paths` holds weights, but none of those in {source} learns (scores of masks are no weights): pass "
                    "model.co_train=true or model.trainable_proj=true, or leave the option out"
                )
        config: Any = model.config
        for old in self.old_models:
            if old.config.frame_convs != config.frame_convs or old.config.output_dim != config.output_dim:
                raise ValueError(
                    f"the head of {old.name} must fit the student, but is for width {old.config.output_dim} with (kernel, stride) "
                    f"{list(old.config.frame_convs)}, and the student has width {config.output_dim} with {list(config.frame_convs)}; start "
                    "the student from the old model: model.student_path"
                )

    def forward(
        self, model: nn.Module, x: Tensor, source: Tensor, padding_mask: Optional[Tensor], frame_mask: Optional[Tensor]
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """lambda EWC + gamma (mean over valid frames of the task alignment).

        Args:
            model: the learning model, as fairseq's trainer gives it.
            x: its encoder's output, [B, T, C].
            source: the new task's audio, [B, S], with its ``padding_mask`` [B, S] or None.
            frame_mask: [B, T], True = padding, or None.
        Returns:
            [] float32, and the unweighted terms, detached, to log.
        """
        total, log = at_least_float32(x.new_zeros(())), {}
        if self.fishers:
            held = self._learning(model)
            if model.training and not self.started:
                self.started = True
                self._check_start(model, held)
            penalty = sum((_penalty(fisher, held, x) for fisher in self.fishers), total)
            total, log["ewc"] = total + self.ewc_lambda * penalty, penalty.detach()
        if self.old_models:
            heads = self.frozen_heads or list(self.old_heads)
            ours = [F.linear(x.float(), h.weight.to(x.device).float(), h.bias.to(x.device).float()) for h in heads]
            theirs = [old.outputs(source, padding_mask, (), True).logits for old in self.old_models]
            found = task_alignment_loss(ours, theirs, frame_mask)  # type: ignore[arg-type]
            alignment = found.total / max(found.num_frames, 1)
            total, log["task_alignment"] = total + self.tac_gamma * alignment, alignment.detach()
        return total, log

    def _check_start(self, model: Any, held: Dict[str, Tensor]) -> None:
        """Looked at in the first update, since finetune_from_model loads weights late; a resumed run has gone on from there."""
        if _unwrapped(model).num_updates > 0:
            return
        encoders = [
            {name: value.to(held[name].device) for name, value in fisher.means.items() if not name.startswith(_HEAD)}
            for fisher in self.fishers
        ]
        check_starts_there(encoders, held, ", ".join(self.sources))

    def _learning(self, model: Any) -> Dict[str, Tensor]:
        """What is held, without a gradient of the encoder while ``freeze_finetune_updates`` freezes it."""
        held = self._held(model)
        if not _unwrapped(model).w2v_encoder.is_frozen:
            return dict(held)
        return {name: p if name.startswith(_HEAD) else p.detach() for name, p in held.items()}

    def _held(self, model: nn.Module) -> Dict[str, nn.Parameter]:
        """Encoder and head, without scores of masks."""
        return {
            name: parameter
            for name, parameter in _unwrapped(model).named_parameters()
            if name.startswith(_MODEL) and not name.endswith(SCORES) and (self.holds_head or not name.startswith(_HEAD))
        }


def _unwrapped(model: Any) -> Any:
    """The model inside of wrappers for distributed training."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _penalty(fisher: Fisher, held: Dict[str, Tensor], x: Tensor) -> Tensor:
    for tensors in (fisher.values, fisher.means):  # moved once
        for name, value in tensors.items():
            if value.device != x.device:
                tensors[name] = value.to(x.device)
    return ewc_penalty(held, fisher.values, fisher.means)


def _check_options(cfg: Any) -> None:
    for paths, weight in (("ewc_paths", "ewc_lambda"), ("old_model_paths", "tac_gamma")):
        value, given = getattr(cfg, weight), list(getattr(cfg, paths))
        if not 0 <= value < math.inf:
            raise ValueError(f"`criterion.{weight}` must be at least 0 and finite, but is {value}")
        if bool(given) != (value > 0):
            raise ValueError(
                f"`criterion.{paths}` and `criterion.{weight}` belong together, but are {given} and {value}; pass both, or neither"
            )
        if not all(given):
            raise ValueError(f"`criterion.{paths}` must name a file each, but is {given}")
    default = ForgettingOptions()
    about = (("ewc_head", "ewc_paths"), ("ewc_normalize", "ewc_paths"), ("old_heads", "old_model_paths"))
    for option, paths in about:
        if str(getattr(cfg, option)) != str(getattr(default, option)) and not getattr(cfg, paths):
            raise ValueError(
                f"`criterion.{option}` is about `criterion.{paths}`, which is empty; leave it out, or pass them"
            )


def _read_fisher(path: str, symbols: Sequence[str], with_head: bool, normalize: bool) -> Fisher:
    fisher = read_fisher(path)
    if with_head and list(fisher.symbols) != list(symbols):
        differing = sorted(set(fisher.symbols) ^ set(symbols)) or ["their order"]
        raise ValueError(
            f"the head of {path} can be held only over its own symbols, but the task's dictionary differs in {', '.join(differing[:8])}; "
            "pass criterion.ewc_head=false, or train both tasks with one dictionary (task.target_dictionary)"
        )
    if not with_head:
        for tensors in (fisher.values, fisher.means):
            for name in [name for name in tensors if name.startswith(_HEAD)]:
                del tensors[name]
    mean = fisher.mean()
    logger.info("EWC: %s, %d utterances, mean F %.3g", path, fisher.num_utterances, mean)
    if normalize:
        if mean == 0:
            raise ValueError(
                f"`criterion.ewc_normalize` divides by the mean of F, but that of {path} is 0; write it again"
            )
        for value in fisher.values.values():
            value.div_(mean)
    return fisher


def _read_old_model(path: str, normalize: bool, dtype: str) -> Tuple[CtcTeacher, nn.Linear]:
    """The frozen model, and a copy of its head."""
    parsed = baked(parse_checkpoint(compat.load_checkpoint(path), path), path)
    if parsed.normalize != normalize:
        raise ValueError(
            f"`task.normalize` must be what the old models were trained with: {path} has normalize={parsed.normalize}, but the task has "
            f"{normalize}; pass task.normalize={str(parsed.normalize).lower()}"
        )
    if parsed.head_state is None or parsed.pooled:
        raise ValueError(f"`criterion.old_model_paths` must be recognisers with a CTC head, but {path} has none")
    head = nn.Linear(*reversed(parsed.head_state["weight"].shape))
    head.load_state_dict(parsed.head_state)
    shift, mode = float(parsed.model_options.get("blank_weight") or 0), parsed.model_options.get("blank_mode") or "add"
    if shift != 0 and mode == "set":
        raise ValueError(
            f"`criterion.old_model_paths`: {path} sets its blank to {shift} in every frame (model.blank_mode=set), which no head learns; "
            "leave it out"
        )
    head.bias.data[0] += shift  # as its own logits have it
    logger.info("task alignment: %s, %d outputs", path, len(head.weight))
    return CtcTeacher(parsed, dtype, f"old model {path}"), head
