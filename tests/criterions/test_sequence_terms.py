"""Options of n-best training that would do nothing are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fairseq")

from s3distill.criterions._sequence_terms import check_sequence_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_beta": 1.0}, r"`criterion\.seq_beta` is about criterion\.seq_kd=ranked, but is 1\.0 beside seq_kd=none"),
        ({"seq_kd": "uniform", "seq_beta": 1.0}, r"`criterion\.seq_beta` is about .* beside seq_kd=uniform"),
        ({"gold_weight": 0.5}, r"`criterion\.gold_weight` is the share .* but is 0\.5 where criterion\.seq_kd=none"),
        ({"seq_kd": "ranked", "gold_weight": 1.0}, r"`criterion\.gold_weight`=1 leaves nothing to the n-best lists"),
        ({"seq_kd": "ranked", "gold_weight": float("nan")}, r"must be in \[0, 1\], but is nan"),
    ],
)
def test_idle_options(options: dict[str, Any], message: str) -> None:
    cfg = SimpleNamespace(**{"seq_kd": "none", "seq_beta": 2.0, "gold_weight": 0.0, "alpha": 1.0, **options})
    with pytest.raises(ValueError, match=message):
        check_sequence_options(cfg, cfg.seq_kd != "none")


def test_options_that_act_are_taken() -> None:
    check_sequence_options(SimpleNamespace(seq_kd="none", seq_beta=2.0, gold_weight=0.0, alpha=0.0), False)
    check_sequence_options(SimpleNamespace(seq_kd="ranked", seq_beta=1.0, gold_weight=0.5, alpha=1.0), True)
