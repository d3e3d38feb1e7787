"""Wrong input through the real commands: one clear error, before training where it can be known, outputs untouched."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from s3distill import compat

Corpus = Path


def error_of(command: Any) -> str:
    """The message that a failed command ends with."""
    command.wait()
    assert command.status not in (None, 0) and command.status > 0, (
        f"exit status {command.status}:\n{command.output[-2000:]}"
    )
    found = re.findall(r"^[\w.]*(?:Error|Exception): .*?(?=^\s*$|\Z)", command.output, flags=re.MULTILINE | re.DOTALL)
    assert found, f"no error in the log:\n{command.output[-2000:]}"
    return " ".join(found[-1].split())


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage 1; copied before it is used."""
    out = tmp_path_factory.mktemp("trained")
    kit.stage1(out, "checkpoint.keep_interval_updates=1", max_update=4).succeeded()
    return out


@pytest.fixture
def fail(kit: Any, trained: Path, tmp_path: Path) -> Callable[..., str]:
    """Goes on with the finished run, which must fail before its first update, and returns the message."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = files_in(out / "checkpoints")

    def run(*overrides: str) -> str:
        command = kit.stage1(out, *overrides, max_update=8)
        message = error_of(command)
        assert "begin training epoch" not in command.output, "it started to train"
        assert files_in(out / "checkpoints") == before, "outputs were touched"
        return message

    return run


@pytest.fixture
def data(kit: Any, tmp_path: Path) -> Path:
    """A corpus to spoil."""
    return kit.write_corpus(tmp_path / "data", num_train=8, num_valid=2)


def test_the_same_run_without_a_fault_goes_on(kit: Any, trained: Path, tmp_path: Path) -> None:
    """Otherwise the tests below could fail for another reason than theirs."""
    shutil.copytree(trained, tmp_path / "out")
    assert "@ 4 updates)" in kit.stage1(tmp_path / "out", max_update=5).succeeded().output


# ---------------------------------------------------------------- audio and manifests


def spoil_missing(data: Path) -> None:
    (data / "train" / "003.flac").unlink()


def spoil_rate(data: Path) -> None:
    path = data / "train" / "003.flac"
    samples, _ = soundfile.read(path)
    soundfile.write(path, samples, 8000)


def spoil_stereo(data: Path) -> None:
    path = data / "train" / "003.flac"
    samples, rate = soundfile.read(path)
    soundfile.write(path, np.stack([samples, samples], axis=1), rate)


def spoil_empty_manifest(data: Path) -> None:
    (data / "train.tsv").write_text("")


def spoil_root_only(data: Path) -> None:
    (data / "train.tsv").write_text(".\n")


def spoil_line(data: Path) -> None:
    lines = (data / "train.tsv").read_text().splitlines()
    lines[4] = lines[4].replace("\t", " ")
    (data / "train.tsv").write_text("\n".join(lines) + "\n")


def spoil_length(data: Path) -> None:
    lines = (data / "train.tsv").read_text().splitlines()
    lines[4] = lines[4].split("\t")[0] + "\t99"
    (data / "train.tsv").write_text("\n".join(lines) + "\n")


def spoil_no_manifest(data: Path) -> None:
    (data / "valid.tsv").unlink()


def spoil_audio(data: Path) -> None:
    (data / "train" / "003.flac").write_bytes(b"no audio")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (spoil_missing, ["train.tsv:5", "an audio file must exist", "003.flac", "correct the path"]),
        (spoil_rate, ["train.tsv:5", "003.flac", "must be 16000 Hz", "8000 Hz", "convert it: sox"]),
        (spoil_stereo, ["train.tsv:5", "003.flac", "must be mono", "2 channels", "convert it: sox"]),
        (spoil_empty_manifest, ["train.tsv:1", "must be the root folder", "empty", "s3distill manifest"]),
        (spoil_root_only, ["train.tsv:1", "must list at least one audio file", "s3distill manifest"]),
        (spoil_line, ["train.tsv:5", "path<TAB>number of samples", "003.flac", "correct or remove the line"]),
        (spoil_length, ["train.tsv:5", "003.flac", "must have the 99 samples", "write the manifest again"]),
        (spoil_no_manifest, ["valid.tsv", "must be a readable file", "No such file", "s3distill manifest"]),
        (spoil_audio, ["train.tsv:5", "003.flac", "must be readable", "copy or convert it again"]),
    ],
)
def test_audio_and_manifest(
    fail: Callable[..., str], data: Path, spoil: Callable[[Path], None], parts: list[str]
) -> None:
    spoil(data)
    message = fail(f"task.data={data}")
    assert all(part in message for part in parts), message


def test_stereo_file_that_no_probe_saw_is_not_averaged(kit: Any, tmp_path: Path) -> None:
    """Large manifests are probed; what the probes miss is refused when it is read."""
    data = kit.write_corpus(tmp_path / "data", num_train=32, num_valid=2)
    spoil_stereo(data)
    message = error_of(kit.stage1(tmp_path / "out", f"task.data={data}", max_update=9))
    assert all(part in message for part in ("003.flac", "must be mono", "2 channels", "convert it: sox")), message


# ---------------------------------------------------------------- labels


def spoil_label_count(data: Path) -> None:
    (data / "train.ltr").write_text("A B |\n" * 7)


def spoil_symbol(data: Path) -> None:
    (data / "train.ltr").write_text("A B |\n" * 3 + "A Z |\n" + "A B |\n" * 4)


def spoil_empty_label(data: Path) -> None:
    (data / "train.ltr").write_text("A B |\n" * 3 + "\n" + "A B |\n" * 4)


def spoil_dictionary(data: Path) -> None:
    (data / "dict.ltr.txt").unlink()


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (
            spoil_label_count,
            ["train.ltr", "a line for each of the 8 utterances", "it has 7", "write manifest and labels again"],
        ),
        (spoil_symbol, ["train.ltr:4", "must be in the dictionary", "'Z' is not", "correct the line"]),
        (spoil_empty_label, ["train.ltr:4", "must not be empty", "add the transcript"]),
        (spoil_dictionary, ["dict.ltr.txt", "must be a readable file", "s3distill manifest"]),
        (spoil_stereo, ["train.tsv:5", "003.flac", "must be mono", "convert it: sox"]),
    ],
)
def test_labels(
    kit: Any, trained: Path, data: Path, tmp_path: Path, spoil: Callable[[Path], None], parts: list[str]
) -> None:
    spoil(data)
    command = kit.commands.run(*finetune_command(kit, trained, data, tmp_path / "out"))
    message = error_of(command)
    assert all(part in message for part in parts), message
    assert "begin training epoch" not in command.output
    assert not list((tmp_path / "out").rglob("*.pt"))


def finetune_command(kit: Any, trained: Path, data: Path, out: Path) -> list[str]:
    return [
        *("fairseq-hydra-train", "--config-dir", "config/quickstart", "--config-name", "finetune"),
        *("common.user_dir=s3distill", f"hydra.run.dir={out}", f"task.data={data}"),
        *(
            f"model.w2v_path={kit.last_checkpoint(trained)}",
            "optimization.max_update=2",
            "dataset.validate_after_updates=0",
        ),
    ]


# ---------------------------------------------------------------- checkpoints


def test_corrupt_teacher(kit: Any, fail: Callable[..., str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(kit.teacher.read_bytes()[:50_000])
    message = fail(f"task.teacher_path={broken}")
    assert all(
        p in message for p in (str(broken), "corrupt or truncated", "50000 bytes", "copy or download it again")
    ), message


def test_no_checkpoint_at_all(fail: Callable[..., str], tmp_path: Path) -> None:
    text = tmp_path / "teacher.pt"
    text.write_text("this is no checkpoint")
    message = fail(f"task.teacher_path={text}")
    assert str(text) in message and "copy or download it again" in message, message


def test_missing_teacher_file(fail: Callable[..., str], tmp_path: Path) -> None:
    message = fail(f"task.teacher_path={tmp_path / 'none.pt'}")
    assert "none.pt does not exist; check the path" in message, message


@pytest.mark.parametrize("value", ["null", "''"])
def test_no_teacher_path(fail: Callable[..., str], value: str) -> None:
    message = fail(f"task.teacher_path={value}")
    assert "`task.teacher_path` must name the teacher's checkpoint" in message, message


def test_teacher_that_runs_code(fail: Callable[..., str], tmp_path: Path) -> None:
    import pickle

    class Runs:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    evil = tmp_path / "evil.pt"
    torch.save({"model": {}, "cfg": Runs()}, evil, pickle_module=pickle)
    message = fail(f"task.teacher_path={evil}")
    assert "was refused: loading must not run code" in message and str(evil) in message, message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("role", ["task.teacher_path", "model.student_path"])
def test_weights_that_are_not_finite(kit: Any, fail: Callable[..., str], tmp_path: Path, role: str) -> None:
    path = kit.write_teacher(tmp_path / "nan.pt")
    state = torch.load(path)
    state["model"]["encoder.layers.1.fc1.weight"][0, 0] = float("nan")
    torch.save(state, path)
    message = fail(f"{role}={path}")
    assert all(part in message for part in (str(path), "encoder.layers.1.fc1.weight", "finite")), message


def test_last_checkpoint_that_is_corrupt(kit: Any, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    last = kit.last_checkpoint(out)
    last.write_bytes(last.read_bytes()[:60_000])
    before = files_in(out / "checkpoints")
    message = error_of(kit.stage1(out, max_update=8))
    assert str(last) in message and "corrupt or truncated" in message, message
    assert files_in(out / "checkpoints") == before


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["task.normalize=false"], ["`task.normalize`", "normalize=True", "pass task.normalize=true"]),
        (["model.distill_layers='0,7'"], ["layers to match", "within 0 to 3", "[7]", "model.distill_layers"]),
        (["model.distill_layers='0:0,1:9'"], ["layers to match", "within 0 to 3", "[9]", "model.distill_layers"]),
        (["model.distill_layers='0:0,5:1'"], ["5:1", "layers 0 to 3", "change the layers to match"]),
        (["model.distill_layers='0,7'", "++model.teacher_dim=32"], ["layers", "0 to 3", "7"]),
        (["model.distill_layers='0,three'"], ["three", "'0,4,8,12' or '0:0,2:4'"]),
        (["model.distill_layers=''"], ["`model.distill_layers`", "must name", "0,4,8,12"]),
        (["++model.teacher_dim=48"], ["`model.teacher_dim`", "48", "32"]),
        (
            ["criterion.target_sparsity=0.999"],
            ["0.999 in params cannot be reached by pruning conv, head, ffn", "lower the target"],
        ),
        (["criterion.target_sparsity=1.5"], ["`criterion.target_sparsity` must be in [0, 1)", "1.5"]),
        (
            ["criterion.target_sparsity=0.5", "model.prune_units=[]"],
            ["`criterion.target_sparsity`", "needs gates", "model.prune_units"],
        ),
        (["criterion.layer_weights='1,1'"], ["`criterion.layer_weights`", "one weight per matched layer (3)", "has 2"]),
        (["criterion.layer_weights='1,x,1'"], ["`criterion.layer_weights`", "'x'", "0.1,0.1,1"]),
        (["criterion.l1_weight=-1"], ["weights", "at least 0", "-1"]),
        (["criterion.sparsity_warmup=-5"], ["`criterion.sparsity_warmup`", "-5"]),
        (
            ["model.prune_units=[conv,wings]"],
            ["units to prune", "conv, head, ffn, attention_layer, ffn_layer", "wings"],
        ),
        (["model.gate_init_drop=0"], ["`init_drop` must be in (0, 1)", "0.01"]),
        (["optimization.lr=[0.0]"], ["`optimization.lr` must be positive", "optimization.lr=[0.0002]"]),
        (["optimization.lr=[]"], ["`optimization.lr`"]),
        (["task.sample_rate=8000"], ["`task.sample_rate` must be 16000", "8000"]),
        (["task.min_sample_size=10000000"], ["valid.tsv", "task.min_sample_size"]),
        (["task.data=/nowhere/at/all"], ["/nowhere/at/all", "s3distill manifest"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_options(fail: Callable[..., str], overrides: list[str], parts: list[str]) -> None:
    message = fail(*(["++task.sample_rate=8000"] if overrides == ["task.sample_rate=8000"] else overrides))
    assert all(part in message for part in parts), message


def test_teacher_with_other_frames(kit: Any, fail: Callable[..., str], tmp_path: Path) -> None:
    other = kit.write_teacher(
        tmp_path / "slow.pt", conv_feature_layers="[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 3"
    )
    message = fail(f"task.teacher_path={other}")
    assert str(other) in message and "320" in message and "640" in message, message


# ---------------------------------------------------------------- training that diverges


def test_loss_that_becomes_nan(kit: Any, tmp_path: Path) -> None:
    """Update 3 throws the weights far out; the checkpoint of update 2 stays, and nothing broken is written."""
    out = tmp_path / "out"
    options = ["checkpoint.save_interval_updates=1", "optimization.clip_norm=0", "lr_scheduler.warmup_updates=0"]
    kit.stage1(out, *options, max_update=2).succeeded()
    before = files_in(out / "checkpoints")
    command = kit.stage1(out, *options, "optimization.lr=[1e30]", max_update=9)
    message = error_of(command)
    assert re.search(r"the loss became (nan|inf|-inf) at update \d+ \(utterances \[", message), message
    assert "lower optimization.lr" in message and "last checkpoint is untouched" in message, message
    after = files_in(out / "checkpoints")
    assert all(name in after and after[name] == content for name, content in before.items() if "last" in name)
    assert "crash.pt" not in after


def test_weights_that_are_nan_are_not_saved_at_the_end_of_an_epoch(kit: Any, tmp_path: Path) -> None:
    """There fairseq saves without validation, so no loss is seen in between."""
    out = tmp_path / "out"
    options = ["checkpoint.save_interval_updates=6", "optimization.clip_norm=0", "lr_scheduler.warmup_updates=0"]
    kit.stage1(out, *options, max_update=5).succeeded()
    before = files_in(out / "checkpoints")
    command = kit.stage1(out, *options, "optimization.lr=[1e39]", max_update=9)
    message = error_of(command)
    assert "this checkpoint is not written" in message and "lower optimization.lr" in message, message
    assert "Preparing to save checkpoint for epoch 1 @ 6 updates" in command.output
    assert files_in(out / "checkpoints") == before


# ---------------------------------------------------------------- prune


def test_prune_without_gates(kit: Any, tmp_path: Path) -> None:
    output = tmp_path / "compact.pt"
    output.write_bytes(b"what was there before")
    command = kit.commands.run("s3distill", "prune", kit.teacher, output, "--audio", kit.corpus / "valid.tsv")
    assert command.status == 2
    error = command.output.splitlines()[-1]
    assert error.startswith("s3distill prune: error: ") and str(kit.teacher) in error and "has no gates" in error, error
    assert "model.prune_units=[conv,head,ffn]" in error and "Traceback" not in command.output
    assert output.read_bytes() == b"what was there before"


def test_prune_into_a_file_as_folder(kit: Any, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    output = tmp_path / "file" / "compact.pt"
    command = kit.commands.run("s3distill", "prune", kit.last_checkpoint(trained), output)
    assert command.status == 2 and "Traceback" not in command.output
    assert str(tmp_path / "file") in command.output.splitlines()[-1], command.output
    assert (tmp_path / "file").read_text() == "in the way"


def test_prune_without_audio(kit: Any, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "compact.pt"
    command = kit.commands.run(
        "s3distill", "prune", kit.last_checkpoint(trained), output, "--audio", tmp_path / "none.tsv"
    )
    assert command.status == 2 and "none.tsv" in command.output.splitlines()[-1] and "--audio" in command.output
    assert not output.exists() and "Traceback" not in command.output


def test_prune_corrupt_checkpoint(kit: Any, trained: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(kit.last_checkpoint(trained).read_bytes()[:60_000])
    command = kit.commands.run("s3distill", "prune", broken, tmp_path / "compact.pt")
    error = command.output.splitlines()[-1]
    assert command.status == 2 and str(broken) in error and "corrupt or truncated" in error, command.output
    assert not (tmp_path / "compact.pt").exists()


def test_prune_writes_a_checkpoint(kit: Any, trained: Path, tmp_path: Path) -> None:
    """The same commands without a fault."""
    command = kit.commands.run("s3distill", "prune", kit.last_checkpoint(trained), tmp_path / "compact.pt").succeeded()
    assert "relative error" in command.output
    assert "gates" not in " ".join(compat.load_checkpoint(tmp_path / "compact.pt")["model"])
    assert not list(tmp_path.glob("*.tmp"))
