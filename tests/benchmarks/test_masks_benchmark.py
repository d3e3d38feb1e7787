"""benchmarks/masks.py runs through on a toy and writes what it says; what it measures is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "masks.py"
FORMS = {
    "dense, all weights learn",
    "masks on all linears",
    "masks on the FFN",
    "sort per forward, all linears",
    "sort per forward, FFN",
}
LIMITS = {
    **{"training step, update_freq 1": 1.15, "training step, update_freq 4": 1.05, "evaluation, forward": 1.02},
    "switching the language": 1.0,
}


def test_a_small_run(tmp_path: Path) -> None:
    file = tmp_path / "masks.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--small", "--repeats", "2", "--threads", "1", "--check", "--json", str(file)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    # a toy need not have the ratios of a model, but with --check the status says what the table says
    assert done.returncode == int("FAIL" in done.stdout), done.stderr
    assert "repeat 1 of 2: masks on all linears:" in done.stderr  # progress
    values = json.loads(file.read_text())
    assert set(values) == {"environment", "rows", "checks"}
    assert values["environment"]["threads"] == 1 and values["environment"]["small"] is True

    assert len(values["checks"]) == 10 and all(values["checks"].values()), values["checks"]

    sections: dict[str, dict[str, dict[str, object]]] = {}
    for row in values["rows"]:
        assert set(row) == {"section", "form", "value", "unit", "ratio", "limit", "passed"}
        assert row["value"] > 0 and (row["limit"] is None) == (row["passed"] is None)
        sections.setdefault(row["section"], {})[row["form"]] = row
        assert row["section"] in done.stdout and row["form"] in done.stdout
    assert list(sections) == [
        "one mask of 256 x 512",
        *LIMITS,
        "peak memory of training at update_freq 1, resident, libraries included",
    ]
    for name, limit in LIMITS.items():
        assert {row["limit"] for row in sections[name].values()} == {limit, None}
    steps = [rows for name, rows in sections.items() if "update_freq" in name]
    assert len(steps) == 3 and all(set(rows) == FORMS for rows in steps)
