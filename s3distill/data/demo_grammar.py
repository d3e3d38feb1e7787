"""What the demo corpora say: a closed command grammar, with every word about equally frequent.

A sentence has 3 to 5 words out of action, number, colour, thing and place; the thing is always there, and up to two of
the others are left out: "MOVE SEVEN BLUE WINDOWS TODAY", "PINK LAMPS AGAIN". The words are in `demo_languages`.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

OPTIONAL_SLOTS = ("action", "number", "colour", "place")

# Which optional slots a sentence has. Five entries of one word each against the seven things: with 2.9 optional words a
# sentence, 2.9 / 20 is about 1 / 7. Each slot stands in the same number of patterns.
PATTERNS = (
    *[OPTIONAL_SLOTS] * 4,
    *[tuple(slot for slot in OPTIONAL_SLOTS if slot != left_out) for left_out in OPTIONAL_SLOTS] * 2,
    *itertools.combinations(OPTIONAL_SLOTS, 2),
)


@dataclass(frozen=True)
class Grammar:
    """The words of a language: five for each optional slot and seven things, upper-case; ``order`` is its word order."""

    action: tuple[str, ...]
    number: tuple[str, ...]
    colour: tuple[str, ...]
    thing: tuple[str, ...]
    place: tuple[str, ...]
    order: tuple[str, ...] = ("action", "number", "colour", "thing", "place")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """All words, sorted."""
        return tuple(sorted([*self.action, *self.number, *self.colour, *self.thing, *self.place]))


class SentenceSource:
    """An endless stream of sentences from decks that are shuffled anew when they run out.

    A deck per slot and one of patterns keep the counts of all words even in any stretch of the stream.
    """

    def __init__(self, rng: random.Random, grammar: Grammar) -> None:
        self._rng = rng
        self._grammar = grammar
        self._decks: dict[str, list] = {}

    def _deal(self, name: str, cards: tuple) -> str | tuple[str, ...]:
        deck = self._decks.setdefault(name, [])
        if not deck:
            deck.extend(cards)
            self._rng.shuffle(deck)
        return deck.pop()

    def next(self, forbidden: set[str]) -> str:
        """Deals the next sentence that is not in ``forbidden``: upper-case words with a space between."""
        while True:
            pattern = self._deal("pattern", PATTERNS)
            # Dealt in one order in every language, the thing last; spoken in the language's own
            slots = [*(slot for slot in OPTIONAL_SLOTS if slot in pattern), "thing"]
            words = {slot: str(self._deal(slot, getattr(self._grammar, slot))) for slot in slots}
            sentence = " ".join(words[slot] for slot in self._grammar.order if slot in words)
            if sentence not in forbidden:
                return sentence
