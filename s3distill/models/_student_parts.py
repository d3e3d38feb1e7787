"""What a student carries while it is distilled, whatever model it is: prediction heads, L0 gates, the size constraint."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Dict, List, Optional, Tuple

from omegaconf import open_dict
from torch import Tensor

from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.model import EncoderOutput
from s3distill.gates import GateCounts, GateSet, Lagrangian, check_target, count_cost, sparsity
from s3distill.gates.cost import Measure
from s3distill.gates.values import GateValues
from s3distill.heads import HeadsConfig, TeacherHeads, match_frames, parse_pairs_per_teacher, without_prediction
from s3distill.models._latency import measure_of, read_table

logger = logging.getLogger(__name__)

# what `fill_options` takes from files and the task: it belongs into checkpoints, so that they rebuild alone
FILLED = ("teacher_dim", "extra_teacher_dims", "reference_cost", "head_hidden_dim", "latency")
# what the keys of heads, gates and multipliers start with
PART_PREFIXES = ("heads.", "gates.", "lagrangian.")


def keep_filled(model_cfg: Any, filled: Any, others: Sequence[str] = ()) -> None:
    """Puts `FILLED` and ``others`` of ``filled``, the options that a model was built with, into those that checkpoints hold."""
    with open_dict(model_cfg):
        for name in (*FILLED, *others):
            if hasattr(filled, name):
                model_cfg[name] = getattr(filled, name)


def fill_options(cfg: Any, config: EncoderConfig, task: Any, start: Optional[ParsedCheckpoint]) -> None:
    """Puts what heads and gates take from the start's file, the task's teachers and the latency table into ``cfg``.

    Args:
        cfg: `HeadOptions` and `GateOptions`.
        config: shape of the student.
        start: what the student starts from, or None.
    """
    if start is not None and str(cfg.head_mode) == "predlayer":  # heads of a student whose width was cut keep theirs
        cfg.head_hidden_dim = cfg.head_hidden_dim or int(start.student_options.get("head_hidden_dim") or 0)
    num_others = getattr(task, "num_teachers", 1) - 1
    dims_are_known = cfg.teacher_dim and len(cfg.extra_teacher_dims) >= num_others
    needs_teacher = (cfg.distill_layers and not dims_are_known) or (cfg.prune_units and not cfg.reference_cost)
    teachers = getattr(task, "teachers", []) if needs_teacher else []
    if teachers and cfg.distill_layers:
        groups = parse_pairs_per_teacher(cfg.distill_layers, len(teachers))
        for teacher, pairs in zip(teachers, groups, strict=True):
            teacher.check_layers([t for _, t in pairs])
        cfg.teacher_dim = cfg.teacher_dim or teachers[0].config.embed_dim
        cfg.extra_teacher_dims = list(cfg.extra_teacher_dims) or [t.config.embed_dim for t in teachers[1:]]
    elif cfg.distill_layers and not cfg.teacher_dim:
        cfg.teacher_dim = config.embed_dim
    if cfg.latency_table and not cfg.latency:
        cfg.latency = read_table(cfg.latency_table).to_json()
    if cfg.prune_units and not cfg.reference_cost:
        by_table = str(cfg.prune_measure) == "latency"  # the table knows no other shape than the student's
        whole = teachers[0].config if teachers and not by_table else config
        cfg.reference_cost = float(count_cost(whole, None, measure_of(cfg, config)))


class StudentParts:
    """Heads, gates and multipliers of a student, under the keys ``heads.*``, ``gates.*`` and ``lagrangian.*``.

    In front of the model's other base classes; its ``__init__`` calls `add_parts` when it is a module already.
    """

    cfg: Any
    config: EncoderConfig
    training: bool
    num_updates: int
    heads_loaded: bool
    measure: Measure
    heads: Optional[TeacherHeads]
    gates: Optional[GateSet]
    lagrangian: Optional[Lagrangian]

    def add_parts(self, cfg: Any, config: EncoderConfig) -> None:
        """Builds what the options ask for.

        Raises:
            ValueError: heads and gates that exclude each other, or an option of theirs is out of range.
        """
        self.heads_loaded = False
        self.measure = measure_of(cfg, config)
        self.heads = None
        self.gates = None
        self.lagrangian = None
        if cfg.distill_layers:
            self.heads = TeacherHeads(_heads_configs(cfg, config))
        if cfg.prune_units and config.output is not None:
            raise ValueError(
                "`model.prune_units` cannot gate a student that keeps its prediction heads (s3distill keep-heads); prune first, then keep "
                "them"
            )
        if self.heads is not None and config.time_reduction > 1 and "width" in cfg.prune_units:
            raise ValueError(
                "`model.prune_units` cannot have 'width' where prediction heads bring reduced frames back (model.time_reduction="
                f"{config.time_reduction}): their transposed convolutions are of that width; take 'width' out"
            )
        if cfg.prune_units:
            self.gates = GateSet(config, list(cfg.prune_units), init_drop=cfg.gate_init_drop)
            self.lagrangian = Lagrangian()
            for module, group in ((self.gates, "gate"), (self.lagrangian, "multiplier")):
                for parameter in module.parameters():
                    parameter.param_group = group  # type: ignore[attr-defined]  # gives the group its own learning rate

    def load_parts(self, start: ParsedCheckpoint, path: str) -> None:
        """Gates that were not pruned yet, and heads where they fit, of the checkpoint that the student starts from.

        Raises:
            ValueError: it has gates that this student has not.
        """
        gates = _below("gates.", start.extra_state)
        if gates:
            own = {} if self.gates is None else {k: v.shape for k, v in self.gates.state_dict().items()}
            if self.gates is None or own != {k: v.shape for k, v in gates.items()}:
                raise ValueError(
                    f"{path} has gates that were not pruned yet (model.prune_units={start.student_options.get('prune_units')}); cut "
                    "them first with `s3distill prune`, or go on training them with the same model.prune_units"
                )
            self.gates.load_state_dict(gates)
        if self.heads is None:
            return
        found = _below("heads.", start.extra_state)
        options = ("distill_layers", "head_mode", "head_sharing")
        differing = [o for o in options if str(start.student_options.get(o)) != str(getattr(self.cfg, o))]
        self.heads_loaded = not differing and self.heads.load_matching(found)
        if found and not self.heads_loaded:
            logger.warning(
                "heads of %s are left out (%s differ); they start from %s",
                path,
                differing or "shapes",
                self.heads.config.init,
            )
        logger.info("student starts from %s%s", path, ", its heads come along" if self.heads_loaded else "")

    def gate_values(self) -> Optional[GateValues]:
        """Values for this forward: drawn by seed and update in training, deterministic in evaluation; None without gates."""
        if self.gates is None:
            return None
        return self.gates.sample(self.cfg.seed + self.num_updates) if self.training else self.gates.deterministic()

    def size_constraint(self, target_sparsity: Optional[float]) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """Expected sparsity and penalty, [] each; None without gates, and the penalty without a target."""
        if self.gates is None:
            return None, None
        assert self.lagrangian is not None
        expected = self.expected_sparsity()
        return expected, None if target_sparsity is None else self.lagrangian(expected, target_sparsity)

    def predict(self, out: EncoderOutput) -> Tuple[List[List[Tensor]], Optional[Tensor]]:
        """Per teacher its heads' predictions, [B, T, C_teacher] each, and which frames of the teacher have none, [B, T]."""
        if self.heads is None:
            return [], out.padding_mask
        predictions = [self.heads(out.hidden_states), *self.heads.predict_others(out.hidden_states)]
        factor = self.config.time_reduction
        if factor == 1:
            return predictions, out.padding_mask
        batch_size, num_frames, _ = out.features.shape
        mask = without_prediction(out.padding_mask, factor, batch_size, num_frames, out.features.device)
        return [[match_frames(p, num_frames) for p in group] for group in predictions], mask

    def expected_sparsity(self) -> Tensor:
        """Share of the reference cost that the gates are expected to remove; scalar, differentiable in the gates."""
        assert self.gates is not None
        counts = self.gates.expected_counts()
        return sparsity(self.config, counts, self.measure, self.cfg.reference_cost)  # type: ignore[return-value]

    @property
    def initial_sparsity(self) -> float:
        """Sparsity with every gate open: 0, or more where the student is smaller than what sparsity refers to."""
        return float(sparsity(self.config, GateCounts.full(self.config), self.measure, self.cfg.reference_cost))

    def check_target_sparsity(self, target: float) -> None:
        """Refuses a target that closing every gate cannot reach (`ValueError`)."""
        check_target(self.config, list(self.cfg.prune_units), target, self.measure, self.cfg.reference_cost)


def _below(prefix: str, state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _heads_configs(cfg: Any, config: EncoderConfig) -> List[HeadsConfig]:
    """One per teacher."""
    dims = [cfg.teacher_dim, *cfg.extra_teacher_dims]
    return [
        HeadsConfig(
            pairs=pairs,
            student_dim=config.embed_dim,
            teacher_dim=dim,
            num_student_layers=config.num_layers,
            mode=str(cfg.head_mode),
            sharing=str(cfg.head_sharing),
            init=str(cfg.head_init),
            upsample=config.time_reduction,
            hidden_dim=cfg.head_hidden_dim,
        )
        for pairs, dim in zip(parse_pairs_per_teacher(cfg.distill_layers, len(dims)), dims, strict=True)
    ]
