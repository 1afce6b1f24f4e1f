"""A tokenizer as llama.cpp reads it from a GGUF file: tokens, their types, merges, and how text is cut first.

llama.cpp does not read a tokenizer's own regular expression: the file names one of its built-in ways to cut
text ("pre-tokenizers", llama.cpp src/llama-vocab.cpp). The name is found by what the tokenizer does: it must
cut varied text exactly as that way does, or the export is refused.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from tokenizers import Regex, pre_tokenizers

from tunesmith.core.errors import UserError

# Token types of GGUF (gguf.TokenType).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Those whose merges llama.cpp skips for a piece of text that is a token itself (`ignore_merges`).
_WHOLE_PIECES_FIRST = {"llama-bpe", "tekken"}
_ALPHABET = (
    "aBcDéßЖщאبक्षก中文字日かハ한글ǅʰ0123456789٣४²½IVⅫ.,;:!?-_/\\'\"()[]{}<>|@#$%^&*+=~`“”…€™→😀👩‍💻🇩🇪"
    "\u0301\u200d\ufe0f\u00a0\u3000 \t\n\r   \n\n"
)
_CONTRACTIONS = ("'s", "'T", "'re", "'VE", "'ll", "'D", "n't", "'m ")
_SENTENCES = (
    "Hello world! It's 2024-03-17, 12345678 things; WE'RE fine, I'll see.  Two  spaces.\n\n\tTab\r\nend ",
    "def f(x):\n    return {'a': x/2, 'b': [1, 22, 333, 4444]}  # //comment///\n",
    "Größe übertrifft naïve façade; Привет, мир! 你好，世界。こんにちは 안녕 مرحبا 🎉🎉 ½ ² ٣",
)


@dataclass(frozen=True)
class GgufTokenizer:
    """What is written under `tokenizer.ggml`; scores and add_space_prefix for the kind "llama" alone.

    notes: where llama.cpp's own tokenization of text may differ, for people.
    """

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None
    add_space_prefix: bool | None
    add_bos: bool
    add_eos: bool
    notes: tuple[str, ...] = ()


def gguf_tokenizer(tokenizer: Any, vocab_size: int) -> GgufTokenizer:
    """`tokenizer` for a model of `vocab_size` tokens. Raises UserError for one that llama.cpp has not got."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unsupported(f"a {type(tokenizer).__name__} without tokenizer.json")
    raw = json.loads(backend.to_str())
    kind = raw["model"]["type"]
    if kind != "BPE":
        raise _unsupported(f"a {kind} model; only BPE is written")
    tokens, types = _tokens(tokenizer, raw, vocab_size)
    add_bos, add_eos = _added_around(tokenizer)
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in raw["model"]["merges"]]
    if raw["model"].get("byte_fallback"):
        return _sentencepiece(raw, tokens, types, pairs, add_bos, add_eos)
    pre, notes = _pre_tokenizer(backend, raw)
    merges = [f"{left} {right}" for left, right in pairs]
    return GgufTokenizer("gpt2", pre, tokens, types, merges, None, None, add_bos, add_eos, notes)


