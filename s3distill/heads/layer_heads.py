"""Layer-prediction heads: student hidden states in, predictions of teacher hidden states out (training only)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3distill.heads.least_squares import least_squares
from s3distill.products import Linear

MODES = ("layer2layer", "predlayer", "none")
SHARINGS = ("own", "shared")
INITS = ("identity", "least_squares", "default")


@dataclass(frozen=True)
class HeadsConfig:
    """Which student layer predicts which teacher layer, and how.

    Args:
        pairs: (student layer, teacher layer) per head; 0 = what enters the first layer, i = output of layer i. In
            ``predlayer`` mode the student layer is of no account.
        student_dim, teacher_dim: widths of the hidden states.
        num_student_layers: Transformer layers of the student.
        mode: ``layer2layer``: one Linear per pair (DPHuBERT). ``predlayer``: all heads read the student's last layer
            through Linear -> GELU -> Linear (DistilHuBERT), of their own and with torch's initialisation, whatever
            ``sharing`` and ``init`` say. ``none``: the hidden state itself is the prediction, nothing is learnt.
        sharing: ``own``: a Linear per pair; ``shared``: student layer 0 has its own, the others share one.
        init: ``identity`` (its first rows and columns where the widths differ, zero bias), ``least_squares`` (identity
            until `LayerHeads.fit_least_squares` is called) or ``default`` (torch's).
        upsample: frames that are made of one: the student's time reduction, so that predictions have the teacher's rate.
        hidden_dim: of ``predlayer``, width behind the GELU, per pair; 0 = ``student_dim``. A student whose width was pruned keeps
            that of its heads.
    Raises:
        ValueError: an unknown choice, a layer that the student lacks, widths or frame rates that ``none`` cannot bridge, or
            least squares where it has no solution.
    """

    pairs: tuple[tuple[int, int], ...]
    student_dim: int
    teacher_dim: int
    num_student_layers: int
    mode: str = "layer2layer"
    sharing: str = "shared"
    init: str = "identity"
    upsample: int = 1
    hidden_dim: int = 0

    def __post_init__(self) -> None:
        choices = {"mode": (self.mode, MODES), "sharing": (self.sharing, SHARINGS), "init": (self.init, INITS)}
        for name, (value, valid) in choices.items():
            _require(value in valid, f"`{name}` of the heads must be one of {', '.join(valid)}, but is {value!r}")
        _require(
            min(self.student_dim, self.teacher_dim) > 0,
            f"`student_dim` and `teacher_dim` must be positive, but are {self.student_dim} and {self.teacher_dim}",
        )
        _require(
            self.hidden_dim >= 0 and (self.hidden_dim == 0 or self.mode == "predlayer"),
            f"`hidden_dim` is the inner width of heads of mode `predlayer`, 0 = the student's, but is {self.hidden_dim} in mode "
            f"{self.mode!r}; leave it out",
        )
        _require(
            len(self.pairs) > 0 and all(len(pair) == 2 and min(pair) >= 0 for pair in self.pairs),
            f"`pairs` must hold one or more (student layer, teacher layer), both >= 0, but is {list(self.pairs)}",
        )
        read = self.pairs if self.mode != "predlayer" else tuple((-1, teacher) for _, teacher in self.pairs)
        _require(len(set(read)) == len(read), f"the pairs of layers to match must differ, but are {list(self.pairs)}")
        _require(
            self.init != "least_squares" or (self.mode == "layer2layer" and self.upsample == 1),
            f"`init` of the heads cannot be least_squares unless they are one Linear per frame, but mode is {self.mode} with "
            f"{self.upsample} frames made of one; take default",
        )
        _require(self.upsample >= 1, f"`upsample` of the heads must be at least 1, but is {self.upsample}")
        self._check_none()
        for student, teacher in self.pairs:
            _require(
                self.mode == "predlayer" or student <= self.num_student_layers,
                f"the pair {student}:{teacher} names layer {student} of the student, which has layers 0 to "
                f"{self.num_student_layers} only; change the layers to match",
            )

    def _check_none(self) -> None:
        _require(
            self.mode != "none" or self.student_dim == self.teacher_dim,
            f"without heads (mode none) hidden states are compared as they are, so that student and teacher must have the same width, "
            f"but have {self.student_dim} and {self.teacher_dim}; take mode layer2layer or predlayer",
        )
        _require(
            self.mode != "none" or self.upsample == 1,
            f"without heads (mode none) the student must have the teacher's frames, but its time reduction leaves one of {self.upsample}; "
            "take mode layer2layer, whose heads bring them back",
        )

    def check_teacher(self, num_teacher_layers: int) -> None:
        """Raises ValueError where a pair names a layer that a teacher with so many Transformer layers lacks."""
        for student, teacher in self.pairs:
            _require(
                teacher <= num_teacher_layers,
                f"the pair {student}:{teacher} names layer {teacher} of the teacher, which has layers 0 to "
                f"{num_teacher_layers} only; change the layers to match",
            )

    @property
    def student_layers(self) -> tuple[int, ...]:
        """The student layer that each head reads."""
        if self.mode == "predlayer":
            return (self.num_student_layers,) * len(self.pairs)
        return tuple(student for student, _ in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadsConfig:
        known = sorted(field.name for field in dataclasses.fields(cls))
        unknown = sorted(set(values) - set(known))
        _require(not unknown, f"the config of the heads has unknown keys {unknown}; known are {known}")
        pairs = tuple((int(student), int(teacher)) for student, teacher in values["pairs"])
        return cls(**{**values, "pairs": pairs})


def parse_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Reads layers to match: ``0,4,8,12`` (the same in student and teacher) or ``0:0,2:4`` (student:teacher), or a mix.

    Raises:
        ValueError: anything else.
    """
    pairs = []
    for item in text.split(","):
        student, colon, teacher = item.partition(":")
        try:
            pairs.append((int(student), int(teacher if colon else student)))
        except ValueError as error:
            raise ValueError(
                f"the layers to match must read like '0,4,8,12' or '0:0,2:4' (student:teacher), but are {text!r}; "
                f"{item.strip()!r} is no layer"
            ) from error
    return tuple(pairs)


class LayerHeads(nn.Module):
    """One prediction per pair of the config.

        layer2layer  p_j = W_j h_{s_j} + b_j                                    (Peng et al., 2023, DPHuBERT)
        predlayer    p_j = V_j GELU(W_j h_last + b_j) + c_j, W_j [C_h, C_s]    (Chang et al., 2022, DistilHuBERT)
        none         p_j = h_{s_j}                                   (DistilHuBERT's ablation without prediction heads)

    With ``upsample`` r > 1 a transposed convolution C_s -> C_s of kernel and stride r stands in front of each Linear (Lee et
    al., 2022, FitHuBERT), in ``predlayer`` one in front of all.

    Keys: ``linears.N``, one per pair; ``shared``: 0 = that of student layer 0 if a pair names it, the last = the shared
    one; ``predlayer``: ``hidden`` (all W_j stacked) and ``linears.N`` (V_j); ``upsamplers.N``.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        students = config.student_layers
        self.linear_of_pair = list(range(len(students)))
        if config.mode == "layer2layer" and config.sharing == "shared":
            shared = int(0 in students)
            self.linear_of_pair = [0 if student == 0 else shared for student in students]
        num_linears = 0 if config.mode == "none" else max(self.linear_of_pair) + 1
        self.hidden: nn.Linear | None = None
        if config.mode == "predlayer":
            width = config.hidden_dim or config.student_dim
            self.hidden = Linear(config.student_dim, width * num_linears)
        else:
            width = config.student_dim
        self.linears = nn.ModuleList(Linear(width, config.teacher_dim) for _ in range(num_linears))
        num_upsamplers = 0 if config.upsample == 1 else (num_linears if self.hidden is None else 1)
        dim, factor = config.student_dim, config.upsample
        self.upsamplers = nn.ModuleList(nn.ConvTranspose1d(dim, dim, factor, factor) for _ in range(num_upsamplers))
        if config.mode == "layer2layer" and config.init != "default":
            for linear in self._linears():
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
            for name, parameter in self.upsamplers.named_parameters():  # every frame is repeated
                parameter.data.copy_(torch.eye(dim)[:, :, None] if name.endswith("weight") else torch.zeros(dim))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(student layer, teacher layer) per prediction."""
        return tuple(zip(self.config.student_layers, (teacher for _, teacher in self.config.pairs), strict=True))

    @property
    def deepest_layer(self) -> int:
        """The deepest student layer that is read; a student need not run further."""
        return max(self.config.student_layers)

    def forward(self, hidden_states: Sequence[Tensor]) -> list[Tensor]:
        """Predictions of the teacher's hidden states, in the order of the pairs.

        Args:
            hidden_states: the student's, by layer, each [B, T, C_s]; index 0 = what enters the first layer.
        Returns:
            [B, T * upsample, C_t] per pair.
        """
        inputs = [hidden_states[student] for student in self.config.student_layers]
        if self.config.mode == "none":
            return inputs
        if self.hidden is not None:
            inputs = list(F.gelu(self.hidden(self._upsampled(inputs[0], 0))).chunk(len(inputs), dim=-1))
        else:
            inputs = [self._upsampled(x, index) for index, x in zip(self.linear_of_pair, inputs, strict=True)]
        return [self.linears[index](x) for index, x in zip(self.linear_of_pair, inputs, strict=True)]

    def _upsampled(self, x: Tensor, index: int) -> Tensor:
        """[B, T, C_s] -> [B, T * upsample, C_s]"""
        return self.upsamplers[index](x.transpose(1, 2)).transpose(1, 2) if len(self.upsamplers) > 0 else x

    @torch.no_grad()
    def fit_least_squares(
        self,
        student_states: Sequence[Tensor],
        teacher_states: Sequence[Tensor],
        padding_mask: Tensor | None = None,
        ridge: float = 1e-6,
    ) -> None:
        """Sets every Linear to the affine map that predicts its teacher layers best, see `least_squares`.

        Args:
            student_states, teacher_states: hidden states by layer, each [B, T, C]; the same frames in both.
            padding_mask: [B, T] bool, True = padding, or None.
        Raises:
            RuntimeError: the heads are not one Linear per frame.
            ValueError: shapes differ, or no valid frame.
        """
        if self.config.mode != "layer2layer" or self.config.upsample > 1:
            raise RuntimeError(
                f"heads of mode `{self.config.mode}` have no least-squares solution; use mode `layer2layer`"
            )
        for index, linear in enumerate(self._linears()):
            xs, ys = [], []
            for (student, teacher), owner in zip(self.config.pairs, self.linear_of_pair, strict=True):
                if owner == index:
                    xs.append(_valid_frames(student_states[student], padding_mask))
                    ys.append(_valid_frames(teacher_states[teacher], padding_mask))
            weight, bias = least_squares(torch.cat(xs), torch.cat(ys), ridge)
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)

    def load_matching(self, state: Mapping[str, Tensor]) -> bool:
        """Takes the parameters of other heads over if all of them fit, by name and shape; else changes nothing.

        Args:
            state: another `LayerHeads`' ``state_dict``.
        Returns:
            Whether they fit.
        """
        own = self.state_dict()
        if set(own) != set(state) or any(own[name].shape != value.shape for name, value in state.items()):
            return False
        self.load_state_dict(dict(state))
        return True

    def _linears(self) -> list[nn.Linear]:
        return [linear for linear in self.linears if isinstance(linear, nn.Linear)]


def _valid_frames(states: Tensor, padding_mask: Tensor | None) -> Tensor:
    """[B, T, C] -> [N, C]"""
    return states.flatten(0, 1) if padding_mask is None else states[~padding_mask]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
