"""Prediction heads for several teachers at once, each with its own layers and width."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from s3distill.heads.layer_heads import HeadsConfig, LayerHeads, parse_pairs


def parse_pairs_per_teacher(text: str, num_teachers: int) -> list[tuple[tuple[int, int], ...]]:
    """Reads layers to match as `parse_pairs` does, once for all teachers, or per teacher behind a semicolon: ``0,4;0,2:8``.

    Raises:
        ValueError: a layer cannot be read, or there are neither one nor ``num_teachers`` groups.
    """
    groups = [parse_pairs(group) for group in text.split(";")]
    if len(groups) not in (1, num_teachers):
        raise ValueError(
            f"the layers to match must be given once for all teachers, or once per teacher behind a semicolon, but there are "
            f"{len(groups)} groups for {num_teachers} teacher{'s' * (num_teachers > 1)}: {text!r}"
        )
    return groups * num_teachers if len(groups) == 1 else groups


class TeacherHeads(LayerHeads):
    """`LayerHeads` of the first teacher, under their own keys, and those of further teachers under ``others.N``.

    Args:
        configs: one per teacher; the students' side must be the same.
    """

    def __init__(self, configs: Sequence[HeadsConfig]) -> None:
        super().__init__(configs[0])
        self.others = nn.ModuleList(LayerHeads(config) for config in configs[1:])

    @property
    def by_teacher(self) -> list[LayerHeads]:
        return [self, *(heads for heads in self.others if isinstance(heads, LayerHeads))]

    @property
    def deepest_layer(self) -> int:
        """The deepest student layer that any of them reads."""
        return max(max(heads.config.student_layers) for heads in self.by_teacher)

    def predict_others(self, hidden_states: Sequence[Tensor]) -> list[list[Tensor]]:
        """Per further teacher what `forward` gives for the first."""
        return [heads(hidden_states) for heads in self.others]
