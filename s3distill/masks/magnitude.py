"""Pruning by magnitude, what S3-Router's learned masks are compared with: OMP, IMP and PARP.

The weights learn; the scores of the masks do not, they are |weight|. A masked module keeps the matrices' own top-k
(`selection.select`), like everywhere in this package.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s3distill.masks.modules import Masked, MaskedWeightNormConv, MaskRule
from s3distill.masks.scores import init_scores
from s3distill.masks.selection import select

logger = logging.getLogger(__name__)

METHODS = ("s3_router", "omp", "imp", "parp")

_ALIVE = torch.finfo(torch.float32).tiny  # least score of a connection that is not removed for good


@dataclass(frozen=True)
class PruningSchedule:
    """When connections are removed, and how many: at updates 0, ``interval``, 2 ``interval``, ...

    s_k = s (1 - (1 - k / n)^3),   k = 1 .. n   (Zhu & Gupta, 2017, eq. 1, from sparsity 0)

    Step k is taken at update (k - 1) ``interval``. The cubic removes most while plenty is superfluous and little in the
    last steps, each of which hurts most; equal steps would do it the other way round, relative to what is left.

    Attributes:
        num_steps: n, the number of steps to the final sparsity s.
        interval: updates from one step to the next.
        repeats: go on after step n, at the final sparsity (PARP).
    """

    num_steps: int = 1
    interval: int = 1
    repeats: bool = False

    @classmethod
    def of(cls, method: str, steps: int | None, interval: int | None, pattern: str = "unstructured") -> PruningSchedule:
        """The schedule of a method, from the options ``prune_steps`` and ``prune_interval`` (None: not set).

        ``omp`` prunes once; ``imp`` in steps; ``parp`` at once and again and again, or (PARP-P) in steps first.

        Raises:
            ValueError: an option is missing, out of range or without meaning for the method.
        """
        for name, value in (("prune_interval", interval), ("prune_steps", steps)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {value}; raise it, or leave it out (null)")
            if value is not None and method in ("s3_router", "omp"):
                raise ValueError(
                    f"`{name}` belongs to prune_method=imp and parp, but is {value} with prune_method={method}; leave it out (null)"
                )
        if method == "imp" and (interval is None or steps is None or steps < 2):
            raise ValueError(
                f"prune_method=imp prunes in 2 or more steps, but `prune_steps` is {steps} and `prune_interval` is {interval}; pass e.g. "
                "model.prune_steps=5 model.prune_interval=1000, or prune_method=omp to prune all at once"
            )
        if method == "parp" and interval is None:
            raise ValueError(
                "prune_method=parp prunes again and again, but `prune_interval` is not set; pass e.g. model.prune_interval=50"
            )
        if pattern == "2:4" and steps is not None and steps > 1:
            raise ValueError(
                f"`mask_pattern` 2:4 removes half in the first step, but `prune_steps` is {steps}; take prune_method=omp, or parp without "
                "prune_steps"
            )
        return cls(steps or 1, interval or 1, repeats=method == "parp")

    def check_length(self, max_update: int) -> None:
        """Refuses a training of ``max_update`` updates (0: no limit) that ends before the final sparsity (`ValueError`)."""
        if 0 < max_update <= self.last_step_at:
            raise ValueError(
                f"`prune_steps`={self.num_steps} and `prune_interval`={self.interval} reach the final sparsity at update "
                f"{self.last_step_at}, but optimization.max_update is {max_update}; lower one of them, or raise max_update"
            )

    @property
    def last_step_at(self) -> int:
        """Update at which the final sparsity is reached."""
        return (self.num_steps - 1) * self.interval

    def step(self, num_updates: int) -> int:
        """Number of steps taken by the time of an update, its own included: 1 .. n."""
        return min(num_updates // self.interval + 1, self.num_steps)

    def prunes_at(self, num_updates: int) -> bool:
        """Whether connections are removed in front of the update that follows ``num_updates`` others."""
        return num_updates % self.interval == 0 and (num_updates <= self.last_step_at or self.repeats)

    def density(self, target: float, num_updates: int) -> float:
        """Share that is kept from an update on, where ``target`` is kept in the end."""
        k = self.step(num_updates)
        if k == self.num_steps:
            return target  # and not what rounding makes of it
        return 1 - (1 - target) * (1 - (1 - k / self.num_steps) ** 3)


class MagnitudePruning:
    """OMP, IMP and PARP over the masked modules of a network.

    ``omp`` and ``imp``: at step k of the schedule the smallest of |W * mask| are removed, for good; W_eff = W * mask.
        OMP is IMP with one step. (Han et al., 2015; Frankle & Carbin, 2019, without rewinding)
    ``parp``: the smallest of |W| are set to 0 and learn on, W_eff = W; what has grown above others is kept the next time.
        (Lai et al., 2021, algorithm 1; PARP-P with more than one step)

    In evaluation and in checkpoints the network is always the one of the final density, W * top-k(|W|) with W as it is
    then, so that runs and checkpoints compare at equal size. A score of 0 says that a connection was removed for good;
    all others are at least the smallest normal float32, so that a weight of exactly 0 keeps its place. Scores therefore
    say all there is to know: a resumed run needs them and the number of updates only.

    Args:
        modules: the masked modules by name; their rules hold the final densities.
        schedule: when, and how many.
        grows_back: ``parp``.
    """

    def __init__(self, modules: Mapping[str, Masked], schedule: PruningSchedule, grows_back: bool = False) -> None:
        if not modules:
            raise ValueError(
                "`prune_method` has nothing to prune: no module is masked (prune_rate=1, or fix_attn and fix_fc with every no_prune_* "
                "set); pass e.g. model.prune_rate=0.3 to remove 70% of the connections"
            )
        self.modules, self.schedule, self.grows_back = dict(modules), schedule, grows_back
        self.targets = {name: module.rule for name, module in self.modules.items()}
        self.num_updates: int | None = None
        self.factors: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def start(self) -> None:
        """Scores from the weights as they are, with nothing removed."""
        for module in self.modules.values():
            module.scores.copy_(_magnitudes(module))

    def prune(self, num_updates: int) -> None:
        """What is due in front of the update that follows ``num_updates`` others; a second call for the same one does nothing.

        What weights were multiplied by is in ``factors`` (parameter -> tensor that broadcasts to it) until the next update:
        copies that an optimizer keeps of them must follow.
        """
        if num_updates == self.num_updates:
            return
        self.num_updates, self.factors = num_updates, {}
        if self.schedule.prunes_at(num_updates):
            for name, module in self.modules.items():
                self._prune_module(module, self.targets[name])
            self._report()
        self.show(training=True)

    def show(self, training: bool) -> None:
        """Makes the modules compute what they are in training (as of the last `prune`), or what they are in the end."""
        if not training:
            self.refresh()
        for name, module in self.modules.items():
            module.rule = self._training_rule(self.targets[name]) if training else self.targets[name]

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings the scores up to the weights. What was removed for good stays so; no training mask changes."""
        for module in self.modules.values():
            alive = True if self.grows_back else module.scores > 0
            module.scores.copy_(_magnitudes(module) * alive)

    def _training_rule(self, target: MaskRule) -> MaskRule:
        if self.num_updates is None:
            return target
        if self.grows_back:  # nothing is masked; of the patterns only 2:4 would mask all the same
            return MaskRule(1.0, "unstructured" if target.pattern == "2:4" else target.pattern)
        return dataclasses.replace(target, density=self.schedule.density(target.density, self.num_updates))

    @torch.no_grad()
    def _prune_module(self, module: Masked, target: MaskRule) -> None:
        assert self.num_updates is not None
        scores = _magnitudes(module)
        if not self.grows_back:
            scores *= module.scores > 0
        mask = select(scores, self.schedule.density(target.density, self.num_updates), target.pattern)
        module.scores.copy_(scores if self.grows_back else scores * mask)
        if self.grows_back:
            self.factors |= _set_to_zero(module, mask)

    def _report(self) -> None:
        assert self.num_updates is not None
        step, n = self.schedule.step(self.num_updates), self.schedule.num_steps
        densities = [self.schedule.density(rule.density, self.num_updates) for rule in self.targets.values()]
        logger.info(
            "update %d, pruning step %d of %d: %d modules keep %.2f%% to %.2f%% of their connections",
            *(self.num_updates, step, n, len(densities), 100 * min(densities), 100 * max(densities)),
        )


