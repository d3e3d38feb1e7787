"""benchmarks/decode.py runs through on made-up log-probabilities and writes what it says; what it measures is not looked at."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "decode.py"


def test_a_small_run(tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    options = ["--small", "--repeats", "1", "--threads", "1", "--beam", "20", "--check", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(file.read_text())
    assert values["beam"] == 20 and values["environment"]["threads"] == 1
    forms = ["greedy", "prefix beam search, beam 20", "the same, symbols within 12 nats"]
    checks = ["the threshold changes no text"]
    if importlib.util.find_spec("flashlight"):
        forms.append("flashlight lexicon-free, beam 20")
        checks.append("texts at least as probable as flashlight's")
    assert [row["form"] for row in values["rows"]] == forms and all(row["seconds"] > 0 for row in values["rows"])
    assert sorted(values["checks"]) == sorted(checks) and all(values["checks"].values())
    assert all(form in done.stdout for form in [*forms, *checks]) and "repeat 1 of 1: greedy:" in done.stderr


def test_what_to_decode_must_be_said(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(BENCHMARK)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--model and --manifest say what is decoded; or pass --small" in done.stderr
