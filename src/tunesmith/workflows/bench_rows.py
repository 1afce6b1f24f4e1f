"""Rows in the shape of the Alpaca data, made up: an instruction, now and then an input, an answer.

The words are common ones in the proportions of English (Zipf's law), so that a tokenizer works on them as on
real text; the lengths are log-normal, about those of the Alpaca rows that GPT-4 answered. The same seed
always gives the same rows, and a row does not depend on how many there are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

Row = dict[str, str]

# Middle number of words and spread of each part; the longest answer still fits 512 tokens.
INSTRUCTION, INPUT, ANSWER = (13, 0.4), (24, 0.6), (105, 0.65)
WITH_INPUT = 0.4
MOST_WORDS = {INSTRUCTION: 30, INPUT: 60, ANSWER: 280}

TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said
what its about than into them can only other time new some could these two may first then do any like my now
over such our man me even most made after also did many off before must well back through years much where
your way down should because long each just state people those too Mr how little good world make very year
still see work life men day old between here never another while last know might us great since against take
himself few house use during without again place around small however found every part thought name water
number write sentence describe explain list example following question answer give three reasons summary
article text language learning machine data science history energy health food recipe travel city country
school student teacher music story character poem color animal planet system process important different
increase reduce improve create develop provide include consider require support change cause effect problem
solution method result research study report company market product customer service price cost benefit risk
team project manager employee email letter message website computer software program function variable
temperature climate weather ocean forest mountain river garden family friend child parent community
government policy law right freedom culture society economy technology internet information communication
environment renewable sustainable photosynthesis equation triangle probability democracy infrastructure
entrepreneurship
"""
WORDS = TEXT.split()
_WEIGHTS = list(itertools.accumulate(1 / rank for rank in range(1, len(WORDS) + 1)))
_ENDS = (".", ".", ".", "?", "!", ":")


def alpaca_rows(count: int, seed: int = 0) -> Iterator[Row]:
    """`count` rows with instruction, input (often empty) and output."""
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        given = _text(draw, INPUT) if draw.random() < WITH_INPUT else ""
        yield {"instruction": _text(draw, INSTRUCTION), "input": given, "output": _text(draw, ANSWER)}


def _text(draw: random.Random, size: tuple[int, float]) -> str:
    middle, spread = size
    left = min(max(3, round(middle * draw.lognormvariate(0.0, spread))), MOST_WORDS[size])
    sentences = []
    while left > 0:
        words = draw.choices(WORDS, cum_weights=_WEIGHTS, k=min(left, draw.randint(5, 18)))
        left -= len(words)
        if len(words) > 8:
            words[len(words) // 2] += ","
        sentences.append(" ".join(words).capitalize() + draw.choice(_ENDS))
    return " ".join(sentences)
