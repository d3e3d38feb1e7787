"""n-best lists in batches: every utterance gets its own hypotheses, whatever order and filtering made of the batch."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

from fairseq.data import Dictionary, FairseqDataset

from s3distill.data.manifest import write_manifest
from s3distill.data.nbest import Hypothesis, NbestEntry, nbest_path, write_nbest
from s3distill.losses.sequence import NbestTargets, nbest_ctc_loss
from s3distill.tasks._nbest import nbest_targets, with_nbest

ENTRIES = [
    NbestEntry("0.wav", (Hypothesis("A B |", -0.5, 0.9), Hypothesis("A |", -1.5, 0.9))),
    NbestEntry("1.wav", (Hypothesis("B |", -0.25, 0.9),)),
    NbestEntry("2.wav", (Hypothesis("B B A |", -0.125, 0.9),)),
]


@pytest.fixture
def dictionary() -> Dictionary:
    dictionary = Dictionary()
    for symbol in ("|", "A", "B"):
        dictionary.add_symbol(symbol)
    return dictionary


class Utterances(FairseqDataset):
    """Of a manifest whose second line was too short; an item of size 0 is dropped from its batch, as fairseq's may be."""

    skipped_indices = frozenset({1})

    def __len__(self) -> int:
        return 2

    def collater(self, samples: Any) -> Any:
        kept = [s["id"] for s in samples if s["size"] > 0]
        return {"id": torch.tensor(kept)} if kept else {}


def test_hypotheses_become_tensors(dictionary: Dictionary) -> None:
    targets = nbest_targets(ENTRIES[:2], dictionary)
    assert targets.symbols.tolist() == [[[5, 6, 4], [5, 4, 1]], [[6, 4, 1], [1, 1, 1]]]
    assert targets.lengths.tolist() == [[3, 2], [2, 0]]
    assert targets.scores.tolist() == [[-0.5, -1.5], [-0.25, -math.inf]]
    assert targets.scores.dtype == torch.float64  # fairseq rounds float32 in batches to half precision


def test_utterances_keep_their_own_hypotheses(dictionary: Dictionary, tmp_path: Path) -> None:
    write_manifest(tmp_path / "train.tsv", ".", [(entry.audio, 8000) for entry in ENTRIES])
    write_nbest(nbest_path(tmp_path / "train.tsv"), ENTRIES)
    dataset = with_nbest(Utterances(), tmp_path / "train.tsv", dictionary)
    batch = dataset.collater([{"id": 1, "size": 9}, {"id": 0, "size": 9}])
    assert batch["nbest"]["scores"].tolist() == [[-0.125, -math.inf], [-0.5, -1.5]]
    batch = dataset.collater([{"id": 1, "size": 0}, {"id": 0, "size": 9}])
    assert batch["nbest"]["symbols"].tolist() == [[[5, 6, 4], [5, 4, 1]]]
    assert dataset.collater([{"id": 1, "size": 0}]) == {}


def test_a_list_of_other_utterances_is_refused(dictionary: Dictionary, tmp_path: Path) -> None:
    write_manifest(tmp_path / "train.tsv", ".", [(entry.audio, 8000) for entry in ENTRIES])
    write_nbest(nbest_path(tmp_path / "train.tsv"), ENTRIES)
    with pytest.raises(ValueError, match="n-best lists must be of the 2 utterances, but are of 3"):
        with_nbest(type("All", (Utterances,), {"skipped_indices": frozenset()})(), tmp_path / "train.tsv", dictionary)
    unknown = SimpleNamespace(symbols=[*dictionary.symbols[:6]], nspecial=4)
    with pytest.raises(ValueError, match="units must be in the dictionary, but 'B' is not"):
        with_nbest(Utterances(), tmp_path / "train.tsv", unknown)  # type: ignore[arg-type]


def test_utterances_without_hypotheses_learn_nothing_from_them(
    dictionary: Dictionary, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_manifest(tmp_path / "train.tsv", ".", [(entry.audio, 8000) for entry in ENTRIES])
    write_nbest(nbest_path(tmp_path / "train.tsv"), [ENTRIES[0], NbestEntry("1.wav", ()), NbestEntry("2.wav", ())])
    dataset = with_nbest(Utterances(), tmp_path / "train.tsv", dictionary)
    assert "1 of 2 utterances have no hypothesis" in caplog.text  # the other one was too short for the task
    batch = dataset.collater([{"id": 1, "size": 9}])["nbest"]
    found = nbest_ctc_loss(torch.randn(1, 9, 7).log_softmax(-1), None, NbestTargets(**batch), 0)
    assert found.total.item() == found.num_scored == 0
    both = NbestTargets(**dataset.collater([{"id": 0, "size": 9}, {"id": 1, "size": 9}])["nbest"])
    assert nbest_ctc_loss(torch.randn(2, 9, 7).log_softmax(-1), None, both, 0).num_scored == 1
    write_nbest(nbest_path(tmp_path / "train.tsv"), [NbestEntry(entry.audio, ()) for entry in ENTRIES])
    with pytest.raises(ValueError, match="must have a hypothesis to train on, but none of its 2 utterances has one"):
        with_nbest(Utterances(), tmp_path / "train.tsv", dictionary)
