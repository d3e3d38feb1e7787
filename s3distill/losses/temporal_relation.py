"""Speech temporal relation: matches how frames relate to each other, whatever the widths of student and teacher."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s3distill.losses.precision import at_least_float32

TEMPORAL_NORMS = ("channels", "cosine")

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class TemporalWeights:
    """Weights of the terms of `temporal_relation_loss`; all 0 = not used. STaR's own loss has layer = intra = 1.

    Args:
        layer: of the Gram matrix within each matched layer.
        intra: of the Gram matrix between input and output of each matched layer.
        inter: of the Gram matrix between consecutive matched layers.
        norm: ``channels``, frames' inner products divided by the number of channels (STaR), or ``cosine``, their cosine.
    Raises:
        ValueError: an unknown ``norm``, or a negative weight.
    """

    layer: float = 0.0
    intra: float = 0.0
    inter: float = 0.0
    norm: str = "channels"

    def __post_init__(self) -> None:
        if self.norm not in TEMPORAL_NORMS:
            raise ValueError(
                f"the norm of temporal relations must be one of {', '.join(TEMPORAL_NORMS)}, but is {self.norm!r}"
            )
        if not all(0 <= weight < math.inf for weight in self.by_name.values()):
            raise ValueError(f"the weights of temporal relations must be at least 0, but are {self.by_name}")

    @property
    def by_name(self) -> dict[str, float]:
        return {"layer": self.layer, "intra": self.intra, "inter": self.inter}

    @property
    def active(self) -> bool:
        return any(self.by_name.values())

    def relations(self, pairs: Pairs) -> dict[str, list[tuple[tuple[int, int], tuple[int, int]]]]:
        """What is matched per term of positive weight: ((student layer a, b), (teacher layer a, b)) per Gram matrix.

        Raises:
            ValueError: a term has nothing to match.
        """
        ordered = sorted(pairs)
        found = {
            "layer": [((s, s), (t, t)) for s, t in ordered],
            # what enters the first layer (0) is no layer's output
            "intra": [((s - 1, s), (t - 1, t)) for s, t in ordered if s > 0 and t > 0],
            "inter": [((a, b), (c, d)) for (a, c), (b, d) in itertools.pairwise(ordered)],
        }
        needs = {"layer": "one pair of layers", "intra": "one pair of layers above 0", "inter": "two pairs of layers"}
        for name, weight in self.by_name.items():
            if weight > 0 and not found[name]:
                raise ValueError(
                    f"the temporal relation `{name}` needs {needs[name]} at least, but the pairs are {list(pairs)}; match more "
                    "layers or set its weight to 0"
                )
        return {name: found[name] for name, weight in self.by_name.items() if weight > 0}

    def layers_read(self, pairs: Pairs) -> tuple[list[int], list[int]]:
        """The student's and the teacher's layers that the terms of positive weight read, ascending."""
        read = [relation for relations in self.relations(pairs).values() for relation in relations]
        student, teacher = ({layer for relation in read for layer in relation[side]} for side in (0, 1))
        return sorted(student), sorted(teacher)


class TemporalRelationLoss(NamedTuple):
    """Sums over valid frames, [] float32 each (float64 of such states); divide by ``num_frames`` for means.

    Attributes:
        total: the weighted sum of the three terms, differentiable.
        layer, intra, inter: the terms, unweighted and detached; 0 where the weight is 0.
        num_frames: valid frames.
    """

    total: Tensor
    layer: Tensor
    intra: Tensor
    inter: Tensor
    num_frames: int


def temporal_relation_loss(
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    pairs: Pairs,
    padding_mask: Tensor | None = None,
    weights: TemporalWeights | None = None,
) -> TemporalRelationLoss:
    """STaR, speech temporal relation distillation  (Jang, Kim and Kim, 2024).

    With an utterance's hidden states H_l [T, C] of layer l and G(A, B) = A B^T / C, the temporal Gram matrix [T, T]:

        layer-wise  sum_l mean_ij (G(S_l, S_l) - G(H_l, H_l))_ij^2                  (within each matched layer)
        intra-layer sum_l mean_ij (G(S_(l-1), S_l) - G(H_(l-1), H_l))_ij^2          (input and output of each matched layer)
        inter-layer sum_l mean_ij (G(S_prev(l), S_l) - G(H_prev(l), H_l))_ij^2      (consecutive matched layers)

    S_l is compared with the teacher's layer that is paired with l; widths may differ, as nothing of them is left in G.

    STaR is the sum of the first two, over all layers. Chosen here, since the paper has no reference code: the mean over
    the T^2 entries of an utterance, and C as each model's own width. Added here: ``cosine``, rows of unit length, for
    teachers whose layers differ in norm by orders of magnitude; and inter-layer, after the FSP matrices of Yim et al.
    (2017), for students with fewer layers than the teacher. Where all layers are matched, it equals intra-layer.

    An utterance counts with its number of frames, T * mean_ij: summed over utterances and divided by all valid frames, that
    is the mean over frames, like every other loss here. Computed in float32 at least, under autocast too; the largest
    tensors are [B, T, T]. Padded frames are not read, whatever they hold.

    Args:
        student, teacher: hidden states by layer, [B, T, C_student] and [B, T, C_teacher], any floating type; those that
            `TemporalWeights.layers_read` names. No gradient flows into the teacher's.
        pairs: (student layer, teacher layer), as for prediction heads.
        padding_mask: [B, T] bool, True = padding, or None.
        weights: None = STaR's, layer-wise and intra-layer with weight 1.
    Raises:
        ValueError: numbers of frames differ, a layer is missing, or a term of positive weight has nothing to match.
    """
    weights = weights or TemporalWeights(layer=1.0, intra=1.0)
    relations = weights.relations(pairs)
    student_layers, teacher_layers = weights.layers_read(pairs)
    _check(student, student_layers, teacher, teacher_layers, padding_mask)
    any_state = next(iter(student.values()))
    # autocast would multiply in half precision, where a Gram matrix loses its small differences and overflows
    with torch.autocast(any_state.device.type, enabled=False):
        students = {i: _prepared(student[i], padding_mask, weights.norm) for i in student_layers}
        teachers = {i: _prepared(teacher[i].detach(), padding_mask, weights.norm) for i in teacher_layers}
        zero = at_least_float32(any_state.new_zeros(()))
        if padding_mask is None:
            num_frames = torch.full((any_state.shape[0],), any_state.shape[1], device=any_state.device)
        else:
            num_frames = (~padding_mask).sum(1)
        terms = {"layer": zero, "intra": zero, "inter": zero}
        total = zero
        for name, matched in relations.items():
            for (a, b), (c, d) in matched:
                # [B, T, C] x [B, C, T] -> [B, T, T]
                difference = students[a] @ students[b].mT - teachers[c] @ teachers[d].mT
                terms[name] = terms[name] + (difference.square().sum((1, 2)) / num_frames.clamp_min(1)).sum()
            total = total + weights.by_name[name] * terms[name]
    layer, intra, inter = (terms[name].detach() for name in ("layer", "intra", "inter"))
    return TemporalRelationLoss(total, layer, intra, inter, int(num_frames.sum()))


def _prepared(states: Tensor, padding_mask: Tensor | None, norm: str) -> Tensor:
    """States whose inner products are the entries of a Gram matrix; padded frames are 0, so that their entries are."""
    states = at_least_float32(states)
    if padding_mask is not None:
        states = states.masked_fill(padding_mask[:, :, None], 0)
    # eps bounds the gradient of frames that are almost 0, which grows with one over their norm, below float16's largest value
    return F.normalize(states, dim=-1, eps=1e-4) if norm == "cosine" else states * states.shape[-1] ** -0.5


def _check(
    student: Mapping[int, Tensor],
    student_layers: list[int],
    teacher: Mapping[int, Tensor],
    teacher_layers: list[int],
    padding_mask: Tensor | None,
) -> None:
    for role, states, layers in (("student", student, student_layers), ("teacher", teacher, teacher_layers)):
        missing = [layer for layer in layers if layer not in states]
        if missing:
            raise ValueError(f"`{role}` must have the hidden states of layers {layers}, but lacks {missing}")
    frames = {tuple(student[layer].shape[:2]) for layer in student_layers}
    frames |= {tuple(teacher[layer].shape[:2]) for layer in teacher_layers}
    if padding_mask is not None:
        frames.add(tuple(padding_mask.shape))
    if len(frames) != 1:
        raise ValueError(
            f"hidden states of student and teacher and `padding_mask` must have the same [B, T], but have {sorted(frames)}; "
            "temporal relations compare frames of the same audio at the same rate"
        )
