"""examples/s3_router/pruning.sh from start to end, and pruning runs that are killed and go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.masks.selection import num_removed
from s3distill.masks.state import read_masks
from tests.end_to_end.test_resume import last_update, state_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "s3_router" / "pruning.sh"

# --- a killed run

MAX_UPDATE = 18
METHODS = {  # six batches an epoch; saved at updates 5, 10 and 15
    "omp": (),
    "imp": ("model.prune_steps=4", "model.prune_interval=4"),
    "parp": ("model.prune_interval=4",),
    "parp, progressive, at a save": ("model.prune_steps=3", "model.prune_interval=5"),
}


def prune_command(kit: Any, dense: Path, out: Path, *overrides: str) -> list[str]:
    options = {
        "common.user_dir": "s3distill",
        "common.log_interval": "1",
        "hydra.run.dir": str(out),
        "task.data": str(kit.corpus),
        "model.w2v_path": str(dense),
        "checkpoint.finetune_from_model": str(dense),
        "checkpoint.save_interval_updates": "5",
        "dataset.batch_size": "4",
        "dataset.validate_interval_updates": "7",
        "optimization.max_update": str(MAX_UPDATE),
        "optimization.lr": "[0.01]",
        "model.dropout": "0.1",
        "model.layerdrop": "0.2",
        "model.prune_rate": "0.3",
    }
    options |= dict(override.split("=", 1) for override in overrides)
    command = ["fairseq-hydra-train", "--config-dir", "config/s3_router", "--config-name", "pruning_demo"]
    return [*command, *(f"{key}={value}" for key, value in options.items())]


def assert_equal_runs(run: dict[str, Any], reference: dict[str, Any]) -> None:
    """Weights, scores, optimizer and schedule, bit for bit."""
    assert run["model"].keys() == reference["model"].keys()
    for name, value in reference["model"].items():
        assert torch.equal(run["model"][name], value), f"{name} differs by {(run['model'][name] - value).abs().max()}"
    assert run["optimizer_history"][-1] == reference["optimizer_history"][-1]
    for index, values in reference["last_optimizer_state"]["state"].items():
        for name, value in values.items():
            ours = run["last_optimizer_state"]["state"][index][name]
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(value)), f"{name} of parameter {index}"


@pytest.fixture(scope="module")
def dense(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, fine-tuned for two updates through the same recipe."""
    out = tmp_path_factory.mktemp("dense")
    options = ("model._name=wav2vec_ctc", "checkpoint.finetune_from_model=null", "optimization.max_update=2")
    command = [word for word in prune_command(kit, kit.teacher, out, *options) if "prune_rate" not in word]
    kit.commands.run(*command).succeeded()
    return kit.last_checkpoint(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_killed_run_resumes_to_the_same_end(name: str, kit: Any, dense: Path, tmp_path: Path) -> None:
    options = (f"model.prune_method={name.partition(',')[0]}", *METHODS[name])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    kit.commands.run(*prune_command(kit, dense, whole, *options)).succeeded()
    command = kit.commands.start(*prune_command(kit, dense, broken, *options))
    command.wait_until(lambda: last_update(command.output) > 11)
    command.kill()
    at_kill = state_of(kit, broken)["optimizer_history"][-1]["num_updates"]
    assert 10 <= at_kill < MAX_UPDATE
    resumed = kit.commands.run(*prune_command(kit, dense, broken, *options)).succeeded()
    assert f"@ {at_kill} updates)" in resumed.output, "it did not load the checkpoint"
    end, reference = state_of(kit, broken), state_of(kit, whole)
    assert_equal_runs(end, reference)

    masks = read_masks(parse_checkpoint(end))
    assert len(masks) == 18
    assert all(int((~mask).sum()) == num_removed(0.3, mask.numel()) for mask in masks.values())
    begin = compat.load_checkpoint(dense)["model"]
    assert all(not torch.equal(end["model"][n], value) for n, value in begin.items() if n.endswith("fc1.weight"))


# --- the example


def run_example(out: Path, corpus: Path, tmp_path: Path, **options: str) -> subprocess.CompletedProcess[str]:
    shim = tmp_path / "bin" / "s3distill"  # also where the package is not installed
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m s3distill.cli.main "$@"\n')
    shim.chmod(0o755)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], str(shim.parent)])
    small = "[(16,10,5)]+[(16,3,2)]*4+[(16,2,2)]*2"
    shape = {"encoder_layers": 2, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4}
    shape |= {"conv_feature_layers": f"'{small}'", "conv_pos": 16, "conv_pos_groups": 4}
    env = {
        **os.environ,
        **{
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OUT": str(out),
            "DATA": str(corpus),
            "TEST": "valid",
        },
        **{"UPDATES": "10", "SPARSITIES": "70", "METHODS": "omp", "ARGS": "common.log_interval=1"},
        "DENSE_ARGS": " ".join(
            [
                *("optimization.max_update=2", "dataset.validate_after_updates=0"),
                *(f"model.w2v_args.model.{key}={value}" for key, value in shape.items()),
            ]
        ),
        **options,
    }
    return subprocess.run(
        [str(SCRIPT)], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_the_example_runs_from_start_to_end(kit: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run_example(out, kit.corpus, tmp_path)
    assert first.returncode == 0, first.stdout[-4000:]
    assert "done before" not in first.stdout
    whole = "s3_router omp imp parp"
    second = run_example(out, kit.corpus, tmp_path, METHODS=whole)
    assert second.returncode == 0, second.stdout[-4000:]
    assert second.stdout.count("done before") == 6, "dense, dense_longer, omp_70, and decoding each"

    results = json.loads((out / "pruning.json").read_text())
    assert list(results["pruned"]) == [f"{method}_70" for method in whole.split()]
    for run, result in results["pruned"].items():
        assert result["sparsity"] == pytest.approx(70, abs=0.1), run
        state = compat.load_checkpoint(out / run / "checkpoints" / "checkpoint_last.pt")
        assert state["optimizer_history"][-1]["num_updates"] == 10
    table = (out / "pruning.md").read_text()
    for words in (
        "| fine-tuned |",
        "| S3-Router |",
        "| OMP |",
        "| IMP |",
        "| PARP |",
        "| 70% removed |",
        "words in the split",
    ):
        assert words in table
    assert table.strip() in second.stdout
    assert "<svg" in (out / "pruning.html").read_text() and "percent removed" in (out / "pruning.html").read_text()

    third = run_example(out, kit.corpus, tmp_path, METHODS=whole)
    assert third.stdout.count("done before") == 12 and "fairseq-" not in third.stdout
    assert table.strip() in third.stdout


@pytest.mark.slow
def test_the_example_stops_where_a_run_fails(kit: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    failed = run_example(out, kit.corpus, tmp_path, DENSE_ARGS="optimization.max_update=many")
    assert failed.returncode != 0
    assert "failed; all of its output is in" in failed.stdout and "many" in failed.stdout
    assert not (out / "done" / "dense").exists()


def test_the_example_says_what_it_takes() -> None:
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: [OPTION=...] examples/s3_router/pruning.sh" in done.stderr
