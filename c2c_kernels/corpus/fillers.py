"""Made-up names, places, days and numbers, each belonging to one split for good."""

from __future__ import annotations

import random
from collections.abc import Callable

from c2c_kernels.corpus.documents import split_of

_FIRST = (
    "Ada Agnes Alba Amara Anton Arvid Astrid Basil Beatrix Bruno Carmen Casper Cecil Clara Cyrus Dagmar Daria Dexter "
    "Edith Elias Elsa Emil Enid Ester Fabian Felix Flora Freya Gerda Gideon Greta Gustav Hanna Hector Helga Hugo Ida "
    "Imogen Ingrid Ivo Jasper Johanna Jonas Karl Katya Klara Lars Leona Linus Lotte Lucian Magda Marius Marta Milo "
    "Nadia Nils Nora Olga Oscar Otto Paula Petra Quentin Rafael Rosa Rupert Sabine Silas Sonja Sven Tamara Thea Tobias "
    "Ulrich Ursula Vera Viktor Wanda Wilma Xenia Yara Yusuf Zelda"
)
_LAST_HEAD = "Ald Ash Bar Bel Brand Bro Cald Car Dal Dun El Fair Fen Gar Gold Har Hol Kel Lang Lor Mar Mor Nor Oak Pel"
_LAST_TAIL = "berg bury by dale den ell er field ford gate ham hurst ing ley low man mont more ner ridge sen son ton"
_TOWN_HEAD = (
    "Amber Birch Black Bright Cold Copper Crow Deep East Ever Fox Glen Green Grey High Iron Kings Long Maple North Old "
    "Pine Raven Red Salt Silver South Stone Summer Swan Thorn West White Wild Winter Wolf"
)
_TOWN_TAIL = (
    "bank bay bourne bridge brook cliff combe cross dale fall field ford gate grove haven hill holm mere mill moor "
    "mouth pass point port ridge shore side stead ton vale view water well wick wood worth"
)
_SHIP = "Arrow Beacon Comet Dolphin Eagle Falcon Gull Heron Lantern Meteor Otter Pelican Petrel Swallow Tempest Venture"
_COLOUR = "Amber Azure Crimson Emerald Golden Indigo Ivory Scarlet Silver Violet"
_FIRM_TAIL = "Brewery Foundry Glassworks Mills Museum Observatory Orchestra Press Shipyard Society Theatre Works"
_MONTHS = "January February March April May June July August September October November December"
# No vowel at the start: an article stands before it.
_MATERIAL = (
    "brass bronze clay copper cotton glass granite leather linen marble paper pewter pine silk silver slate steel "
    "straw tin velvet walnut wax wool"
)
_WORDS = (
    "acorn anvil barrel basket bell bottle button candle carpet clock compass cradle drum feather flute hammer harp "
    "kettle ladder lamp lantern mirror needle oar pillow pitcher ribbon saddle scarf shovel spoon teapot trumpet"
)


def _one_of(words: str, draw: random.Random) -> str:
    return draw.choice(words.split(" "))


def _person(draw: random.Random) -> str:
    return f"{_one_of(_FIRST, draw)} {_one_of(_LAST_HEAD, draw)}{_one_of(_LAST_TAIL, draw)}"


def _place(draw: random.Random) -> str:
    return _one_of(_TOWN_HEAD, draw) + _one_of(_TOWN_TAIL, draw)


def _ship(draw: random.Random) -> str:
    return f"{_one_of(_COLOUR, draw)} {_one_of(_SHIP, draw)}"


def _firm(draw: random.Random) -> str:
    return f"{_place(draw)} {_one_of(_FIRM_TAIL, draw)}"


def _day(draw: random.Random) -> str:
    return f"{draw.randint(1, 28)} {_one_of(_MONTHS, draw)}"


def _year(draw: random.Random) -> str:
    return str(draw.randint(1100, 1999))


def _number(draw: random.Random) -> str:
    return str(draw.randint(12, 999))


def _thing(draw: random.Random) -> str:
    return f"{_one_of(_MATERIAL, draw)} {_one_of(_WORDS, draw)}"


KINDS: dict[str, Callable[[random.Random], str]] = {
    "name": _person,
    "place": _place,
    "ship": _ship,
    "firm": _firm,
    "day": _day,
    "year": _year,
    "number": _number,
    "thing": _thing,
}


def fill(kind: str, split: str, draw: random.Random) -> str:
    """A filler of `kind` that only documents of `split` use."""
    while True:
        made = KINDS[kind](draw)
        if split_of(f"{kind}/{made}") == split:
            return made
