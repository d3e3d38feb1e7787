"""The languages of the demo corpora: the words of each, and the espeak-ng voices that speak them.

The words of a language are far from each other in sound, none has a doubled letter (which would cost CTC an extra
frame), and none belongs to two languages, so that no sentence of one language's test set is in another's train set.
Forms need no agreement: things are plural, adjectives have the form that goes with each of them, and the Romance
languages have their colour behind the thing. Sentences are telegraphic: no articles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s3distill.data.demo_grammar import Grammar

ROMANCE_ORDER = ("action", "number", "thing", "colour", "place")


@dataclass(frozen=True)
class Language:
    """A language: its English name, the espeak-ng voices of its accents, its words."""

    name: str
    accents: tuple[str, ...]
    grammar: Grammar


LANGUAGES = {
    "en": Language(
        "English",
        ("en-us", "en-gb"),
        Grammar(
            action=("BRING", "TAKE", "LIFT", "COUNT", "MOVE"),
            number=("TWO", "FIVE", "SIX", "SEVEN", "MANY"),
            colour=("RED", "BLUE", "PINK", "WHITE", "GOLDEN"),
            thing=("LAMPS", "PENCILS", "WINDOWS", "TABLES", "MONKEYS", "SHIPS", "FLOWERS"),
            place=("HOME", "OUTSIDE", "AGAIN", "TODAY", "UPSTAIRS"),
        ),
    ),
    "nl": Language(
        "Dutch",
        ("nl",),
        Grammar(
            action=("BRENG", "PAK", "KIES", "ZOEK", "SCHUIF"),
            number=("DRIE", "VIJF", "ZEVEN", "ACHT", "HONDERD"),
            colour=("RODE", "BLAUWE", "GROENE", "ZWARTE", "GOUDEN"),
            thing=("LAMPEN", "TAFELS", "BLOEMEN", "FIETSEN", "SCHEPEN", "SLEUTELS", "POTLODEN"),
            place=("THUIS", "BUITEN", "MORGEN", "OPNIEUW", "STRAKS"),
        ),
    ),
    "de": Language(
        "German",
        ("de",),
        Grammar(
            action=("HOLE", "SUCHE", "ZÄHLE", "KAUF", "TRAGE"),
            number=("ZWEI", "FÜNF", "SECHS", "SIEBEN", "ZEHN"),
            colour=("ROTE", "BLAUE", "GRÜNE", "GELBE", "SCHWARZE"),
            thing=("TISCHE", "BLUMEN", "FENSTER", "BÜCHER", "STIFTE", "KATZEN", "VÖGEL"),
            place=("HEUTE", "HIER", "BALD", "HINAUS", "JETZT"),
        ),
    ),
    "es": Language(
        "Spanish",
        ("es", "es-419"),  # of Spain, and of Latin America, where Z and soft C sound as S
        Grammar(
            action=("TRAE", "BUSCA", "MUEVE", "CUENTA", "LEVANTA"),
            number=("DOS", "CUATRO", "CINCO", "OCHO", "SIETE"),
            colour=("AZULES", "VERDES", "GRISES", "ROSA", "NARANJA"),
            thing=("LIBROS", "MESAS", "FLORES", "VENTANAS", "BARCOS", "LÁPICES", "CAMIONES"),
            place=("HOY", "AQUÍ", "FUERA", "MAÑANA", "ABAJO"),
            order=ROMANCE_ORDER,
        ),
    ),
    "fr": Language(
        "French",
        ("fr",),
        Grammar(
            # Numbers that sound the same before every thing, and no thing or colour that would take a liaison
            action=("POSE", "COMPTE", "CHERCHE", "DÉPLACE", "LÈVE"),
            number=("DEUX", "TROIS", "QUATRE", "SEPT", "QUINZE"),
            colour=("ROUGES", "JAUNES", "MAUVES", "TURQUOISE", "CRÈME"),
            thing=("LAMPES", "FLEURS", "SINGES", "BATEAUX", "CRAYONS", "CHAISES", "FENÊTRES"),
            place=("DEHORS", "DEMAIN", "PARTOUT", "BIENTÔT", "MAINTENANT"),
            order=ROMANCE_ORDER,
        ),
    ),
    "it": Language(
        "Italian",
        ("it",),
        Grammar(
            action=("PRENDI", "CONTA", "MUOVI", "CERCA", "ALZA"),
            number=("DUE", "CINQUE", "NOVE", "DIECI", "VENTI"),
            colour=("BLU", "VIOLA", "VERDI", "ARANCIONE", "TURCHESE"),
            thing=("LAMPADE", "LIBRI", "FIORI", "TAVOLI", "MATITE", "FINESTRE", "CHIAVI"),
            place=("QUI", "GIÙ", "DOMANI", "ANCORA", "SUBITO"),
            order=ROMANCE_ORDER,
        ),
    ),
}


def check_languages(languages: Sequence[str]) -> tuple[str, ...]:
    """The languages in the order of `LANGUAGES`, so that the same set gives the same corpus.

    Raises:
        ValueError: none, an unknown one, or one twice.
    """
    unknown = sorted(set(languages) - LANGUAGES.keys())
    fault = ""
    if unknown:
        fault = f"unknown: {', '.join(map(repr, unknown))}"
    elif not languages:
        fault = "it names none"
    elif len(set(languages)) < len(languages):
        fault = "one stands twice"
    if fault:
        raise ValueError(
            f"`languages` must be some of {', '.join(LANGUAGES)}, but is {','.join(languages)!r} ({fault}); "
            "pass en,nl,de,es"
        )
    return tuple(language for language in LANGUAGES if language in languages)