def _tokens(tokenizer: Any, raw: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids that no token has are unused."""
    vocab: dict[str, int] = raw["model"]["vocab"]
    added = {entry["id"]: entry for entry in raw["added_tokens"]}
    last = max([*vocab.values(), *added])
    if last >= vocab_size:
        raise UserError(
            f"the tokenizer has {last + 1} tokens, but the model's embeddings have {vocab_size} rows",
            hint="export with the tokenizer that belongs to the model",
        )
    tokens = [f"[UNUSED_{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    byte_fallback = bool(raw["model"].get("byte_fallback"))
    for text, number in vocab.items():
        tokens[number] = text
        types[number] = BYTE if byte_fallback and _is_byte(text) else NORMAL
    for number, entry in added.items():
        tokens[number] = entry["content"]
        types[number] = CONTROL if entry["special"] else USER_DEFINED
    if byte_fallback and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    return tokens, types


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether plain text gets the begin token before it, and the end token after it."""
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    full = list(tokenizer("a").input_ids)
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    head, tail = full[:at], full[at + len(bare) :]
    if head not in ([], [tokenizer.bos_token_id]) or tail not in ([], [tokenizer.eos_token_id]):
        raise _unsupported(f"one that writes the tokens {head} before text and {tail} after it")
    return bool(head), bool(tail)


# -- byte-level BPE ----------------------------------------------------------------------------------


def _pre_tokenizer(backend: Any, raw: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    notes = _normalizer_notes(raw.get("normalizer"))
    if backend.pre_tokenizer is None:
        raise _unsupported("byte-level BPE without a pre-tokenizer")
    name = pre_tokenizer_name(backend.pre_tokenizer)
    whole_first = bool(raw["model"].get("ignore_merges"))
    if whole_first != (name in _WHOLE_PIECES_FIRST):
        raise _unsupported(f"pre-tokenizer '{name}' with ignore_merges: {str(whole_first).lower()}")
    return name, notes


def _normalizer_notes(normalizer: dict[str, Any] | None) -> tuple[str, ...]:
    kind = normalizer["type"] if normalizer else None
    if kind is None or (kind == "Sequence" and not (normalizer or {}).get("normalizers")):
        return ()
    if kind == "NFC":
        return (
            "the tokenizer brings text into Unicode form NFC first, llama.cpp does not: send it in that form",
        )
    raise _unsupported(f"a normalizer '{kind}', which llama.cpp has not got")


def pre_tokenizer_name(found: Any) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer. Raises UserError when it cuts text as none known."""
    for name, reference in _references().items():
        if all(_pieces(found, text) == _pieces(reference, text) for text in probe_texts()):
            return name
    raise _unsupported(
        f"a pre-tokenizer that cuts text as none of {', '.join(_references())} does, so llama.cpp would "
        "feed other tokens than the training"
    )


def _pieces(pre_tokenizer: Any, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


@cache
def _references() -> dict[str, Any]:
    """The ways that llama.cpp has, as the tokenizers of the model families write them."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])

    return {
        "llama-bpe": split(_LLAMA3),
        "qwen2": split(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
        "tekken": split(_TEKKEN),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "gpt-2": gpt2,
    }


@cache
def probe_texts() -> tuple[str, ...]:
    """Fixed sentences, and random strings of characters at which ways to cut text differ."""
    chance = random.Random(20240229)
    drawn = []
    for _ in range(200):
        parts = [
            chance.choice(_CONTRACTIONS) if chance.random() < 0.05 else chance.choice(_ALPHABET)
            for _ in range(chance.randint(1, 60))
        ]
        drawn.append("".join(parts))
    return (*_SENTENCES, *drawn)


# -- SentencePiece's BPE -----------------------------------------------------------------------------


def _sentencepiece(
    raw: dict[str, Any],
    tokens: list[str],
    types: list[int],
    pairs: Sequence[tuple[str, ...]],
    add_bos: bool,
    add_eos: bool,
) -> GgufTokenizer:
    if types.count(BYTE) != 256:
        raise _unsupported(f"BPE with byte fallback and {types.count(BYTE)} of the 256 byte tokens")
    prefix, notes = _space_prefix(raw)
    # llama.cpp joins the pair whose token has the best score; tokenizers the pair of the earliest merge.
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(text, len(pairs))) for text in tokens]
    return GgufTokenizer("llama", "default", tokens, types, [], scores, prefix, add_bos, add_eos, notes)


def _space_prefix(raw: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether text gets a space before it; the two spellings that tokenizers has for SentencePiece."""
    normalizer, pre = raw.get("normalizer"), raw.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if pre is None and steps == [{"type": "Prepend", "prepend": "▁"}, replace]:
        return True, ()
    if pre is None and steps == [replace]:
        return False, ()
    if not steps and pre is not None and pre["type"] == "Metaspace" and not pre.get("split", True):
        notes: tuple[str, ...] = (
            "llama.cpp puts a space before text that begins with one, the tokenizer does not",
        )
        if pre["prepend_scheme"] == "first":
            notes += ("llama.cpp puts a space before text after a control token, the tokenizer does not",)
        return (False, ()) if pre["prepend_scheme"] == "never" else (True, notes)
    raise _unsupported("BPE with byte fallback whose normalizer and pre-tokenizer are not SentencePiece's")


def _unsupported(what: str) -> UserError:
    return UserError(
        f"the tokenizer cannot be written as GGUF: {what}",
        hint="serve the model itself ('tunesmith serve'), or export it with --to merged",
    )
