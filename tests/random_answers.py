"""Random schemas, and answers of a model of random logits that are held to a grammar."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from tunesmith.model.grammar import Grammars, GrammarSpec
from tunesmith.model.requests import SamplingParams
from tunesmith.model.sampling import RowState, sample


def random_answers(
    grammars: Grammars, spec: GrammarSpec, tokenizer: Any, seeds: Sequence[int], *, most: int = 400
) -> list[str | None]:
    """Drawn at temperature 1, special tokens shown; None for an answer that did not end in `most` tokens."""
    stop_ids = tuple(grammars.stop_ids)
    params = [SamplingParams(temperature=1.0, seed=s, stop_ids=stop_ids, grammar=spec) for s in seeds]
    rows = [RowState(p, grammars) for p in params]
    ids: list[list[int]] = [[] for _ in rows]
    texts: list[str | None] = [None for _ in rows]
    noise = torch.Generator().manual_seed(seeds[0])
    for _ in range(most):
        running = [i for i, text in enumerate(texts) if text is None]
        if not running:
            break
        logits = torch.randn(len(running), grammars.vocab_size, generator=noise) * 2
        for i, token in zip(running, sample(logits, [rows[i] for i in running]), strict=True):
            assert token >= 0
            rows[i].count(token)
            if token not in stop_ids:
                ids[i].append(token)
            if token in stop_ids or rows[i].ended:
                texts[i] = tokenizer.decode(ids[i])
    return texts


class RandomSchema:
    """Schemas of every kind that the library knows, small enough for random answers to end."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def make(self, depth: int = 3) -> dict[str, Any]:
        kinds = [self._integer, self._number, self._text, self._enum, self._simple]
        if depth:
            kinds += [self._array, self._object, self._object, self._any_of]
        kind = self._random.choice(kinds)
        return kind(depth - 1) if kind in (self._array, self._object, self._any_of) else kind(0)

    def object(self) -> dict[str, Any]:
        return self._object(2)

    def _integer(self, _: int) -> dict[str, Any]:
        low = self._random.randint(-500, 500)
        exact = {"minimum": low, "maximum": low + self._random.randint(0, 2000)}
        step = {"type": "integer", "multipleOf": self._random.choice([2, 5, 10]), "minimum": 0, "maximum": 90}
        return self._random.choice([{"type": "integer"} | exact, step, {"type": "integer"}])

    def _number(self, _: int) -> dict[str, Any]:
        low = self._random.uniform(-10, 10)
        bound = {"exclusiveMinimum": round(low, 2), "maximum": round(low + 7.5, 2)}
        return {"type": "number"} | self._random.choice([{}, bound])

    def _text(self, _: int) -> dict[str, Any]:
        least = self._random.randint(0, 4)
        return {"type": "string"} | self._random.choice(
            [
                {"minLength": least, "maxLength": least + self._random.randint(0, 12)},
                {"pattern": r"^[A-ZÄÖÜ][a-zäöüß]{1,9}$"},
                {"pattern": r"^\d{3}-[0-9a-f]{4}$"},
                {"format": self._random.choice(["date", "date-time", "uuid", "ipv4"])},
            ]
        )

    def _enum(self, _: int) -> dict[str, Any]:
        values = ["red", "grün", "蓝色", "🙂", 'qu"ote', "back\\slash", "a\nb", 7, -1.5, True, None]
        some = self._random.sample(values, self._random.randint(1, len(values)))
        return {"enum": some} if self._random.random() < 0.8 else {"const": some[0]}

    def _simple(self, _: int) -> dict[str, Any]:
        return {"type": self._random.choice(["boolean", "null", ["integer", "null"]])}

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._random.randint(0, 2)
        more = {"minItems": least, "maxItems": least + self._random.randint(0, 3)}
        if self._random.random() < 0.3:
            return {"type": "array", "prefixItems": [self.make(0), self.make(0)], "items": False}
        return {"type": "array", "items": self.make(depth)} | more

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(["id", "name", "größe", "键", "a b", "$x", 'q"', "z" * 20], 3)
        properties = {name: self.make(depth) for name in names}
        required = [name for name in names if self._random.random() < 0.5]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.make(depth), self.make(0)]}
