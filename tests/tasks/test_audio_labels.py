"""`audio_labels`: batches, classes and where they come from, and manifests checked before training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("fairseq")

from fairseq import tasks

from s3distill.cli.train import check_files
from s3distill.data.manifest import read_manifest
from s3distill.encoder.config import SAMPLE_RATE
from tests.models import labels


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labels.write_corpus(tmp_path_factory.mktemp("corpus"), num_train=9, num_valid=5)


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(corpus, tmp_path / "data"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labels.write_backbone(tmp_path_factory.mktemp("backbone") / "backbone.pt")


def task_for(folder: Path, **options: Any) -> Any:
    cfg = labels.configuration(folder, Path("nowhere.pt"))
    cfg.task.update(options)
    return tasks.setup_task(cfg.task)


def batches(task: Any, split: str, **options: Any) -> list[dict[str, Any]]:
    iterator = task.get_batch_iterator(task.dataset(split), **options)
    return list(iterator.next_epoch_itr(shuffle=False))


def test_batches_have_the_class_of_every_utterance(corpus: Path) -> None:
    task = task_for(corpus, normalize=False)
    task.load_dataset("train")
    names = (corpus / "train.pitch").read_text().split()
    assert task.classes == labels.CLASSES == ["high", "low", "middle"]
    found = batches(task, "train", max_sentences=4, required_batch_size_multiple=8)
    assert sorted(len(b["id"]) for b in found) == [1, 4, 4], "fairseq would drop what is no multiple of 8"
    seen = {}
    for batch in found:
        assert batch["target"].dtype == torch.int64 and batch["target"].shape == batch["id"].shape
        seen |= {i: task.classes[t] for i, t in zip(batch["id"].tolist(), batch["target"].tolist(), strict=True)}
        lengths = (~batch["net_input"]["padding_mask"]).sum(-1)
        for row, (index, length) in enumerate(zip(batch["id"].tolist(), lengths.tolist(), strict=True)):
            samples, _ = soundfile.read(corpus / f"train/{index:03d}.flac", dtype="float32")
            assert np.array_equal(batch["net_input"]["source"][row, :length].numpy(), samples)
    assert seen == dict(enumerate(names))


def test_labels_follow_utterances_when_short_ones_are_left_out(corpus: Path) -> None:
    task = task_for(corpus)
    task.load_dataset("train")
    sizes = sorted(task.dataset("train").sizes)
    shorter = task_for(corpus, min_sample_size=int(sizes[4]))
    shorter.load_dataset("train")
    dataset = shorter.dataset("train")
    assert len(dataset) == 5
    kept = [line for line, (_, size) in enumerate(read_manifest(corpus / "train.tsv").entries) if size >= sizes[4]]
    names = (corpus / "train.pitch").read_text().split()
    assert kept != list(range(5))
    assert [shorter.classes[t] for t in dataset.targets.tolist()] == [names[line] for line in kept]
    with pytest.raises(
        ValueError, match=r"train\.tsv has no utterance of at least task\.min_sample_size = 99999 samples"
    ):
        task_for(corpus, min_sample_size=99999).load_dataset("train")


def test_long_audio_is_cropped_the_same_way_again(corpus: Path) -> None:
    found = []
    for _ in range(2):
        task = task_for(corpus, max_sample_size=2000)
        task.load_dataset("train")
        found.append(batches(task, "train", max_tokens=4000))
    assert len(found[0]) == 5 and all(b["net_input"]["source"].shape[1] == 2000 for b in found[0])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first["net_input"]["source"], second["net_input"]["source"])


def test_a_dictionary_wins_over_the_training_labels(data: Path) -> None:
    (data / "dict.pitch.txt").write_text("middle 3\nlow 3\nnone 0\nhigh 3\n")
    task = task_for(data)
    assert task.classes == ["middle", "low", "none", "high"]
    task.load_dataset("valid")
    names = (data / "valid.pitch").read_text().split()
    assert [task.classes[t] for t in task.dataset("valid").targets.tolist()] == names


def test_the_training_split_may_have_another_name(data: Path) -> None:
    for ending in ("tsv", "pitch"):
        (data / f"train.{ending}").rename(data / f"train-10h.{ending}")
    assert task_for(data, train_subset="train-10h").classes == labels.CLASSES
    with pytest.raises(ValueError, match=r"train\.pitch: the label file must be a readable file"):
        _ = task_for(data).classes


def write_run(folder: Path, data: Path, backbone: Path, **options: Any) -> Path:
    task, model, cfg = labels.build(data, backbone, **options)
    return labels.write_run(folder / "run.pt", task, model, cfg)


def build_from(run: Path, data: Path, backbone: Path, **options: Any) -> Any:
    """The task of a run that begins from another: ``restore`` or ``finetune`` say how."""
    how, model = options.pop("how"), options
    cfg = labels.configuration(data, backbone, **model)
    cfg.checkpoint["restore_file" if how == "restore" else "finetune_from_model"] = str(run)
    task = tasks.setup_task(cfg.task)
    task.build_model(cfg.model)
    return task


@pytest.mark.parametrize("how", ["restore", "finetune"])
def test_classes_are_those_of_the_head_that_is_used(how: str, data: Path, backbone: Path, tmp_path: Path) -> None:
    (data / "dict.pitch.txt").write_text("middle 3\nlow 3\nnone 0\nhigh 3\n")
    run = write_run(tmp_path, data, backbone)
    (data / "dict.pitch.txt").unlink()
    task = build_from(run, data, backbone, how=how)
    assert task.classes == ["middle", "low", "none", "high"] and task.classes_from == str(run)
    (data / "dict.pitch.txt").write_text("low 3\nmiddle 3\nnone 0\nhigh 3\n")
    with pytest.raises(
        ValueError, match=r"dict\.pitch\.txt must have the classes of .*run\.pt.*but differs in their order"
    ):
        build_from(run, data, backbone, how=how)
    (data / "dict.pitch.txt").write_text("low 3\nmiddle 3\nhigh 3\n")
    with pytest.raises(ValueError, match=r"but differs in none; remove it to take those of the checkpoint"):
        build_from(run, data, backbone, how=how)


def test_a_run_that_goes_on_keeps_its_classes(data: Path, backbone: Path, tmp_path: Path) -> None:
    """Training labels that lost a class would otherwise move the others to outputs that mean something else."""
    run = write_run(tmp_path, data, backbone)
    cfg = labels.configuration(data, backbone)
    cfg.checkpoint.save_dir = str(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    run.rename(tmp_path / "checkpoints" / "checkpoint_last.pt")
    names = (data / "train.pitch").read_text().replace("high", "low")
    (data / "train.pitch").write_text(names)
    task = tasks.setup_task(cfg.task)
    task.build_model(cfg.model)
    assert task.classes == ["high", "low", "middle"]
    task.load_dataset("train")
    assert [task.classes[t] for t in task.dataset("train").targets] == names.split()


def test_masks_alone_come_with_no_classes(data: Path, backbone: Path, tmp_path: Path) -> None:
    (data / "dict.pitch.txt").write_text("middle 3\nlow 3\nnone 0\nhigh 3\n")
    run = write_run(tmp_path, data, backbone)
    (data / "dict.pitch.txt").unlink()
    task = build_from(run, data, backbone, how="finetune", load_mask_only=True)
    assert task.classes == labels.CLASSES


def test_a_checkpoint_to_restore_must_be_there(data: Path, backbone: Path, tmp_path: Path) -> None:
    """fairseq would go on with random values."""
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*gone\.pt does not exist"):
        build_from(tmp_path / "gone.pt", data, backbone, how="restore", eval_only=True)


def break_count(data: Path) -> None:
    (data / "train.pitch").write_text("low\nhigh\n")


def break_empty(data: Path) -> None:
    (data / "train.pitch").write_text("low\n\n" + "high\n" * 7)


def break_unknown(data: Path) -> None:
    (data / "valid.pitch").write_text("low\nhigh\nmiddle\nbass\nhigh\n")


def break_words(data: Path) -> None:
    (data / "valid.pitch").write_text("low\nhigh\nvery high\nlow\nhigh\n")


def break_audio(data: Path) -> None:
    (data / "valid" / "003.flac").unlink()


def break_length(data: Path) -> None:
    soundfile.write(data / "valid" / "000.flac", np.zeros(399), SAMPLE_RATE, subtype="PCM_16")
    lines = (data / "valid.tsv").read_text().splitlines()
    (data / "valid.tsv").write_text("\n".join([lines[0], "valid/000.flac\t399", *lines[2:]]) + "\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_count, r"train\.pitch: a label file must have a line for each of the 9 utterances of .*but it has 2"),
        (break_empty, r"train\.pitch:2: a label line must not be empty"),
        (
            break_unknown,
            r"valid\.pitch:4: a label must be one of the 3 classes of .*train\.pitch \(high, low, middle\), but it is",
        ),
        (break_words, r"valid\.pitch:3: a label line must hold one class name, without spaces, but it is 'very high'"),
        (break_audio, r"valid\.tsv:5: an audio file must exist, but there is no .*003\.flac"),
        (break_length, r"valid\.tsv:2: an utterance must have at least 400 samples, but 'valid/000\.flac' has 399"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(damage: Any, message: str, data: Path) -> None:
    damage(data)
    task = task_for(data)
    with pytest.raises(ValueError, match=message):
        task.load_dataset("train")
        task.load_dataset("valid")


def test_short_audio_that_is_left_out_anyway_is_no_fault(data: Path) -> None:
    break_length(data)
    task = task_for(data, min_sample_size=1000)
    task.load_dataset("valid")
    assert len(task.dataset("valid")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"labels": None},
            r"`task\.labels` must name the label files' ending, but is empty; pass e\.g\. task\.labels=digit",
        ),
        ({"multi_corpus_keys": "a,b"}, r"`task\.multi_corpus_keys` is not supported by audio_labels.*but is 'a,b'"),
        (
            {"binarized_dataset": True},
            r"`task\.binarized_dataset` is not supported by audio_labels and must stay False",
        ),
        ({"subsample": 0.5}, r"`task\.subsample` is not supported by audio_labels and must stay 1\.0, but is 0\.5"),
    ],
)
def test_options_that_are_not_supported_are_refused(options: dict, message: str, corpus: Path) -> None:
    with pytest.raises(ValueError, match=message):
        task_for(corpus, **options)


def test_another_sample_rate_is_refused(corpus: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`task\.sample_rate` must be 16000, the rate of every backbone here, but is 8000"
    ):
        task_for(corpus, sample_rate=8000).load_dataset("train")


def test_batches_too_small_for_an_utterance_are_refused(corpus: Path) -> None:
    task = task_for(corpus)
    task.load_dataset("train")
    longest = max(task.dataset("train").sizes)
    with pytest.raises(
        ValueError, match=rf"must hold the longest utterance, {longest} samples.*is 3000 samples; raise it, or"
    ):
        batches(task, "train", max_tokens=3000)


def test_s3distill_train_asks_for_no_dictionary(data: Path, backbone: Path) -> None:
    cfg = labels.configuration(data, backbone)
    check_files(cfg)
    break_count(data)
    with pytest.raises(ValueError, match=r"train\.pitch: a label file must have a line for each of the 9 utterances"):
        check_files(cfg)
