"""Training curves out of fairseq's logs, whole and damaged."""

import json
from pathlib import Path

import pytest

from s3distill.analysis.curves import read_curves

HYDRA = "[2026-01-31 12:00:00,000][{tag}][INFO] - {stats}"


def line(tag: str, **stats: object) -> str:
    return HYDRA.format(tag=tag, stats=json.dumps({"epoch": 1, **stats}))


def test_reads_training_and_validation_by_update(tmp_path: Path) -> None:
    log = tmp_path / "hydra_train.log"
    log.write_text(
        "\n".join(
            [
                "[2026-01-31 12:00:00,000][fairseq_cli.train][INFO] - {'_name': None, 'common': {}}",
                "[2026-01-31 12:00:00,000][fairseq.trainer][INFO] - begin training epoch 1",
                line("train_inner", update=0.5, loss="3.2", expected_sparsity="0.1", num_updates="200", lr="0.001"),
                line("valid", valid_loss="2.5", valid_wer="40.5", valid_num_updates="300", valid_best_loss="2.5"),
                line("train", train_loss="2.9", train_num_updates="300"),
                line("train_inner", update=1.5, loss="2.1", expected_sparsity="0.3", num_updates="400", lr="0.001"),
            ]
        )
    )
    curves = read_curves(log)
    assert (curves.train["loss"].updates, curves.train["loss"].values) == ([200, 400], [3.2, 2.1])
    assert curves.train["expected_sparsity"].values == [0.1, 0.3]
    assert (curves.valid["loss"].updates, curves.valid["wer"].values) == ([300], [40.5])
    assert "train_loss" not in curves.train and curves.source == str(log)


def test_a_resumed_run_counts_its_last_figures_and_odd_lines_are_passed_over(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "\n".join(
            [
                line("train_inner", loss="3", num_updates="100"),
                line("train_inner", loss="2", num_updates="200"),
                line("train_inner", loss="1.9", num_updates="300")[:-9],  # cut by the kill
                line("train_inner", loss="2.5", num_updates="200"),
                line("train_inner", loss="nan", num_updates="300", note="text", flag=True, gone=None),
                line("train_inner", loss="1"),  # without num_updates
                '2026-01-31 12:00:00 | INFO | train_inner | {"loss": "1.5", "num_updates": "400"}',
                '{"loss": 1.25, "num_updates": 500}',
                "[2026-01-31 12:00:00,000][x][INFO] - {broken",
                "[2026-01-31 12:00:00,000][x][INFO] - {}",
            ]
        )
    )
    loss = read_curves(log).train["loss"]
    assert loss.updates == [100, 200, 300, 400, 500]
    assert loss.values[:2] == [3.0, 2.5] and loss.values[2] != loss.values[2] and loss.values[3:] == [1.5, 1.25]
    assert not {"note", "flag", "gone"} & set(read_curves(log).train)


def test_a_run_shorter_than_the_log_interval_has_its_epochs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(line("train", train_loss="2.9", train_num_updates="3") + "\n")
    assert read_curves(log).train["loss"].values == [2.9]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.log does not exist"):
        read_curves(tmp_path / "nothing.log")
    (tmp_path / "plain.log").write_text("epoch 001: | loss 3.2 | num_updates 200\n")
    with pytest.raises(ValueError, match=r"has no JSON progress line; train with common\.log_format=json"):
        read_curves(tmp_path / "plain.log")
