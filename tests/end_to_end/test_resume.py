"""Stage 1 that is killed and started again ends exactly where an uninterrupted run ends."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.pruning.compact import load_gates

MAX_UPDATE = 22

# 24 utterances in batches of 4: six batches an epoch, so a checkpoint at update 5, 10, ... lies inside of an epoch
COMMON = (
    "optimizer.gate_lr=1.0",
    "optimizer.multiplier_lr=1.0",
    "criterion.target_sparsity=0.5",
    "checkpoint.save_interval_updates=5",
)
PADDED = (*COMMON, "dataset.validate_interval_updates=4")
CROPPED = (
    *COMMON,
    "task.enable_padding=false",
    "task.max_sample_size=12000",
    "dataset.batch_size=2",
    "optimization.update_freq=[2]",
    "model.dropout=0.1",
    "model.attention_dropout=0.1",
    "model.activation_dropout=0.1",
    "model.dropout_input=0.1",
    "model.encoder_layerdrop=0.2",
    "model.head_sharing=own",
    "criterion.cosine_type=log_sig",
)


def last_update(output: str) -> int:
    """The last update in a log."""
    return max(map(int, re.findall(r'train_inner\]\[INFO\] - .*"num_updates": "(\d+)"', output)), default=0)


def state_of(kit: Any, out: Path) -> dict[str, Any]:
    return compat.load_checkpoint(kit.last_checkpoint(out))


def assert_equal_runs(run: dict[str, Any], reference: dict[str, Any]) -> None:
    """Weights, heads, gates, multipliers, optimizer and schedule, bit for bit."""
    assert run["model"].keys() == reference["model"].keys()
    for name, value in reference["model"].items():
        assert torch.equal(run["model"][name], value), f"{name} differs by {(run['model'][name] - value).abs().max()}"
    assert run["optimizer_history"][-1] == reference["optimizer_history"][-1]
    ours, theirs = run["last_optimizer_state"], reference["last_optimizer_state"]
    for group, expected in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {k: v for k, v in group.items() if k != "step"} == {k: v for k, v in expected.items() if k != "step"}
    for index, values in theirs["state"].items():
        for name, value in values.items():
            assert torch.equal(ours["state"][index][name], value), f"{name} of parameter {index}"


def assert_something_was_learnt(kit: Any, state: dict[str, Any]) -> None:
    """Gates closed, multipliers and weights moved: equality of two runs that did nothing would prove nothing."""
    student = parse_checkpoint(state)
    kept = load_gates(student, "the student").kept_units()
    assert kept["ffn"] != (64, 64, 64) and kept["conv"] != (16,) * 7, kept
    assert state["model"]["lagrangian.lambda1"] != 0 and state["model"]["lagrangian.lambda2"] != 0
    start = compat.load_checkpoint(kit.teacher)["model"]
    assert all(not torch.equal(state["model"][name], start[name]) for name in start if "fc1" in name)


@pytest.fixture(scope="module", params=[PADDED, CROPPED], ids=["padded", "cropped, dropout"])
def options(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(kit: Any, options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("uninterrupted")
    kit.stage1(out, *options, max_update=MAX_UPDATE).succeeded()
    state = state_of(kit, out)
    assert_something_was_learnt(kit, state)
    return state


def test_killed_run_resumes_to_the_same_end(
    kit: Any, options: tuple[str, ...], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    saved = 10 if options is PADDED else 5
    command = kit.start_stage1(tmp_path, *options, max_update=MAX_UPDATE)
    command.wait_until(lambda: last_update(command.output) > saved + 1)
    command.kill()
    at_kill = state_of(kit, tmp_path)["optimizer_history"][-1]["num_updates"]
    assert saved <= at_kill < MAX_UPDATE

    resumed = kit.stage1(tmp_path, *options, max_update=MAX_UPDATE).succeeded()
    assert f"@ {at_kill} updates)" in resumed.output, "it did not load the checkpoint"
    assert_equal_runs(state_of(kit, tmp_path), uninterrupted)


def test_another_seed_ends_elsewhere(
    kit: Any, options: tuple[str, ...], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    kit.stage1(tmp_path, *options, "common.seed=2", max_update=MAX_UPDATE).succeeded()
    with pytest.raises(AssertionError, match="differs by"):
        assert_equal_runs(state_of(kit, tmp_path), uninterrupted)


def test_killed_while_it_writes_a_checkpoint(
    kit: Any, options: tuple[str, ...], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    # a pipe under the name that update 10's checkpoint (in epoch 2) is written to holds the command inside of the write
    torn = tmp_path / "checkpoints" / "checkpoint_2_10.pt.tmp"
    torn.parent.mkdir(parents=True)
    os.mkfifo(torn)
    command = kit.start_stage1(tmp_path, *options, max_update=MAX_UPDATE)
    with torn.open("rb") as pipe:
        beginning = pipe.read(20_000)
        command.kill()
    torn.unlink()
    assert beginning[:2] == b"PK"
    for name in (torn.name, "checkpoint_last.pt.tmp"):  # what a kill leaves behind, also in the middle of the copy
        torn.with_name(name).write_bytes(beginning)
    assert state_of(kit, tmp_path)["optimizer_history"][-1]["num_updates"] == 5

    kit.stage1(tmp_path, *options, max_update=MAX_UPDATE).succeeded()
    assert_equal_runs(state_of(kit, tmp_path), uninterrupted)
    assert not list(torn.parent.glob("*.tmp"))


def test_copy_that_fails_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fairseq.file_io import PathManager

    compat.install()
    new, last = tmp_path / "checkpoint_1_2.pt", tmp_path / "checkpoint_last.pt"
    new.write_bytes(b"new" * 1000)
    last.write_bytes(b"old" * 1000)

    def torn_copy(source: str, target: str, *_: object, **__: object) -> None:
        Path(target).write_bytes(b"new")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", torn_copy)
        patch.setattr(shutil, "copy", torn_copy)
        with pytest.raises(OSError, match="No space left"):
            PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_bytes() == b"old" * 1000
    PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_bytes() == b"new" * 1000
