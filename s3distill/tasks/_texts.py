"""Texts for models with a decoder: the labels of a batch, and the teacher's hypotheses beside them."""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from fairseq.data import BaseWrapperDataset, Dictionary
from fairseq.data.data_utils import collate_tokens
from torch import Tensor

from s3distill.data.nbest import NbestEntry
from s3distill.tasks._nbest import nbest_targets


class TextDataset(BaseWrapperDataset):
    """fairseq's `AddTargetDataset` with ``prev_output_tokens`` as one padded tensor (upstream leaves a list), and n-best lists.

    Args:
        dataset: items with ``label``, collated with ``add_to_input``.
        dictionary: symbols of the labels.
        nbest: hypotheses of each utterance of ``dataset``, best first, or None.
    """

    def __init__(self, dataset: Any, dictionary: Dictionary, nbest: Optional[Sequence[NbestEntry]] = None) -> None:
        super().__init__(dataset)
        self.dictionary, self.nbest = dictionary, nbest

    def collater(self, samples: List[Dict[str, Any]]) -> Dict[str, Any]:
        """A batch with ``net_input.prev_output_tokens`` [B, U], ``target`` [B, U], and ``nbest`` where there are lists.

        ``nbest`` holds the texts of all K hypotheses of all utterances, N = B K but for the missing ones:
        ``prev_output_tokens`` and ``target`` [N, U'], ``utterances`` [N] (row of the batch), ``ranks`` [N], from 0, and
        ``scores`` [B, K], -inf = there is no such hypothesis.
        """
        batch: Dict[str, Any] = self.dataset.collater(samples)
        if len(batch) == 0:
            return batch
        pad = self.dictionary.pad()
        batch["net_input"]["prev_output_tokens"] = collate_tokens(batch["net_input"]["prev_output_tokens"], pad)
        if self.nbest is not None:
            batch["nbest"] = self._nbest([self.nbest[i] for i in batch["id"].tolist()])
        return batch

    def _nbest(self, entries: Sequence[NbestEntry]) -> Dict[str, Tensor]:
        targets = nbest_targets(entries, self.dictionary)
        utterances, ranks = (targets.scores != -math.inf).nonzero().T
        texts = zip(targets.symbols[utterances, ranks], targets.lengths[utterances, ranks].tolist(), strict=True)
        read, said = self._as_texts([symbols[:length] for symbols, length in texts])
        return {
            **{"prev_output_tokens": read, "target": said},
            **{"utterances": utterances, "ranks": ranks, "scores": targets.scores},
        }

    def _as_texts(self, texts: Sequence[Tensor]) -> Tuple[Tensor, Tensor]:
        """What the decoder reads, eos first, and what it is to say, eos last; [N, U] each, padded at the end."""
        eos, pad = torch.tensor([self.dictionary.eos()]), self.dictionary.pad()
        read = collate_tokens([torch.cat([eos, text]) for text in texts], pad)
        return read, collate_tokens([torch.cat([text, eos]) for text in texts], pad)
