"""The recipes of distilling recognisers: each starts as its comment says, and trains two updates at small shapes."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fairseq")

from tests.end_to_end.conftest import Server, write_corpus
from tests.models import ctc_models

# recipe -> where the student starts, overrides, what is logged of each update
STUDENT = ["model.w2v_path={encoder}"]
LIBRISPEECH = [
    *("common.fp16=false", "task.teacher_dtype=float32", "dataset.max_tokens=100000", "dataset.valid_subset=valid"),
    *("model.mask_channel_length=8", "optimization.update_freq=[1]", "task.normalize=true"),
]
JOINT = ["model.distill_layers='1,2'", "criterion.hidden_weight=1", "model.prune_units=[conv,head,ffn]"]
TERMS = {"loss_ctc", "loss_logits"}
SIZE = {"loss_hidden", "penalty", "expected_sparsity"}
RECIPES: dict[str, tuple[str, list[str], set[str]]] = {
    "logits": ("ctc_distill/logits", STUDENT, TERMS),
    "logits and hidden states": (
        "ctc_distill/logits",
        [*STUDENT, "model.distill_layers='1:2'", "criterion.hidden_weight=1"],
        {*TERMS, "loss_hidden", "loss_layer2"},
    ),
    "joint": ("ctc_distill/joint", ["model.distill_layers='1,2'"], TERMS | SIZE),
    "function matching": (
        "ctc_distill/function_matching",
        [*STUDENT, "model.mask_length=4", "task.unlabelled_subset=valid"],
        {"loss_logits"},
    ),
    "librispeech": ("finetuning/ctc_distill", [*LIBRISPEECH, *STUDENT], TERMS),
    "librispeech, joint": (
        "finetuning/ctc_distill",
        [
            *LIBRISPEECH,
            *JOINT,
            "model.student_path={teacher}",
            "model.feature_grad_mult=0.1",
            "criterion.target_sparsity=0.2",
        ],
        TERMS | SIZE,
    ),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait(timeout=30)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("distill")
    return {
        "data": write_corpus(folder / "data", num_train=8, num_valid=3),
        "teacher": ctc_models.write_ctc(folder / "teacher.pt", normalize=True),
        "encoder": ctc_models.write_encoder(folder / "encoder.pt", normalize=True, seed=2),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains(name: str, server: Server, paths: dict[str, Path], tmp_path: Path) -> None:
    recipe, overrides, terms = RECIPES[name]
    folder, _, stem = recipe.rpartition("/")
    options = [
        *(
            "dataset.num_workers=0",
            "common.log_interval=1",
            "optimization.max_update=2",
            "dataset.validate_after_updates=0",
        ),
        *(f"hydra.run.dir={tmp_path}", f"task.data={paths['data']}", f"task.teacher_path={paths['teacher']}"),
        *(override.format(**paths) for override in overrides),
    ]
    if stem != "ctc_distill":
        options.append("dataset.batch_size=4")
    command = ["fairseq-hydra-train", "--config-dir", f"config/{folder}", "--config-name", stem, *options]
    output = server.run(*command).succeeded().output
    lines: list[dict[str, Any]] = [json.loads(x) for x in re.findall(r"\[train_inner\]\[INFO\] - (\{.*\})", output)]
    assert [line["num_updates"] for line in lines] == ["1", "2"]
    weighed = {"loss_ctc", "loss_logits", "loss_hidden", "penalty"}
    assert terms <= set(lines[-1]) and weighed & set(lines[-1]) == weighed & terms
    assert '"valid_wer"' in output and (tmp_path / "checkpoints" / "checkpoint_last.pt").is_file()


def test_the_example_says_how_it_is_used() -> None:
    script = Path(__file__).parents[2] / "examples" / "ctc_distill" / "run.sh"
    usage = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert usage.returncode == 2 and "usage: [OPTION=...] examples/ctc_distill/run.sh" in usage.stderr
    readme, text = script.with_name("README.md").read_text(), script.read_text()
    rows = re.search(r'ALL_ROWS="(.*)"', text)[1].split()  # type: ignore[index]
    assert all(f"| `{row}` |" in readme and f"    {row}) " in text for row in rows) and len(rows) == 12
