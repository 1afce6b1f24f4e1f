"""What became of every row of a file: nothing is lost silently."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class FileCounts:
    """Counts of one file. rows = kept + dropped + empty + unsupervised + malformed (+ duplicate, if dropped).

    dropped: longer than max_length. truncated: cut to max_length and kept; cut_answers of them lost their
    stop token. duplicate: the same content came before. unsupervised: no token to learn. malformed: rows
    that are not what the format says (preparing stops at them). tokens_kept and tokens_supervised are of
    the kept rows; tokens_dropped of the others, and what truncation cut off. special_strings: rows with
    control-token strings in their text, taken as plain text. unmatched_answers, merged_answers,
    answers_without_stop: see model.template.Encoded (unmatched, straddled, without_stop).
    """

    file: str
    format: str
    source: int
    weight: float
    used_for: str
    rows: int = 0
    kept: int = 0
    train_rows: int = 0
    eval_rows: int = 0
    dropped: int = 0
    truncated: int = 0
    empty: int = 0
    duplicate: int = 0
    unsupervised: int = 0
    malformed: int = 0
    cut_answers: int = 0
    tokens_kept: int = 0
    tokens_supervised: int = 0
    tokens_dropped: int = 0
    special_strings: int = 0
    unmatched_answers: int = 0
    merged_answers: int = 0
    answers_without_stop: int = 0
    from_cache: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def notes(self) -> list[str]:
        """What a person should know of this file, one sentence each."""
        told = [
            (self.dropped, "rows are longer than max_length and dropped"),
            (self.truncated, "rows were cut at max_length"),
            (self.cut_answers, "answers lost their stop token by that: the model does not learn to end them"),
            (self.empty, "rows are empty and left out"),
            (self.unsupervised, "rows have no token to learn and are left out"),
            (self.duplicate, "rows have the content of an earlier one"),
            (self.special_strings, "rows hold control-token strings, which were taken as plain text"),
            (self.unmatched_answers, "answers are rendered differently by the template later in the "
             "conversation than when they are generated, and are not learned"),
            (self.merged_answers, "answers begin with a token merged into template text; it is not learned"),
            (self.answers_without_stop, "answers are followed by no stop token in this template"),
        ]  # fmt: skip
        return [f"{self.file}: {count:,} {text}" for count, text in told if count]


def totals(files: list[FileCounts]) -> dict[str, int]:
    """The sums over all files."""
    names = [f.name for f in fields(FileCounts) if f.type == "int" and f.name != "source"]
    return {name: sum(getattr(counts, name) for counts in files) for name in names}
