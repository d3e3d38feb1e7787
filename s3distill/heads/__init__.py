"""Layer-prediction heads: what maps a student's hidden states to its teacher's."""

from s3distill.heads.frame_rate import match_frames, without_prediction
from s3distill.heads.kept_heads import KeptHeads, keep_heads
from s3distill.heads.layer_heads import INITS, MODES, SHARINGS, HeadsConfig, LayerHeads, parse_pairs
from s3distill.heads.least_squares import least_squares
from s3distill.heads.teacher_heads import TeacherHeads, parse_pairs_per_teacher

__all__ = [
    "INITS",
    "MODES",
    "SHARINGS",
    "HeadsConfig",
    "KeptHeads",
    "LayerHeads",
    "TeacherHeads",
    "keep_heads",
    "least_squares",
    "match_frames",
    "parse_pairs",
    "parse_pairs_per_teacher",
    "without_prediction",
]
