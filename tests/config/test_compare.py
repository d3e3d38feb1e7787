"""The students of examples/compare: what its script scales down composes, and costs what it says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fairseq")

from s3distill.encoder.config import EncoderConfig, parse_conv_layers, uniform_layers
from s3distill.gates import GateCounts, count_macs_per_second
from tests.config.test_students import compose, shape_of

FOLDER = Path(__file__).parents[2] / "examples" / "compare"
CONVS = parse_conv_layers("[(40, 10, 5)] + [(40, 3, 2)] * 4 + [(40, 2, 2)] * 2")
TEACHER = EncoderConfig(
    CONVS, 256, uniform_layers(6, 8, 32, 1024), layer_norm_first=True, pos_conv_kernel=32, pos_conv_groups=16
)  # the quickstart's


def sourced(command: str) -> list[str]:
    script = f"source {FOLDER}/students.sh; {command}"
    return subprocess.run(["bash", "-euc", script], check=True, capture_output=True, text=True).stdout.split("\n")[:-1]


STUDENTS = sourced('printf "%s\\n" $ALL_STUDENTS')


@pytest.mark.parametrize("name", [name for name in STUDENTS if name != "dphubert"])
def test_a_student_composes_at_about_the_same_macs(name: str) -> None:
    overrides = sourced(f'shape_of {name}; printf "%s\\n" "${{shape[@]}}"')
    config = shape_of(compose("student", f"student={name}", *overrides).model, TEACHER)
    assert 124e6 < count_macs_per_second(config, GateCounts.full(config)) < 133e6


def test_an_unknown_student_is_refused() -> None:
    done = subprocess.run(
        ["bash", "-c", f"source {FOLDER}/students.sh; shape_of nobody"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no student nobody; there are distilhubert" in done.stderr
    usage = subprocess.run([FOLDER / "run.sh", "--help"], capture_output=True, text=True)
    assert usage.returncode == 2 and "usage: [OPTION=...] examples/compare/run.sh" in usage.stderr
