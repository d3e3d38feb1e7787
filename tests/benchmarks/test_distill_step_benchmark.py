"""benchmarks/distill_step.py runs through on a toy and writes what it says; its floor is that of the counted FLOPs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from s3distill.gates import count_cost

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("distill_step", FOLDER / "distill_step.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["distill_step"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def test_a_small_run(tmp_path: Path) -> None:
    file = tmp_path / "distill_step.json"
    done = subprocess.run(
        [
            *(sys.executable, str(FOLDER / "distill_step.py"), "--small", "--repeats", "2", "--threads", "1"),
            *("--check", "--json", str(file)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    # a toy need not be as fast as a model's limits want, but with --check the status says what the table says
    assert done.returncode == int("FAIL" in done.stdout), done.stderr
    values = json.loads(file.read_text())
    assert values["environment"]["threads"] == 1 and values["environment"]["small"] is True
    sections: dict[str, dict[str, dict]] = {}
    for row in values["rows"]:
        assert row["value"] > 0 and (row["limit"] is None) == (row["passed"] is None)
        sections.setdefault(row["section"], {})[row["form"]] = row
        assert row["section"] in done.stdout and row["form"] in done.stdout
    variants = {f"stage {stage}, {what}" for stage in (1, 2) for what in ("float32", "teacher bf16")}
    variants |= {f"stage {stage}, teacher bf16, student autocast" for stage in (1, 2)}
    updates, floors = sections["one update"], sections["floor of its matmuls"]
    assert set(updates) == set(floors) == variants
    for name, row in updates.items():
        assert set(row["parts"]) == {"teacher", "student forward", "backward", "optimizer"}
        assert sum(row["parts"].values()) == pytest.approx(row["value"])
        over = sections["one update over its floor"][name]
        assert over["limit"] == 1.3 and over["value"] == pytest.approx(row["value"] / floors[name]["value"])
    assert [name for name, row in updates.items() if row["limit"] is not None] == [
        "stage 1, teacher bf16",
        "stage 1, teacher bf16, student autocast",
    ]


def test_floors_count_the_flops_that_are_run(benchmark: ModuleType) -> None:
    """Against torch's own counter, which counts the weights' gradient of a grouped conv as that of a full one: so one group."""
    settings = benchmark.Settings(small=True)
    config = dataclasses.replace(settings.student_config(1), pos_conv_groups=1)
    encoder, audio = benchmark.SpeechEncoder(config), torch.randn(benchmark.BATCH, settings.num_samples)
    with FlopCounterMode(display=False) as forward, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = encoder(audio)
    expected = benchmark.num_flops(config, settings.num_samples / benchmark.SAMPLE_RATE)
    assert forward.get_total_flops() == pytest.approx(expected, rel=1e-3)
    with FlopCounterMode(display=False) as backward:
        out.x.square().sum().backward()
    total = benchmark.num_flops(config, settings.num_samples / benchmark.SAMPLE_RATE, backward=True)
    assert forward.get_total_flops() + backward.get_total_flops() == pytest.approx(total, rel=1e-3)


def test_limits_are_scaled_by_the_floor(benchmark: ModuleType) -> None:
    settings = benchmark.Settings()
    variant = benchmark.VARIANTS[1]
    here = benchmark.floor_seconds(variant, settings, benchmark.REFERENCE_RATES)
    assert 1.8 < here < 2.2, "111 GFLOP of the teacher at 430 GFLOP/s, 333 of the student at 192"
    taken = benchmark.StepSeconds({"teacher": 1.0}, 1.0)
    half = {name: rate / 2 for name, rate in benchmark.REFERENCE_RATES.items()}
    rows = benchmark.step_rows(settings, {variant: taken}, {variant: 1.0}, half)
    (update,) = [row for row in rows if row.section == "one update"]
    assert update.limit == pytest.approx(2 * 2.6)


def test_compact_students_have_the_size_that_is_said(benchmark: ModuleType) -> None:
    settings = benchmark.Settings()
    stage2 = settings.student_config(2)
    assert count_cost(stage2, None, "params") == pytest.approx(23.4e6, rel=0.02)
    quarter = settings.compact_config(benchmark.QUARTER_CONVS, benchmark.QUARTER_HEADS, benchmark.QUARTER_FFN)
    share = benchmark.num_flops(quarter, 4.0) / benchmark.num_flops(settings.teacher_config(), 4.0)
    assert share == pytest.approx(0.25, abs=0.003)