def _magnitudes(module: Masked) -> Tensor:
    """|W|, or its means over rows or columns where there is one score for each; above 0, float32, [as the scores]."""
    scores = torch.empty_like(module.scores, requires_grad=False)
    with torch.no_grad():
        weight = module.dense_weight()
    init_scores(scores, weight, "weight_magnitude_with_scale", 1.0)
    return scores.abs_().clamp_(min=_ALIVE)


def _set_to_zero(module: Masked, mask: Tensor) -> dict[nn.Parameter, Tensor]:
    """W <- W * mask, in place; returns what each parameter was multiplied by."""
    if not isinstance(module, MaskedWeightNormConv):
        (weight,) = module.weight_parameters()
        factors = {weight: mask}
    else:
        # W = g v / ||v||: with v * mask in place of v, g shrinks by what the norm loses. Where nothing of v is left, g is 0
        # and v stays: its direction is the one in which W can grow again
        before = module.weight_v.norm(dim=(0, 1), keepdim=True)  # [1, 1, K]
        after = (module.weight_v * mask).norm(dim=(0, 1), keepdim=True)
        ratio = torch.where(before > 0, after / before, 0)
        factors = {module.weight_v: mask | (after == 0), module.weight_g: ratio}
    for parameter, factor in factors.items():
        parameter.mul_(factor)
    return factors
