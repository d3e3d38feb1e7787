"""The quickstart's commands in order: what `s3distill quickstart` shows and runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import s3distill


@dataclass(frozen=True)
class Step:
    """One command of the chain.

    Attributes:
        product: the file that it must leave behind.
        output: the file or folder that it writes, removed when it is to start over.
        recipe: the yaml that it reads, or None.
    """

    name: str
    title: str
    command: Sequence[str]
    product: Path
    output: Path
    recipe: Path | None = None


# updates of a smoke run (`--smoke`): enough to pass through every command, not to learn anything
SMOKE = {"teacher": 6, "stage1": 4, "stage2": 2, "finetune": 4}


def chain(out: Path, smoke: bool = False, data_dir: str | None = None) -> list[Step]:
    """The commands of the quickstart, in order; with ``data_dir`` on its manifests instead of demo speech."""
    data = Path(data_dir) if data_dir else out / "data"
    config = _config_dir()
    user_dir = "s3distill" if Path("s3distill/__init__.py").is_file() else str(Path(s3distill.__file__).parent)

    def train(name: str, *overrides: str) -> list[str]:
        few = (
            [f"optimization.max_update={SMOKE[name]}", "common.log_interval=1", "dataset.validate_after_updates=0"]
            if smoke
            else []
        )
        warmup = {"stage1": 2, "stage2": 1}
        if smoke and name in warmup:
            few.append(f"lr_scheduler.warmup_updates={warmup[name]}")
        command = [
            "fairseq-hydra-train",
            "--config-dir",
            str(config),
            "--config-name",
            name,
            f"common.user_dir={user_dir}",
        ]
        return [*command, f"hydra.run.dir={out / name}", f"task.data={data}", *overrides, *few]

    def generate(name: str, checkpoint: Path) -> list[str]:
        return [
            *("fairseq-generate", str(data), "--user-dir", user_dir, "--task", "audio_ctc", "--labels", "ltr"),
            *("--path", str(checkpoint), "--gen-subset", "test", "--batch-size", "16", "--post-process", "letter"),
            *("--scoring", "s3_wer", "--results-path", str(out / f"decode_{name}")),
        ]

    def last(name: str) -> Path:
        return out / name / "checkpoints" / "checkpoint_last.pt"

    teacher, compact, student = last("teacher"), out / "compact.pt", last("finetune")
    demo = ["s3distill", "demo-data", str(data)]
    if smoke:
        demo += ["--minutes", "1", "--valid-minutes", "0.2", "--test-minutes", "0.2"]

    def training(name: str, title: str, *overrides: str) -> Step:
        return Step(name, title, train(name, *overrides), last(name), out / name, config / f"{name}.yaml")

    def decoding(name: str, checkpoint: Path) -> Step:
        folder = out / f"decode_{name}"
        return Step(
            f"decode-{name}", "decode the test set", generate(name, checkpoint), folder / "scores-test.json", folder
        )

    prepare = Step("demo-data", "synthesise demo speech", demo, data / "test.tsv", data)
    if data_dir:  # nothing of the user's is an output: `output` names a file that never exists
        check = ["s3distill", "check", str(data / "train.tsv"), "--labels", "ltr"]
        prepare = Step("check", "check the manifests", check, data / "test.tsv", out / "check.none")
    from_teacher = f"task.teacher_path={teacher}"
    return [
        prepare,
        training("teacher", "train a small teacher with CTC"),
        training("stage1", "distil and prune jointly", from_teacher, f"model.student_path={teacher}"),
        Step(
            "prune",
            "cut what the gates closed",
            ["s3distill", "prune", str(last("stage1")), str(compact)],
            compact,
            compact,
        ),
        training("stage2", "distil the compact student", from_teacher, f"model.student_path={compact}"),
        training("finetune", "fine-tune it with CTC", f"model.w2v_path={last('stage2')}"),
        decoding("teacher", teacher),
        decoding("student", student),
    ]


def _config_dir() -> Path:
    for root in (Path.cwd(), Path(s3distill.__file__).parent.parent):
        if (root / "config" / "quickstart" / "stage1.yaml").is_file():
            folder = root / "config" / "quickstart"
            return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    raise RuntimeError("config/quickstart was not found; run the quickstart from the root of a clone of the repository")
