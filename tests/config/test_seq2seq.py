"""The recipes of config/seq2seq and their example: a teacher, its lists, students of both levels, decoding."""

from __future__ import annotations

import json
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fairseq")

from omegaconf import OmegaConf

from s3distill import compat
from tests.config import test_recipes as recipes
from tests.config.test_recipes import fork_server  # noqa: F401
from tests.models import seq2seq

CONFIG = recipes.ROOT / "config" / "seq2seq"
EXAMPLE = recipes.ROOT / "examples" / "seq2seq"
TINY = ["model.decoder_embed_dim=16", "model.decoder_ffn_embed_dim=24", "model.decoder_attention_heads=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seq2seq.write_corpus(tmp_path_factory.mktemp("corpus"))


def train(server: Any, recipe: str, data: Path, encoder: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """Two updates; returns the checkpoint."""
    command = recipes.train_command(CONFIG / f"{recipe}.yaml", f"hydra.run.dir={out}", f"task.data={data}", *TINY)
    paths = [f"model.w2v_path={encoder}", "optimization.max_update=2", "dataset.batch_size=3", "common.log_interval=1"]
    log = server.run(*command, *paths, *overrides).succeeded().output
    assert '"num_updates": "2"' in log and "valid_accuracy" in log
    return compat.load_checkpoint(out / "checkpoints" / "checkpoint_last.pt")


def decode(server: Any, data: Path, run: Path, split: str, results: Path, *options: str) -> None:
    model = run / "checkpoints" / "checkpoint_last.pt"
    command = ["fairseq-generate", data, "--user-dir", "s3distill", "--task", "audio_ctc", "--labels", "ltr"]
    command += [
        "--path",
        model,
        "--gen-subset",
        split,
        "--batch-size",
        2,
        "--beam",
        3,
        "--max-len-b",
        6,
        "--unkpen",
        100,
    ]
    server.run(*command, "--scoring", "s3_wer", "--results-path", results, *options).succeeded()


def test_a_teacher_and_students_of_both_levels(data: Path, tmp_path: Path, fork_server: Any) -> None:  # noqa: F811
    encoder = seq2seq.write_backbone(tmp_path / "encoder.pt", normalize=True)
    train(fork_server, "finetune", data, encoder, tmp_path / "teacher")
    decode(fork_server, data, tmp_path / "teacher", "train", tmp_path / "lists", "--nbest", 2)
    teacher = tmp_path / "teacher" / "checkpoints" / "checkpoint_last.pt"
    students = {
        "word": ("word_level",),
        "random": ("word_level", "criterion.alpha=1", "model.decoder_path=null", "model.decoder_init_layers=''"),
        "k_best": ("sequence_level", f"task.nbest_dir={tmp_path}/lists"),
    }
    states = {}
    for name, (recipe, *overrides) in students.items():
        out = tmp_path / name
        states[name] = train(fork_server, recipe, data, encoder, out, f"task.teacher_path={teacher}", *overrides)
    for state in states.values():
        assert set(state["model"]) == {k for k in states["word"]["model"] if k.split(".")[0] in ("encoder", "decoder")}
        assert "decoder.layers.1.fc1.weight" in state["model"] and "decoder.layers.2.fc1.weight" not in state["model"]
    first = "decoder.layers.1.fc1.weight"
    theirs = compat.load_checkpoint(teacher)["model"]["decoder.layers.3.fc1.weight"]
    for name, is_near in (("word", True), ("k_best", True), ("random", False)):
        assert bool((states[name]["model"][first] - theirs).abs().max() < 0.01) is is_near, name
    for file in (teacher, encoder):  # a student needs neither
        file.unlink()
    decode(fork_server, data, tmp_path / "k_best", "valid", tmp_path / "decoded")
    assert json.loads((tmp_path / "decoded" / "scores-valid.json").read_text())["num_utterances"] == 5


def test_the_recipes_differ_in_the_declared_keys_only() -> None:
    finetune, word, sequence = (
        recipes.flat(OmegaConf.load(CONFIG / f"{name}.yaml")) for name in ("finetune", "word_level", "sequence_level")
    )

    def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
        return {key for key in one | other if one.get(key, "none") != other.get(key, "none")}

    assert differing(word, sequence) == {
        *("hydra.run.dir", "task.nbest", "task.nbest_dir"),
        *("criterion.temperature", "criterion.seq_kd", "criterion.seq_beta"),
    }
    assert {key for key in differing(finetune, word) if not key.startswith(("criterion.", "task."))} == {
        *("hydra.run.dir", "optimization.max_update"),
        *("model.decoder_layers", "model.decoder_path", "model.decoder_init_layers"),
    }


def test_the_example_says_what_it_takes() -> None:
    done = subprocess.run([EXAMPLE / "run.sh", "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: [OPTION=...] examples/seq2seq/run.sh" in done.stderr


def test_the_table_gives_the_mean_over_seeds(tmp_path: Path) -> None:
    table = runpy.run_path(str(EXAMPLE / "table.py"))["table"]
    for run, wer in (("teacher", 5.0), ("word/seed1", 6.0), ("word/seed2", 7.0), ("labels/seed1", 9.0)):
        folder = tmp_path / run / "decode"
        folder.mkdir(parents=True)
        (folder / "scores-test.json").write_text(json.dumps({"wer": wer, "uer": wer / 2}))
    assert table(tmp_path, "test")[2:] == [
        "| teacher | 5.00 | 2.50 | 1 |",
        "| labels, decoder from the teacher's layers | 9.00 | 4.50 | 1 |",
        "| + word-level distillation | 6.50 (6.00 to 7.00) | 3.25 (3.00 to 3.50) | 2 |",
    ]
