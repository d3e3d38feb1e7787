"""Labelled and unlabelled utterances in one run: every epoch's share, passes, batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("fairseq")

from omegaconf import OmegaConf

from s3distill.data.manifest import write_manifest
from s3distill.tasks.audio_ctc_distill import AudioCtcDistillConfig, AudioCtcDistillTask

LENGTHS = {"train": (4000, 9000, 6000, 5000), "more": (7000, 3000, 8000, 2500, 4500, 5500)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for split, lengths in LENGTHS.items():
        (folder / split).mkdir()
        for i, n in enumerate(lengths):
            soundfile.write(folder / split / f"{i}.flac", 0.1 * rng.standard_normal(n), 16000)
        write_manifest(folder / f"{split}.tsv", ".", [(f"{split}/{i}.flac", n) for i, n in enumerate(lengths)])
    (folder / "train.ltr").write_text("A B |\nB |\nA A |\nB B A |\n")
    (folder / "dict.ltr.txt").write_text("A 1\nB 1\n| 1\n")
    return folder


def load(folder: Path, **options: Any) -> Any:
    values = {
        "data": str(folder),
        "labels": "ltr",
        "seed": 3,
        "tpu": False,
        "train_subset": "train",
        "unlabelled_subset": "more",
        **options,
    }
    plain = OmegaConf.to_container(OmegaConf.structured(AudioCtcDistillConfig), resolve=False, enum_to_str=True)
    task = AudioCtcDistillTask(OmegaConf.create({**plain, **values}))  # type: ignore[dict-item]
    task.load_dataset("train")
    return task


def epoch_indices(task: Any, epoch: int, batch_size: int = 3) -> list[list[int]]:
    iterator = task.get_batch_iterator(task.datasets["train"], max_sentences=batch_size, seed=3, epoch=epoch)
    return [batch["id"].tolist() for batch in iterator.next_epoch_itr(shuffle=True)]


@pytest.mark.parametrize(("share", "num_drawn"), [(0.5, 4), (0.25, 1), (0.2, 1), (0.8, 16)])
def test_every_epoch_has_both_in_the_given_proportion(share: float, num_drawn: int, folder: Path) -> None:
    task = load(folder, unlabelled_weight=share)
    for epoch in (1, 2, 5):
        found = Counter(i for batch in epoch_indices(task, epoch) for i in batch)
        assert [found[i] for i in range(4)] == [1, 1, 1, 1], "every labelled utterance once"
        assert sum(count for i, count in found.items() if i >= 4) == num_drawn


def test_all_are_heard_once_before_one_is_heard_again(folder: Path) -> None:
    dataset = load(folder).datasets["train"]
    stream = [i for epoch in range(1, 10) for i in dataset.drawn(epoch)]
    assert len(stream) == 36
    for k in range(6):
        assert sorted(stream[6 * k : 6 * k + 6]) == list(range(6))
    assert stream[:6] != stream[6:12], "another order in the next pass"


def test_epochs_are_repeated_by_seed_alone(folder: Path) -> None:
    first, again = load(folder), load(folder)
    assert epoch_indices(again, 3) == epoch_indices(first, 3)  # as a resumed run asks for it, without epochs 1 and 2
    assert {i for b in epoch_indices(first, 3) for i in b} != {i for b in epoch_indices(first, 4) for i in b}
    other = load(folder, seed=4)
    assert [other.datasets["train"].drawn(e) for e in (1, 2)] != [first.datasets["train"].drawn(e) for e in (1, 2)]


def test_a_batch_of_both(folder: Path) -> None:
    dataset = load(folder).datasets["train"]
    batch = dataset.collater([dataset[i] for i in (1, 6, 3, 4)])
    assert batch["id"].tolist() == [1, 6, 3, 4] and batch["labelled"].tolist() == [True, False, True, False]
    assert batch["target_lengths"].tolist() == [2, 0, 4, 0] and batch["ntokens"] == 6
    pad = 1
    assert batch["target"].tolist() == [[5, 6, pad, pad], [pad] * 4, [5, 5, 4, 6], [pad] * 4]
    assert (~batch["net_input"]["padding_mask"]).sum(1).tolist() == [9000, 8000, 5000, 7000]
    alone = dataset.unlabelled[2]["source"]
    assert torch.equal(batch["net_input"]["source"][1, :8000], alone)
    only = dataset.collater([dataset[4], dataset[5]])
    assert only["target"].shape == (2, 0) and only["ntokens"] == 0 and not only["labelled"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unlabelled_weight": 1.0}, r"must be in \(0, 1\), but is 1\.0; 0\.5 hears as many"),
        (
            {"unlabelled_subset": None, "unlabelled_weight": 0.3},
            r"`task\.unlabelled_weight` is 0\.3, but task\.unlabelled_subset",
        ),
        ({"nbest": True}, r"`task\.nbest` is not supported beside task\.unlabelled_subset=more"),
        ({"num_batch_buckets": 4}, r"`task\.num_batch_buckets` is not supported beside"),
        ({"min_sample_size": 8500}, r"more\.tsv has no utterance of at least task\.min_sample_size = 8500 samples"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


def test_a_manifest_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.tsv cannot be trained on"):
        load(folder, unlabelled_subset="gone")
