"""The options of prediction heads, in common to all students that can have them."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass, field
from typing import List

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from s3distill.heads import INITS, MODES, SHARINGS


@dataclass
class HeadOptions(FairseqDataclass):
    """Which layers of the teacher are predicted from which of the student, and how; see `HeadsConfig`."""

    distill_layers: str = field(
        default="",
        metadata={
            "help": "layers to match, e.g. '0,4,8,12' (same index in student and teacher) or '0:0,2:4' (student:teacher); "
            "0 = what enters the first layer; several teachers: the same for all, or one list each, split by ';'; empty: no heads"
        },
    )
    head_mode: ChoiceEnum(list(MODES)) = field(  # type: ignore[valid-type]
        default="layer2layer",
        metadata={"help": "layer2layer: each from its own student layer; predlayer: all from the last one"},
    )
    head_sharing: ChoiceEnum(list(SHARINGS)) = field(  # type: ignore[valid-type]
        default="shared",
        metadata={
            "help": "of layer2layer: shared (layer 0 has its own head, the others one in common) or own (one per layer)"
        },
    )
    head_init: ChoiceEnum(list(INITS)) = field(  # type: ignore[valid-type]
        default="identity",
        metadata={
            "help": "of layer2layer: identity (truncated where widths differ), least_squares (fitted at the start) or default (random)"
        },
    )
    head_hidden_dim: int = field(
        default=0,
        metadata={
            "help": "of predlayer: inner width of each head; 0: that of student_path's heads, else the student's width"
        },
    )
    teacher_dim: int = field(default=0, metadata={"help": "width of the teacher; 0: taken from the task's teacher"})
    extra_teacher_dims: List[int] = field(
        default_factory=list,
        metadata={"help": "widths of further teachers; empty: taken from the task's (task.extra_teacher_paths)"},
    )
