"""The quickstart's whole chain with a few updates per step, interrupted once and started again."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import s3distill
from s3distill.gates import GateCounts, count_parameters

STEPS = ["demo-data", "teacher", "stage1", "prune", "stage2", "finetune", "decode-teacher", "decode-student"]


@pytest.fixture(scope="module")
def finished(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder and what the second start printed: the first was killed behind the second step."""
    pytest.importorskip("espeakng_loader")
    out = tmp_path_factory.mktemp("quick start")  # a folder with a space
    first = kit.commands.start("s3distill", "quickstart", "--smoke", "--out", out)
    first.wait_until((out / "done" / "stage1.json").exists)  # written when the step begins
    first.kill()
    assert not (out / "results.json").exists() and not (out / "report.html").exists()
    second = kit.commands.run("s3distill", "quickstart", "--smoke", "--out", out).succeeded()
    return out, second.output


def test_it_goes_on_behind_the_last_step_that_was_done(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert sorted(path.stem for path in (out / "done").iterdir()) == sorted(STEPS)
    assert printed.count("done before") == 2
    assert [int(n) for n in re.findall(r"^\[(\d)/8\]", printed, flags=re.MULTILINE)] == list(range(1, 9))


def test_every_command_is_shown(finished: tuple[Path, str]) -> None:
    _, printed = finished
    commands = [
        line.split()[0] for line in printed.splitlines() if line.startswith("    ") and "common.user_dir" in line
    ]
    assert commands == ["fairseq-hydra-train"] * 4
    assert len(re.findall(r"^    fairseq-generate .* --user-dir ", printed, flags=re.MULTILINE)) == 2
    assert "SYNTHETIC" in printed


def test_results(finished: tuple[Path, str]) -> None:
    out, _ = finished
    results = json.loads((out / "results.json").read_text())
    products = {"teacher": "teacher", "student": "finetune"}
    for name, step in products.items():
        path = out / step / "checkpoints" / "checkpoint_last.pt"
        model = s3distill.load(path)
        values = results[name]
        config = model.encoder.config
        assert values["checkpoint_bytes"] == path.stat().st_size
        assert values["params"] >= count_parameters(config, GateCounts.full(config)) > 1_000_000
        assert values["macs_per_second"] > 1e8 and 0 < values["rtf"] < 1
        assert 0 <= values["wer"] < 1000 and math.isfinite(values["wer"])
        assert model.symbols is not None and model.head is not None
    assert results["student"]["params"] < results["teacher"]["params"]
    assert results["student"]["macs_per_second"] < results["teacher"]["macs_per_second"]
    assert 0.3 < results["speedup"] < 3
    assert set(results["seconds"]) == set(STEPS)


def test_report_is_one_file_that_opens_offline(finished: tuple[Path, str]) -> None:
    out, _ = finished
    report = (out / "report.html").read_text()
    results = json.loads((out / "results.json").read_text())
    assert report.lstrip().lower().startswith("<!doctype html>")
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#|data:)", report), "it reads another file"
    assert "<img" in report or "<svg" in report
    for name in ("teacher", "student"):
        assert f"<td>{results[name]['params'] / 1e6:.3f}</td>" in report
    assert all(heading in report for heading in ("Kept units per layer", "Sparsity", "Loss of stage stage1"))
    assert "synthetic" in report.lower()
    assert "fairseq-hydra-train" in report


def test_a_finished_run_does_nothing_again(kit: Any, finished: tuple[Path, str]) -> None:
    out, _ = finished
    checkpoints = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    before = json.loads((out / "results.json").read_text())
    command = kit.commands.run("s3distill", "quickstart", "--smoke", "--out", out).succeeded()
    assert command.output.count("done before") == len(STEPS)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")} == checkpoints
    after = json.loads((out / "results.json").read_text())
    for name in ("teacher", "student"):
        assert {k: v for k, v in after[name].items() if k != "rtf"} == {
            k: v for k, v in before[name].items() if k != "rtf"
        }
    assert after["seconds"] == before["seconds"]
    assert after["wall_clock_s"] >= sum(after["seconds"].values()), "the time of the chain, not of this call"
