"""What a student's size is counted by: parameters, MACs, or the latency of a table that its options name."""

from pathlib import Path
from typing import Any

from s3distill.encoder.config import EncoderConfig
from s3distill.gates import LatencyTable
from s3distill.gates.cost import Measure


def measure_of(cfg: Any, config: EncoderConfig) -> Measure:
    """``cfg.prune_measure``, or the table of ``cfg.latency``.

    Raises:
        ValueError: latency without a table, a table without latency, or one of another encoder.
    """
    if str(cfg.prune_measure) != "latency":
        if cfg.latency_table:
            raise ValueError(
                f"`model.latency_table` acts with model.prune_measure=latency only, which is {cfg.prune_measure}; set it, or leave the "
                "table out"
            )
        return str(cfg.prune_measure)
    if not cfg.prune_units:
        raise ValueError(
            "model.prune_measure=latency needs gates; pass e.g. model.prune_units=[conv,head,ffn,width,pos_conv]"
        )
    if not cfg.latency:
        raise ValueError(
            "model.prune_measure=latency needs a table of this machine; run `s3distill latency-table STUDENT.pt -o table.json` and pass "
            "model.latency_table=table.json"
        )
    table = LatencyTable.from_json(cfg.latency, cfg.latency_table or "the latency table of the checkpoint")
    table.check_config(config)
    return table


def read_table(path: str) -> LatencyTable:
    """Raises ValueError where there is no readable table at ``path``."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ValueError(f"model.latency_table cannot be read: {error}") from error
    return LatencyTable.from_json(text, path)
