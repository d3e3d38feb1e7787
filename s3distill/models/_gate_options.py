"""The options of L0 gates, in common to all students that can have them."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass, field
from typing import List, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from s3distill.gates import MEASURES, UNITS


@dataclass
class GateOptions(FairseqDataclass):
    """What has gates, and what its size is counted by and relative to; see `GateSet`."""

    prune_units: List[str] = field(
        default_factory=list,
        metadata={"help": f"structures with L0 gates, of {', '.join(UNITS)}; empty: nothing is pruned"},
    )
    prune_measure: ChoiceEnum([*MEASURES, "latency"]) = field(  # type: ignore[valid-type]
        default="params",
        metadata={
            "help": "what sparsity counts: parameters, MACs per second of audio, or latency (model.latency_table)"
        },
    )
    latency_table: Optional[str] = field(
        default=None,
        metadata={
            "help": "of prune_measure=latency: what `s3distill latency-table` wrote for student_path on the target machine"
        },
    )
    latency: Optional[str] = field(
        default=None,
        metadata={"help": "that table as JSON; filled in when training starts, so that checkpoints rebuild alone"},
    )
    gate_init_drop: float = field(default=0.01, metadata={"help": "probability that a gate is closed at the start"})
    reference_cost: float = field(
        default=0.0,
        metadata={
            "help": "cost that sparsity is relative to; 0: the task's teacher's, else the student's own (of latency, that of the table)"
        },
    )
