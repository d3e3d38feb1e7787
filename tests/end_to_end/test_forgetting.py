"""Learning without forgetting through the real commands: EWC, task alignment, replay, resuming, the old task's recogniser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

import s3distill
from s3distill import compat
from s3distill.cli.main import main
from tests.models import ctc_models


@pytest.fixture(scope="module")
def folder(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of the old and of the new task, the old recogniser and its Fisher information."""
    folder = tmp_path_factory.mktemp("forgetting")
    kit.write_corpus(folder / "old", num_train=6, num_valid=2, seed=2)
    kit.write_corpus(folder / "new", num_train=8, num_valid=2)
    ctc_models.write_ctc(folder / "old.pt")
    arguments = [folder / "old.pt", folder / "old" / "train.tsv", "-o", folder / "old.safetensors"]
    assert main(["fisher", *map(str, arguments)]) == 0
    return folder


def command(folder: Path, out: Path, *overrides: str, max_update: int = 6) -> list[str]:
    options = {
        **{"hydra.run.dir": out, "task.data": folder / "new", "task.normalize": "false"},
        **{"model.student_path": folder / "old.pt", "optimization.max_update": max_update, "dataset.batch_size": "4"},
        **{"dataset.validate_after_updates": "0", "common.log_interval": "1", "optimization.lr": "[0.01]"},
        **{"lr_scheduler.phase_ratio": "null", "++lr_scheduler.hold_steps": "8", "++lr_scheduler.decay_steps": "1"},
    }
    head = ["fairseq-hydra-train", "--config-dir", "config/forgetting", "--config-name", "demo"]
    return [*head, *(f"{key}={value}" for key, value in options.items()), *overrides]


def both(folder: Path, ewc_lambda: float = 0.01) -> list[str]:
    return [
        *(f"criterion.ewc_paths=[{folder / 'old.safetensors'}]", f"criterion.ewc_lambda={ewc_lambda}"),
        *(f"criterion.old_model_paths=[{folder / 'old.pt'}]", "criterion.tac_gamma=0.5"),
    ]


def decode(kit: Any, data: Path, checkpoint: Path, out: Path) -> None:
    generate = ["fairseq-generate", data, "--user-dir", "s3distill", "--task", "audio_ctc", "--labels", "ltr"]
    generate += ["--gen-subset", "valid", "--batch-size", "2", "--path", checkpoint, "--scoring", "s3_wer"]
    kit.commands.run(*generate, "--post-process", "letter", "--results-path", out).succeeded()
    assert json.loads((out / "scores-valid.json").read_text())["word"]["num_reference"] == 2


def logged(output: str, part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in re.findall(rf"\[{part}\]\[INFO\] - (\{{.*\}})", output)]


@pytest.fixture(scope="module")
def trained(kit: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("run")
    return out, kit.commands.run(*command(folder, out, *both(folder))).succeeded().output


def test_both_terms_are_logged_and_rise_from_0(trained: tuple[Path, str]) -> None:
    first, *_, last = logged(trained[1], "train_inner")
    for name in ("loss_ewc", "loss_task_alignment"):
        assert abs(float(first[name])) < 1e-5 < float(last[name])
    assert "loss_task_alignment" in {key.removeprefix("valid_") for key in logged(trained[1], "valid")[-1]}


def test_a_resumed_run_is_the_same(kit: Any, folder: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    for max_update in (3, 6):
        kit.commands.run(*command(folder, tmp_path, *both(folder), max_update=max_update)).succeeded()
    run, whole = (compat.load_checkpoint(kit.last_checkpoint(out)) for out in (tmp_path, trained[0]))
    assert set(whole["criterion"]) == {"forgetting.old_heads.0.weight", "forgetting.old_heads.0.bias"}
    for part in ("model", "criterion"):
        for name, value in whole[part].items():
            assert torch.equal(run[part][name], value), name
    start = s3distill.load(folder / "old.pt").head.weight
    assert not torch.equal(whole["criterion"]["forgetting.old_heads.0.weight"], start)


def test_the_old_task_is_decoded_with_its_head(
    kit: Any, folder: Path, trained: tuple[Path, str], tmp_path: Path
) -> None:
    run = kit.last_checkpoint(trained[0])
    assert main(["old-head", str(run), str(folder / "old.pt"), str(tmp_path / "out.pt")]) == 0
    learned = compat.load_checkpoint(run)["criterion"]["forgetting.old_heads.0.weight"]
    assert torch.equal(s3distill.load(tmp_path / "out.pt").head.weight, learned)
    decode(kit, folder / "old", tmp_path / "out.pt", tmp_path)


def test_a_strong_penalty_holds_the_weights(kit: Any, folder: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    """Weighted by the Fisher information, the distance that is left is a small part of what plain fine-tuning goes."""
    strong = [both(folder)[0], "criterion.ewc_lambda=1000"]
    distances = []
    for name, options in (("plain", []), ("strong", strong)):
        out = tmp_path / name
        measured = options or [both(folder)[0], "criterion.ewc_lambda=1e-12"]  # logs the distance, and holds nothing
        output = kit.commands.run(*command(folder, out, *measured)).succeeded().output
        distances.append(float(logged(output, "train_inner")[-1]["loss_ewc"]))
    assert distances[1] < 0.2 * distances[0]


def test_replay_mixes_in_the_old_data(kit: Any, folder: Path, tmp_path: Path) -> None:
    """fairseq's own mixing of manifests: of 8 + 6 utterances an epoch, a quarter are old ones."""
    replay = [
        *("task.multi_corpus_keys='new,old'", "task.multi_corpus_sampling_weights='0.75,0.25'"),
        f"dataset.train_subset='new:train,old:{folder / 'old' / 'train'}'",
    ]
    output = kit.commands.run(*command(folder, tmp_path, *replay, max_update=2)).succeeded().output
    assert "sampling 10 from new dataset" in output and "sampling 4 from old dataset" in output
    state = compat.load_checkpoint(kit.last_checkpoint(tmp_path))
    assert state["criterion"] is None  # nothing beside the model learns here
    decode(kit, folder / "old", kit.last_checkpoint(tmp_path), tmp_path)  # one manifest, for a model of two


def test_two_ranks_are_one_with_twice_the_batches(kit: Any, folder: Path, tmp_path: Path) -> None:
    """Old heads learn on all ranks alike; EWC, which each rank has whole, counts once."""
    options = [*both(folder, ewc_lambda=10), "dataset.batch_size=2"]
    for rank in kit.start_ranks(command(folder, tmp_path / "ranks", *options, max_update=3)):
        rank.succeeded()
    one = command(folder, tmp_path / "one", *options, "optimization.update_freq=[2]", max_update=3)
    kit.commands.run(*one).succeeded()
    ranks, single = (compat.load_checkpoint(kit.last_checkpoint(tmp_path / name)) for name in ("ranks", "one"))
    for part in ("model", "criterion"):
        for name, value in single[part].items():
            torch.testing.assert_close(ranks[part][name], value, rtol=0, atol=2e-4)
