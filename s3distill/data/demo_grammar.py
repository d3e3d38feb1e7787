"""What the demo corpus says: a closed command grammar, with every word about equally frequent.

A sentence has 3 to 5 words in the order action, number, colour, thing, place; the thing is always there, and up to two
of the others are left out: "MOVE SEVEN BLUE WINDOWS TODAY", "PINK LAMPS AGAIN". The words are regular in spelling and
far from each other in sound, and none has a doubled letter, which would cost CTC an extra frame.
"""

from __future__ import annotations

import itertools
import random

THINGS = ("LAMPS", "PENCILS", "WINDOWS", "TABLES", "MONKEYS", "SHIPS", "FLOWERS")
OPTIONAL_SLOTS = {
    "action": ("BRING", "TAKE", "LIFT", "COUNT", "MOVE"),
    "number": ("TWO", "FIVE", "SIX", "SEVEN", "MANY"),
    "colour": ("RED", "BLUE", "PINK", "WHITE", "GOLDEN"),
    "place": ("HOME", "OUTSIDE", "AGAIN", "TODAY", "UPSTAIRS"),
}
VOCABULARY = tuple(sorted([*THINGS, *itertools.chain.from_iterable(OPTIONAL_SLOTS.values())]))

# Which optional slots a sentence has. Five entries of one word each against THINGS' seven: with 2.9 optional words a
# sentence, 2.9 / 20 is about 1 / 7. Each slot stands in the same number of patterns.
_NAMES = tuple(OPTIONAL_SLOTS)
PATTERNS = (
    *[_NAMES] * 4,
    *[tuple(name for name in _NAMES if name != left_out) for left_out in _NAMES] * 2,
    *itertools.combinations(_NAMES, 2),
)


class SentenceSource:
    """An endless stream of sentences from decks that are shuffled anew when they run out.

    A deck per slot and one of patterns keep the counts of all words even in any stretch of the stream.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
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
            words = [str(self._deal(slot, OPTIONAL_SLOTS[slot])) for slot in OPTIONAL_SLOTS if slot in pattern]
            # A place stands last, the thing before it
            words.insert(len(words) - ("place" in pattern), str(self._deal("thing", THINGS)))
            sentence = " ".join(words)
            if sentence not in forbidden:
                return sentence
