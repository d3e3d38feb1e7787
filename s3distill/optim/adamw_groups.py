"""`adamw_groups`: AdamW whose gates and multipliers have learning rates of their own, on one schedule."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II

from s3distill import kernels


@dataclass
class AdamWGroupsConfig(FairseqDataclass):
    """Options of `adamw_groups`; the learning rate is ``optimization.lr``."""

    adam_betas: List[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"help": "AdamW's betas"})
    adam_eps: float = field(default=1e-8, metadata={"help": "AdamW's epsilon"})
    weight_decay: float = field(
        default=0.0, metadata={"help": "decoupled weight decay; never on gates and multipliers"}
    )
    gate_lr: float = field(
        default=0.02, metadata={"help": "peak learning rate of gates; it follows the schedule of `optimization.lr`"}
    )
    multiplier_lr: float = field(
        default=0.02, metadata={"help": "peak learning rate of the Lagrangian's multipliers (ascent)"}
    )
    lr: List[float] = II("optimization.lr")


@register_optimizer("adamw_groups", dataclass=AdamWGroupsConfig)
class AdamWGroups(FairseqOptimizer):
    """AdamW over the groups that parameters name in ``param.param_group`` (``gate``, ``multiplier``; all others: main).

    A group's learning rate is (schedule / optimization.lr) times its own peak, so all follow one warm-up and decay.
    Fused kernels are used where the device has them.
    """

    def __init__(self, cfg: AdamWGroupsConfig, params: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        peak = float(cfg.lr[0]) if len(cfg.lr) > 0 else 0.0
        if peak <= 0:
            raise ValueError(
                f"`optimization.lr` must be positive, but is {list(cfg.lr)}; pass e.g. optimization.lr=[0.0002]"
            )
        scales = {"main": 1.0, "gate": cfg.gate_lr / peak, "multiplier": cfg.multiplier_lr / peak}
        groups: dict[str, list[torch.nn.Parameter]] = {name: [] for name in scales}
        for parameter in params:
            name = getattr(parameter, "param_group", "main")
            groups[name if name in groups else "main"].append(parameter)
        self._optimizer = kernels.fused_adamw(
            [
                {
                    "params": members,
                    "lr": peak * scales[name],
                    "lr_scale": scales[name],
                    "weight_decay": cfg.weight_decay if name == "main" else 0.0,
                }
                for name, members in groups.items()
                if members
            ],
            lr=peak,
            betas=tuple(cfg.adam_betas),
            eps=cfg.adam_eps,
        )

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {"betas": tuple(self.cfg.adam_betas), "eps": self.cfg.adam_eps}

    @property
    def supports_flat_params(self) -> bool:
        return False  # one flat fp16 buffer would lose the groups

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        return False  # torch would keep the second moments of half parameters in half, where they underflow

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        """Takes moments and steps from the checkpoint, but every option from the command line, so that a resumed run can change them."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict, optimizer_overrides)
        for group, own in zip(self.param_groups, options, strict=True):
            group.update({k: own[k] for k in ("lr_scale", "weight_decay", "betas", "eps") if k in own})

    def get_lr(self) -> float:
        group = self.param_groups[0]
        return float(group["lr"] / group["lr_scale"]) if group["lr_scale"] else 0.0

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> torch.Tensor:
        if aggregate_norm_fn is not None:  # sharded parameters: fairseq gathers the norm over ranks
            return super().clip_grad_norm(max_norm, aggregate_norm_fn)
        return kernels.clip_grad_norm(self.params, max_norm if max_norm > 0 else math.inf)
