"""fairseq's BLEU on empty transcripts, where its C code leaves the memory of the sentence."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("fairseq")

from fairseq.scoring import bleu

import s3distill  # noqa: F401  # repairs fairseq

FULL = torch.tensor([5, 6, 7, 8, 9], dtype=torch.int32)
EMPTY = torch.zeros(0, dtype=torch.int32)


def scorer() -> bleu.Scorer:
    return bleu.Scorer(bleu.BleuConfig(pad=1, eos=2, unk=3))


def test_empty_transcripts_match_nothing() -> None:
    """In a process of its own: without the repair this crashes it, or never ends."""
    code = (
        "import torch, s3distill; from fairseq.scoring import bleu\n"
        "s = bleu.Scorer(bleu.BleuConfig(pad=1, eos=2, unk=3)); empty = torch.zeros(0, dtype=torch.int32)\n"
        "full = torch.tensor([5, 6, 7, 8, 9], dtype=torch.int32)\n"
        "s.add(full, full); s.add(empty, full); s.add(full, empty); s.add(empty, empty)\n"
        "print(s.stat.match1, s.stat.match4, s.result_string())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    # the two empty ones match each other in the end of sentence that stands for them
    assert done.stdout.startswith("6 2 BLEU4 = ")


def test_other_transcripts_are_counted_as_before() -> None:
    counted = scorer()
    counted.add(FULL, FULL[:4])
    assert (counted.stat.match1, counted.stat.match4, counted.stat.predlen, counted.stat.reflen) == (4, 1, 4, 5)
    with pytest.raises(TypeError, match=r"ref must be a torch\.IntTensor"):
        counted.add(EMPTY.long()[:0].tolist(), FULL)
