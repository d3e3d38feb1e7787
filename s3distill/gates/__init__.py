"""L0 gates: what is open, what it costs, and the pressure towards a target size."""

from s3distill.gates.cost import (
    MEASURES,
    breakdown,
    check_target,
    count_cost,
    count_macs_per_second,
    count_parameters,
    minimum_counts,
    minimum_parameters,
    sparsity,
)
from s3distill.gates.counts import UNITS, GateCounts
from s3distill.gates.gate_set import GateSet
from s3distill.gates.hard_concrete import HardConcrete
from s3distill.gates.lagrangian import Lagrangian, target_at
from s3distill.gates.latency import LatencyTable
from s3distill.gates.values import GateValues

__all__ = [
    "MEASURES",
    "UNITS",
    "GateCounts",
    "GateSet",
    "GateValues",
    "HardConcrete",
    "Lagrangian",
    "LatencyTable",
    "breakdown",
    "check_target",
    "count_cost",
    "count_macs_per_second",
    "count_parameters",
    "minimum_counts",
    "minimum_parameters",
    "sparsity",
    "target_at",
]
