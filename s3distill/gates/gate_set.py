"""All gates of one student: what the encoder multiplies with, and what the cost model counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.variants import gate_owners
from s3distill.gates.counts import UNITS, Count, GateCounts, check_units, prunable_sizes, structure_sizes
from s3distill.gates.hard_concrete import HardConcrete, deterministic_gates, draw_noise, num_open
from s3distill.gates.values import GateValues

__all__ = ["MIN_OPEN", "UNITS", "GateSet"]

MIN_OPEN = {"conv": 1, "head": 0, "ffn": 0, "attention_layer": 0, "ffn_layer": 0}
"""A conv layer always keeps one channel: without any, no signal would reach the layers behind it."""

_POOLED = ("attention_layer", "ffn_layer")
"""Units with one gate per layer: their expected number is rounded over all layers, since each on its own would round to open."""

_VALUES_FIELD = {
    "conv": "conv",
    "head": "heads",
    "ffn": "ffn",
    "attention_layer": "attention_layers",
    "ffn_layer": "ffn_layers",
}


class GateSet(nn.Module):
    """Hard Concrete gates of a student, under the keys ``<unit>.<layer>.log_alpha``.

    Structures that the config says are not there (a removed sub-layer, an FFN of width 0) get no gate, so a pruned
    model can be pruned again. Layers that share parameters or an attention map have gates in common, under the number of the
    first of them.

    The default ``init_drop`` of 0.01 makes the expected sparsity of HuBERT Base 0.002 at the start, for every unit: the
    size target starts at 0 and the student at its teacher. Nearer to 1 the gates would fall asleep: a gate has a
    gradient from the distillation loss only while 0 < z < 1, which holds for 5% of the draws at 0.01 and for 0.5% at
    0.001. (DPHuBERT's 0.5 for FFN dims closes 17% of them at step 0.)

    Args:
        config: shape of the student before pruning.
        units: which structures are gated, of `UNITS`.
        init_drop: m of `HardConcrete`, one number for all units or one per unit (units left out take 0.01).
    Raises:
        ValueError: an unknown, repeated or missing unit; ``init_drop`` outside (0, 1); nothing to gate.
    """

    def __init__(
        self, config: EncoderConfig, units: Sequence[str], init_drop: float | Mapping[str, float] = 0.01
    ) -> None:
        super().__init__()
        check_units(units)
        if isinstance(init_drop, Mapping):
            check_units(tuple(init_drop))
        self.config = config
        self.units = tuple(unit for unit in UNITS if unit in units)
        sizes = prunable_sizes(config)
        for unit in self.units:
            drop = init_drop.get(unit, 0.01) if isinstance(init_drop, Mapping) else init_drop
            owners = self._owners(unit)
            gated = {str(i): HardConcrete(n, drop) for i, n in enumerate(sizes[unit]) if n > 0 and owners[i] == i}
            self.add_module(unit, nn.ModuleDict(gated))
        if not any(self.gates(unit) for unit in self.units):
            raise ValueError(
                f"the encoder has none of {', '.join(self.units)} left to prune; choose other units of "
                f"{', '.join(UNITS)}"
            )

    def _owners(self, unit: str) -> tuple[int, ...]:
        """Per conv or Transformer layer the one whose gates it has."""
        return gate_owners(self.config, unit) or tuple(range(len(structure_sizes(self.config)[unit])))

    def _spread(self, unit: str, layer: int) -> list[int]:
        """The layers that have the gates of ``layer``, itself among them."""
        return [i for i, owner in enumerate(self._owners(unit)) if owner == layer]

    def gates(self, unit: str) -> dict[int, HardConcrete]:
        """The gates of one unit by layer; empty if it is not gated."""
        modules = self._modules.get(unit)
        if modules is None:
            return {}
        assert isinstance(modules, nn.ModuleDict)
        return {int(layer): gate for layer, gate in modules.items() if isinstance(gate, HardConcrete)}

    def all_gates(self) -> Iterator[tuple[str, int, HardConcrete]]:
        """(unit, layer, gates) of every gate vector, always in the same order."""
        for unit in self.units:
            for layer, gate in self.gates(unit).items():
                yield unit, layer, gate

    @property
    def num_gates(self) -> int:
        return sum(gate.num_gates for _, _, gate in self.all_gates())

    def sample(self, seed: int) -> GateValues:
        """Training gates, differentiable.

        The noise comes from a CPU generator that ``seed`` alone decides: give the number of the update (mixed with the
            run's
        seed), and all ranks, all micro-batches of an update and a resumed run see the same gates.
        """
        generator = torch.Generator().manual_seed(seed)
        device = next(self.parameters()).device
        noise = draw_noise(self.num_gates, generator).to(device)  # all at once: one copy to the device
        parts = iter(torch.split(noise, [gate.num_gates for _, _, gate in self.all_gates()]))
        return self._values({(u, i): gate.sample(next(parts), MIN_OPEN[u]) for u, i, gate in self.all_gates()})

    def deterministic(self) -> GateValues:
        """Evaluation gates, without gradient; computed anew at each call, so they never go stale.

        Raises:
            RuntimeError: a gate location is NaN or infinite.
        """
        self._check_finite()
        values = {(u, i): gate.deterministic(MIN_OPEN[u]) for u, i, gate in self.all_gates() if u not in _POOLED}
        return self._values(values | self._pooled_values())

    def _pooled_values(self) -> dict[tuple[str, int], Tensor]:
        """Evaluation gates of the units with one gate per layer, rounded over all layers; each [1]."""
        values: dict[tuple[str, int], Tensor] = {}
        for unit in _POOLED:
            gates = self.gates(unit)
            if gates:
                pooled = deterministic_gates(torch.cat([gate.log_alpha for gate in gates.values()]), MIN_OPEN[unit])
                values |= {(unit, layer): value for layer, value in zip(gates, pooled.split(1), strict=True)}
        return values

    def expected_counts(self) -> GateCounts:
        """Expected open structures, float64 and differentiable; ungated structures count as they are.

        A conv layer counts at least 1, the channel that it always keeps: below, the size has no gradient.
        """
        counts: dict[str, list[Count]] = {unit: list(sizes) for unit, sizes in structure_sizes(self.config).items()}
        for unit, layer, gate in self.all_gates():
            expected = gate.expected_open()
            for i in self._spread(unit, layer):
                counts[unit][i] = expected.clamp_min(MIN_OPEN[unit]) if MIN_OPEN[unit] else expected
        return GateCounts(*(tuple(counts[unit]) for unit in UNITS))

    def kept_counts(self) -> GateCounts:
        """What is open under `deterministic` gates, whole numbers; its cost is that of the pruned model.

        Raises:
            RuntimeError: a gate location is NaN or infinite.
        """
        self._check_finite()
        kept = {unit: list(sizes) for unit, sizes in structure_sizes(self.config).items()}
        counted = {(u, i): num_open(g.log_alpha, MIN_OPEN[u]) for u, i, g in self.all_gates() if u not in _POOLED}
        counted |= {key: (value[0] > 0).double() for key, value in self._pooled_values().items()}
        for (unit, layer), count in zip(counted, torch.stack(list(counted.values())).tolist(), strict=True):
            for i in self._spread(unit, layer):
                kept[unit][i] = int(count)
        for inner, sub_layer in (("head", "attention_layer"), ("ffn", "ffn_layer")):
            kept[inner] = [count * there for count, there in zip(kept[inner], kept[sub_layer], strict=True)]
        return GateCounts(*(tuple(kept[unit]) for unit in UNITS))

    def kept_units(self) -> dict[str, tuple[int, ...]]:
        """`kept_counts` per layer of the gated units, for logs."""
        kept = self.kept_counts().as_dict()
        return {unit: tuple(int(count) for count in kept[unit]) for unit in self.units}

    def _values(self, gates: Mapping[tuple[str, int], Tensor]) -> GateValues:
        fields: dict[str, list[Tensor | None]] = {
            _VALUES_FIELD[unit]: [None] * len(sizes) for unit, sizes in structure_sizes(self.config).items()
        }
        for (unit, layer), value in gates.items():
            for i in self._spread(unit, layer):
                fields[_VALUES_FIELD[unit]][i] = value.squeeze(0) if unit.endswith("_layer") else value
        return GateValues(**{name: tuple(values) for name, values in fields.items()})

    def _check_finite(self) -> None:
        finite = torch.stack([gate.log_alpha.detach().isfinite().all() for _, _, gate in self.all_gates()])
        if not bool(finite.all()):
            names = [f"{u}.{i}" for (u, i, _), ok in zip(self.all_gates(), finite.tolist(), strict=True) if not ok]
            raise RuntimeError(
                f"the gates {', '.join(names)} hold NaN or infinite log_alpha: the training diverged; "
                "resume from an earlier checkpoint with a lower learning rate of gates or multipliers"
            )

    def extra_repr(self) -> str:
        return f"units={list(self.units)}, num_gates={self.num_gates}"
