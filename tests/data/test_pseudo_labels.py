"""What decodes for pseudo-labels: confidences, batches, hypotheses that become equal in the target dictionary."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from s3distill.data.manifest import read_manifest, write_manifest
from s3distill.data.pseudo_label_search import DecodeOptions, search_of
from s3distill.data.pseudo_labels import PseudoLabeller, batches_of, mean_posterior
from s3distill.decoding.ctc import greedy_decode
from s3distill.decoding.prefix_beam import prefix_beam_search


def test_confidence_is_the_mean_over_the_frames_of_the_symbols() -> None:
    best = [0.9, 0.6, 0.8, 0.5, 0.7]
    path = [0, 2, 2, 0, 1]  # blank, B B, blank, A
    probs = torch.full((5, 3), 0.0)
    for t, (p, symbol) in enumerate(zip(best, path, strict=True)):
        probs[t] = (1 - p) / 2
        probs[t, symbol] = p
    log_probs = probs.log()
    hypothesis = greedy_decode(log_probs[None], None, blank=0)[0]
    assert mean_posterior(log_probs, hypothesis) == pytest.approx((0.6 + 0.8 + 0.7) / 3)
    silence = greedy_decode(log_probs[:1][None], None, blank=0)[0]
    assert mean_posterior(log_probs, silence) == 1.0


def test_batches_are_of_like_lengths_and_hold_everything_once(tmp_path: Path) -> None:
    lengths = [500, 900, 400, 900, 700]
    write_manifest(tmp_path / "a.tsv", ".", [(f"{i}.wav", n) for i, n in enumerate(lengths)])
    assert batches_of(read_manifest(tmp_path / "a.tsv"), 2) == [[1, 3], [4, 0], [2]]


class Model(torch.nn.Module):
    """What `PseudoLabeller` looks at of a model; nothing is run."""

    pooled, normalize, symbols = False, True, ["<s>", "<pad>", "</s>", "<unk>", "|", "A", "a"]

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(1, 7)


def test_hypotheses_that_become_equal_are_one_with_both_probabilities(tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text("A 1\n| 1\n")
    labeller = PseudoLabeller(Model(), "teacher", target_dictionary=tmp_path / "dict.txt")  # type: ignore[arg-type]
    torch.manual_seed(0)
    logits = torch.full((2, 7), -40.0)
    logits[:, [0, 4, 5, 6]] = torch.randn(2, 4)
    log_probs = logits.log_softmax(-1)
    found = prefix_beam_search(log_probs[None], None, 0, 30, 30)[0]  # every sequence of two frames
    expected: dict[str, float] = {}
    for hypothesis in found:
        text = "".join(Model.symbols[token] for token in hypothesis.tokens.tolist()).upper().strip("|")
        expected[text] = expected.get(text, 0.0) + math.exp(hypothesis.score)
    utterance = labeller._utterance(log_probs, found, nbest=2)
    written = [(h["units"].removesuffix("|").replace(" ", ""), h["score"]) for h in utterance["hypotheses"]]
    best = sorted(expected.items(), key=lambda item: -item[1])[:2]
    assert [text for text, _ in written] == [text for text, _ in best]
    assert [score for _, score in written] == pytest.approx([math.log(p) for _, p in best], abs=1e-4)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"shard": 0}, {"beam": 0}])
def test_bad_options_are_named(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be (at least 1|I/N)"):
        DecodeOptions(**options)


def test_greedy_scores_are_those_of_all_paths() -> None:
    torch.manual_seed(2)
    log_probs = torch.randn(2, 4, 3).log_softmax(-1)
    padding_mask = torch.tensor([[False] * 4, [False] * 3 + [True]])
    found = search_of(["<s>", "A", "B"], DecodeOptions())(log_probs, padding_mask)
    everything = prefix_beam_search(log_probs, padding_mask, 0, 200, 200)
    for (hypothesis,), all_of_them in zip(found, everything, strict=True):
        (same,) = (h for h in all_of_them if h.tokens.tolist() == hypothesis.tokens.tolist())
        assert hypothesis.score == pytest.approx(same.score, abs=1e-5)
