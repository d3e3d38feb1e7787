"""The scripts beside examples/forgetting/run.sh: one dictionary of two, and the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "forgetting"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLE / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_one_dictionary_of_two(tmp_path: Path) -> None:
    for name, lines in (("a", "| 5\nE 3\nX 1\n"), ("b", "| 4\nIJ 2\nE 1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dict.ltr.txt").write_text(lines)
    assert "4 letters" in run("shared_dictionary.py", tmp_path / "dict", tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "dict" / "dict.ltr.txt").read_text() == "| 9\nE 4\nIJ 2\nX 1\n"


def test_the_table_says_what_was_decoded(tmp_path: Path) -> None:
    error_rates = {
        **{"before/a": 10.0, "before/b": 90.0, "plain/a": 60.0, "plain/b": 20.0, "ewc_0.1/a": 15.0, "ewc_0.1/b": 25.0},
        **{"tac_1/a": 30.0, "tac_1/b": 21.0, "tac_1/old_head": 12.0, "mask/b": 40.0},
    }
    for name, wer in error_rates.items():
        (tmp_path / "decode" / name).mkdir(parents=True)
        scores = {"wer": wer, "uer": wer / 10, "word": {"num_reference": 264 if name.endswith("a") else 256}}
        (tmp_path / "decode" / name / "scores-test.json").write_text(json.dumps(scores))
    printed = run("table.py", tmp_path, "test", "plain", "ewc_0.1", "tac_1", "mask")
    assert printed == (tmp_path / "table.md").read_text()
    assert printed.splitlines()[2:] == [
        "| nothing yet (the model of A) | 10.00 | 1.00 | 90.00 | 9.00 |",
        "| plain fine-tuning | 60.00 | 6.00 | 20.00 | 2.00 |",
        "| EWC, lambda 0.1 | 15.00 | 1.50 | 25.00 | 2.50 |",
        "| task alignment, gamma 1 | 30.00 | 3.00 | 21.00 | 2.10 |",
        "| task alignment, gamma 1, A by its old head | 12.00 | 1.20 | 21.00 | 2.10 |",
        "| a mask for B (A keeps its model) | 10.00 | 1.00 | 40.00 | 4.00 |",
        "",
        "Test words: 264 of A, 256 of B.",
    ]
