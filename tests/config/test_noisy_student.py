"""The loop of examples/noisy_student with stand-ins for its commands: who teaches whom, and when it stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "noisy_student" / "run.sh"

# Every stand-in notes its arguments; the decoder gives each model the WER that the test has for it.
STAND_IN = """#!{python}
import json, os, pathlib, sys
name, argv, work = pathlib.Path(sys.argv[0]).name, sys.argv[1:], pathlib.Path({work!r})
value = lambda option: next(a.split("=", 1)[1] for a in argv if a.startswith(option + "="))
after = lambda option: argv[argv.index(option) + 1]
with open(work / "calls.jsonl", "a") as stream:
    print(json.dumps([name, *argv]), file=stream)
if name == "fairseq-hydra-train":
    folder = pathlib.Path(value("hydra.run.dir"), "checkpoints")
    folder.mkdir(parents=True)
    (folder / "checkpoint_last.pt").touch()
elif name == "fairseq-generate":
    folder = pathlib.Path(after("--results-path"))
    folder.mkdir(parents=True, exist_ok=True)
    wers = json.loads((work / "wers.json").read_text())
    (folder / f"scores-{{after('--gen-subset')}}.json").write_text(json.dumps({{"wer": wers[folder.parent.name]}}))
elif name == "python" and not argv[0].endswith("copy_split.py"):
    os.execv(sys.executable, [sys.executable, *argv])
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name in ("s3distill", "fairseq-hydra-train", "fairseq-generate", "python"):
        (tmp_path / "bin" / name).write_text(STAND_IN.format(python=sys.executable, work=str(tmp_path)))
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(work: Path, wers: dict[str, float], **options: str) -> tuple[str, list[list[str]]]:
    """Output, and the commands that were called."""
    (work / "wers.json").write_text(json.dumps(wers))
    (work / "calls.jsonl").write_text("")
    environment = {
        **os.environ,
        "PATH": f"{work / 'bin'}:{os.environ['PATH']}",
        **{"TEACHER": "first.pt", "DATA": "some/data", "OUT": str(work / "out"), **options},
    }
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads(line) for line in (work / "calls.jsonl").read_text().splitlines()]


def teachers(calls: list[list[str]]) -> list[str]:
    return [call[call.index("--teacher") + 1] for call in calls if call[0] == "s3distill"]


def last(work: Path, name: str) -> str:
    return str(work / "out" / name / "checkpoints" / "checkpoint_last.pt")


def test_students_teach_until_they_gain_too_little(work: Path) -> None:
    wers = {"teacher": 30.0, "generation1": 25.0, "generation2": 24.95}
    output, calls = run(work, wers, GENERATIONS="5")
    assert teachers(calls) == ["first.pt", last(work, "generation1")]
    assert "[generation2] gained 0.05 points, less than MIN_GAIN=0.1: stop" in output
    assert f"the best model is {last(work, 'generation2')}" in output
    assert (work / "out" / "table.md").read_text().splitlines()[2:] == [
        "| teacher | 30.0 |",
        "| 1 | 25.0 |",
        "| 2 | 24.95 |",
    ]
    again, calls = run(work, wers, GENERATIONS="5")
    assert {call[0] for call in calls} == {"python"}, "what is done is not done again"
    assert again.endswith(output[output.index("| generation") :])


def test_a_worse_student_never_teaches(work: Path) -> None:
    output, calls = run(
        work, {"teacher": 30.0, "generation1": 31.0, "generation2": 29.0}, MIN_GAIN="-2", GENERATIONS="2"
    )
    assert teachers(calls)[:2] == ["first.pt", "first.pt"]
    assert f"the best model is {last(work, 'generation2')}" in output


def test_the_number_of_generations_is_a_limit(work: Path) -> None:
    wers = {"teacher": 30.0, "generation1": 20.0, "generation2": 10.0, "generation3": 0.0}
    output, calls = run(work, wers, GENERATIONS="2", NBEST="4", TEST="test", STUDENT="compact.pt")
    trainings = [call for call in calls if call[0] == "fairseq-hydra-train"]
    assert len(trainings) == 2
    assert all("++criterion.seq_kd=ranked" in t and "++model.student_path=compact.pt" in t for t in trainings)
    assert "WER on test: teacher 30.0 %, generation2 10.0 %" in output


def test_without_teacher_it_says_what_it_needs() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("TEACHER", "DATA")}
    usage = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert usage.returncode == 2 and usage.stderr.startswith("usage: TEACHER=FILE DATA=FOLDER")
