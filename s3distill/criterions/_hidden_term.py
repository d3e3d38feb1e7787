"""Hidden states of one teacher, as a term of `ctc_distill`."""

from typing import Any, Dict, Optional, Sequence, Tuple

from torch import Tensor

from s3distill.heads import LayerHeads
from s3distill.losses import DistillationTerms, TeacherStates, distillation_loss


def teacher_layers(heads: Optional[LayerHeads]) -> list[int]:
    """Layers of the teacher that are predicted, ascending."""
    return [] if heads is None else sorted({layer for _, layer in heads.pairs})


def hidden_term(
    terms: DistillationTerms,
    heads: LayerHeads,
    out: Dict[str, Any],
    states: Sequence[Tensor],
    layer_weights: Optional[Sequence[float]],
    num_frames: int,
) -> Tuple[Tensor, Dict[str, Any]]:
    """`distillation_loss` as a mean over frames times ``num_frames``, and what to log, weighted alike.

    Args:
        out: a student's output with ``predictions`` and ``prediction_padding_mask``.
        states: the teacher's, of `teacher_layers`.
        num_frames: the student's valid frames, which are fewer than its heads' where it reduces time.
    """
    found = distillation_loss(
        terms,
        heads.pairs,
        out["predictions"],
        TeacherStates(dict(zip(teacher_layers(heads), states, strict=True))),
        out["prediction_padding_mask"],
        layer_weights=layer_weights,
    )
    share = num_frames / max(found.num_frames, 1)
    parts = {name: value * share for name, value in found.parts.items()}
    return found.total * share, parts | {"loss_hidden": found.total.detach() * share}
