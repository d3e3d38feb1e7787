"""Two Gloo ranks on CPU train stage 1 as one rank does with the same total batch, and resume."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.speech_model import SpeechModel
from s3distill.pruning.compact import load_gates

MAX_UPDATE = 8
TOLERANCE = 1e-4  # of the difference's norm over the parameter's norm; measured: 2e-6
OPTIONS = (
    "optimizer.gate_lr=1.0",
    "optimizer.multiplier_lr=1.0",
    "criterion.target_sparsity=0.5",
    "criterion.sparsity_warmup=2",
    "lr_scheduler.end_learning_rate=0.0005",
    "checkpoint.save_interval_updates=3",
)


def train(kit: Any, corpus: Path, out: Path, *overrides: str, num_ranks: int = 1) -> dict[str, Any]:
    """Trains and returns the checkpoint."""
    command = kit.stage1_command(out, f"task.data={corpus}", *OPTIONS, *overrides, max_update=MAX_UPDATE)
    started = [kit.commands.start(*command)] if num_ranks == 1 else kit.start_ranks(command, num_ranks)
    for rank in started:
        rank.wait()
    for rank in started:
        rank.succeeded()
    return compat.load_checkpoint(kit.last_checkpoint(out))


def assert_same_student(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["optimizer_history"][-1]["num_updates"] == theirs["optimizer_history"][-1]["num_updates"] == MAX_UPDATE
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in theirs["model"].items():
        difference = ours["model"][name] - value
        if name.endswith("k_proj.bias"):
            # softmax does not see a key bias, so its gradient is rounding noise, which Adam scales to full steps
            assert difference.abs().max() <= 2 * 0.001 * MAX_UPDATE
        else:
            # at most, since the final LayerNorm of a pre-LN student is not matched and stays as it was
            assert difference.norm() <= TOLERANCE * value.norm(), (
                f"{name} deviates by {difference.norm() / value.norm():.1e}"
            )
    students = [parse_checkpoint(state) for state in (ours, theirs)]
    assert load_gates(students[0], "ours").kept_counts() == load_gates(students[1], "theirs").kept_counts()
    torch.manual_seed(0)
    waveforms = torch.randn(2, 8000)
    outputs = [SpeechModel(student)(waveforms, torch.tensor([8000, 6000])).x[0] for student in students]
    assert (outputs[0] - outputs[1]).norm() / outputs[1].norm() <= TOLERANCE


def assert_gates_moved(state: dict[str, Any]) -> None:
    kept = load_gates(parse_checkpoint(state), "the student").kept_units()
    assert sum(kept["ffn"]) < 3 * 64, kept


@pytest.fixture(scope="module")
def ragged(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """12 utterances in three batches: in every second update of two ranks the second rank has nothing to do."""
    folder = tmp_path_factory.mktemp("ragged")
    corpus = kit.write_corpus(folder / "data", num_train=12, num_valid=3)
    return corpus, train(kit, corpus, folder / "two", num_ranks=2)


def test_two_ranks_match_one_rank_with_the_same_batch(kit: Any, tmp_path: Path) -> None:
    corpus = kit.write_corpus(tmp_path / "data", num_train=8, num_valid=3)
    lengths = sorted(int(line.split("\t")[1]) for line in (corpus / "train.tsv").read_text().splitlines()[1:])
    assert sum(lengths[4:]) > 1.2 * sum(lengths[:4]), "the ranks must have different numbers of frames"
    one = train(kit, corpus, tmp_path / "one", "dataset.batch_size=8")
    two = train(kit, corpus, tmp_path / "two", "dataset.batch_size=4", num_ranks=2)
    assert_gates_moved(one)
    assert_same_student(two, one)


def test_two_ranks_match_accumulated_gradients(kit: Any, ragged: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    corpus, two = ragged
    accumulated = train(kit, corpus, tmp_path / "one", "optimization.update_freq=[2]")
    assert_gates_moved(accumulated)
    assert_same_student(two, accumulated)


def test_two_ranks_resume(kit: Any, ragged: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    corpus, uninterrupted = ragged
    command = kit.stage1_command(tmp_path, f"task.data={corpus}", *OPTIONS, max_update=MAX_UPDATE)
    ranks = kit.start_ranks(command)
    ranks[0].wait_until(lambda: re.search(r'"num_updates": "4"', ranks[0].output) is not None)
    for rank in ranks:
        rank.kill()
    resumed = train(kit, corpus, tmp_path, num_ranks=2)
    assert resumed["optimizer_history"][-1]["num_updates"] == MAX_UPDATE
    for name, value in uninterrupted["model"].items():
        assert torch.equal(resumed["model"][name], value), name
