"""The frames' loop of the prefix beam search: a batch of beams as tensors, advanced frame by frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = -math.inf
# odd constants of a 64-bit hash, as signed integers: multiplied modulo 2**64
_MULTIPLIER, _INCREMENT, _FIRST = -7046029254386353131, -4417276706812531889, 1442695040888963407


@dataclass
class _Beam:
    """The prefixes of n utterances, the most probable first; log-probabilities and hashes are [n, K].

    Attributes:
        total: log-probability of the prefix; blank, symbol: of its paths that end in a blank, in its last symbol.
        last: its last symbol, the blank for the empty prefix.
        own, parent: hash of the prefix, and of the prefix without its last symbol.
    """

    total: Tensor
    blank: Tensor
    symbol: Tensor
    last: Tensor
    own: Tensor
    parent: Tensor

    def first_rows(self, num_rows: int) -> _Beam:
        return _Beam(*(getattr(self, name)[:num_rows] for name in self.__dataclass_fields__))


class PrefixSearch:
    """Goes through the frames of a batch, longest utterance first, so that those that have ended leave it.

    Prefixes are told apart by a 64-bit hash of their symbols.

    Args:
        frames: [B, T, V] float64, of which the first ``lengths`` [B] of a row count.
    """

    def __init__(self, frames: Tensor, lengths: Tensor, blank: int, beam: int) -> None:
        self.order = lengths.argsort(descending=True, stable=True)
        self.frames, self.lengths = frames[self.order], lengths[self.order]
        self.blank, self.beam = blank, beam
        num_ranks = min(frames.shape[2] - 1, beam + 1)
        others = self.frames.clone()
        others[..., blank] = NEVER
        self.ranked = others.topk(num_ranks, dim=-1)  # the symbols of each frame, the most probable first
        self.prefixes, self.ranks = _candidates(beam, num_ranks)
        self.num_candidates = len(self.prefixes)
        # where each pair stands among the candidates; what is none of them, rank R included, stands behind them all
        self.place_of = torch.full((beam, num_ranks + 1), beam + self.num_candidates)
        self.place_of[self.prefixes, self.ranks] = torch.arange(beam, beam + self.num_candidates)
        stays = torch.arange(beam)
        self.sources = torch.cat([stays, self.prefixes])  # selected place -> the prefix that it comes from
        self.rank_of = torch.cat([torch.zeros_like(stays), self.ranks])
        self.places = stays
        # what an unused place holds for hashes: equal to no other place's, and as parent to none's own
        self.nobody, self.no_parent = -1 - stays, 1 + stays

    def run(self, nbest: int) -> list[list[tuple[Tensor, float]]]:
        """Symbols and log-probability of the best prefixes of each row, the rows in the order that they came in."""
        state = self._start()
        finals = torch.empty_like(state.total)
        history: list[tuple[Tensor, Tensor]] = []
        for frame in range(self.frames.shape[1] + 1):
            num_active = int((self.lengths > frame).sum())
            finals[num_active : len(state.total)] = state.total[num_active:]
            if num_active == 0:
                break
            state, step = self._advance(state.first_rows(num_active), frame)
            history.append(step)
        symbols = self._read_out(history, nbest)
        found: list[list[tuple[Tensor, float]]] = [[] for _ in self.order]
        for row, place in (finals[:, :nbest] > NEVER).nonzero().tolist():
            spelled = symbols[row, place]
            found[int(self.order[row])].append((spelled[spelled != self.blank], float(finals[row, place])))
        return found

    def _start(self) -> _Beam:
        """The empty prefix, before the first frame; the other places are unused."""
        shape = (len(self.frames), self.beam)
        never = torch.full(shape, NEVER, dtype=torch.float64)
        total, own = never.clone(), self.nobody.repeat(shape[0], 1)
        total[:, 0], own[:, 0] = 0.0, _FIRST
        last = torch.full(shape, self.blank)
        return _Beam(total, total, never, last, own, self.no_parent.repeat(shape[0], 1))

    def _advance(self, state: _Beam, frame: int) -> tuple[_Beam, tuple[Tensor, Tensor]]:
        """One frame: every prefix stays as it is, or grows by a symbol; the most probable ones make the new beam.

        Returns:
            The new beam, and what leads back: where each prefix stood in the old beam, and the symbol that it grew by (the
            blank where it did not), [n, K] each.
        """
        rows = len(state.total)
        log_probs, symbols = self.frames[:rows, frame], self.ranked.indices[:rows, frame]  # [n, V], [n, R]
        candidates = self._grow(state.total, self.ranked.values[:rows, frame])  # [n, K + M + 1]
        rank = torch.full(log_probs.shape, symbols.shape[1]).scatter_(1, symbols, _indices(symbols))
        rank[:, self.blank] = symbols.shape[1]  # it may stand among symbols that are as impossible
        last_rank = rank.gather(1, state.last)
        last_log_prob = log_probs.gather(1, state.last)
        # a symbol behind itself needs a blank between: only the paths that end in one grow by it
        candidates.scatter_(1, self.place_of[self.places, last_rank], state.blank + last_log_prob)
        stays_blank = state.total + log_probs[:, self.blank, None]
        stays_symbol = state.symbol + last_log_prob

        parent, has_parent = _parents(state)
        after_itself = state.last.gather(1, parent) == state.last
        arriving = (
            torch.where(after_itself, state.blank.gather(1, parent), state.total.gather(1, parent)) + last_log_prob
        )
        stays_symbol = torch.logaddexp(stays_symbol, arriving.masked_fill_(~has_parent, NEVER))
        # those candidates are prefixes of the beam, where their probability has just been added
        arrived = self.place_of[parent, last_rank].masked_fill_(~has_parent, candidates.shape[1] - 1)
        candidates.scatter_(1, arrived, NEVER)

        torch.logaddexp(stays_blank, stays_symbol, out=candidates[:, : self.beam])
        total, chosen = candidates[:, :-1].topk(self.beam)
        return self._select(state, total, chosen, symbols, stays_blank, stays_symbol)

    def _grow(self, total: Tensor, values: Tensor) -> Tensor:
        """Log-probabilities of the candidates [n, K + M + 1]: room for the K that stay, M that grow, and a place for none."""
        rows = len(total)
        candidates = total.new_empty(rows, self.beam + self.num_candidates + 1)
        growing = candidates[:, self.beam : -1]
        torch.gather(total, 1, self.prefixes.expand(rows, -1), out=growing)
        growing += values.gather(1, self.ranks.expand(rows, -1))
        return candidates

    def _select(
        self, state: _Beam, total: Tensor, chosen: Tensor, symbols: Tensor, stays_blank: Tensor, stays_symbol: Tensor
    ) -> tuple[_Beam, tuple[Tensor, Tensor]]:
        """The beam of the chosen candidates, [n, K] places among them."""
        source = self.sources[chosen]
        stays = chosen < self.beam
        grown_by = symbols.gather(1, self.rank_of[chosen])
        own, last = state.own.gather(1, source), state.last.gather(1, source)
        grown = (own ^ (own >> 29)) * _MULTIPLIER + (grown_by + 1) * _INCREMENT  # modulo 2**64
        parent = torch.where(stays, state.parent.gather(1, source), own)
        unused = total == NEVER
        new = _Beam(
            total,
            blank=stays_blank.gather(1, source).masked_fill_(~stays, NEVER),
            symbol=torch.where(stays, stays_symbol.gather(1, source), total),
            last=torch.where(stays, last, grown_by),
            own=torch.where(unused, self.nobody, torch.where(stays, own, grown)),
            parent=torch.where(unused, self.no_parent, parent),
        )
        return new, (source, grown_by.masked_fill_(stays, self.blank))

    def _read_out(self, history: list[tuple[Tensor, Tensor]], nbest: int) -> Tensor:
        """Follows the best prefixes back through the frames: [B, nbest, T], the symbol that each frame added, or the blank."""
        symbols = torch.full((len(self.frames), nbest, len(history)), self.blank)
        place = self.places[:nbest].repeat(len(self.frames), 1)
        for frame in range(len(history) - 1, -1, -1):
            source, grown_by = history[frame]
            rows = len(source)
            symbols[:rows, :, frame] = grown_by.gather(1, place[:rows])
            place[:rows] = source.gather(1, place[:rows])
        return symbols


def _candidates(beam: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Which prefixes of a sorted beam may grow by which symbols of a sorted frame, [M] places and [M] ranks.

    log p(prefix i) + log p(symbol j) is at most that of every prefix above i with every symbol above j. Of these, one per prefix
    may be less, the symbol that the prefix ends in; so i * j + max(j - 1, 0) others are as good at least, and where that is the
    whole beam the pair cannot be needed. That leaves about K ln K of K * V pairs, and the result exact.
    """
    prefix, rank = torch.arange(beam)[:, None], torch.arange(num_ranks)[None]
    needed = prefix * rank + (rank - 1).clamp(min=0) < beam
    places, ranks = needed.nonzero(as_tuple=True)
    return places, ranks


def _parents(state: _Beam) -> tuple[Tensor, Tensor]:
    """Where in the beam each prefix without its last symbol stands, and whether it does, [n, K] each."""
    sorted_own, order = state.own.sort(dim=1)
    found = torch.searchsorted(sorted_own, state.parent).clamp_(max=state.own.shape[1] - 1)
    return order.gather(1, found), sorted_own.gather(1, found) == state.parent


def _indices(values: Tensor) -> Tensor:
    return torch.arange(values.shape[1]).expand_as(values)
