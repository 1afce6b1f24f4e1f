"""A tokenizer and its chat template, from and to a local folder. Works where torch is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
from transformers import AddedToken, AutoTokenizer

from tunesmith.core import optional
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.loading import first_load
from tunesmith.model.quiet import quiet
from tunesmith.model.weights import TOKENIZER_FILES, clean_tokenizer_config, has_tokenizer


def load_tokenizer(
    folder: Path,
    *,
    chat_template: Path | None = None,
    trust_remote_code: bool = False,
    new_tokens: Sequence[str] = (),
) -> Any:
    """The tokenizer in `folder`; `chat_template` (a Jinja file) replaces its own template.

    `new_tokens`: texts that are each one token from now on. A model without a chat template is given as it
    is: `tokenizer.chat_template` is None. Raises UserError when the files are missing or damaged, the
    template is not Jinja, or a new token is none.
    """
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder}: no tokenizer: none of {', '.join(TOKENIZER_FILES[:3])} is there",
            hint="copy the tokenizer files of the model into the folder",
        )
    if trust_remote_code:
        with suppress(ImportError):
            optional.load("torch")  # a tokenizer's own code may import it, also where it is postponed
    try:
        # A known model's config class, by which its tokenizer is found, brings much else at its first use.
        with quiet(), first_load("torch._dynamo"):
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        raise load_error(folder, "tokenizer", error, trust_remote_code) from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    add_tokens(tokenizer, new_tokens)
    return tokenizer


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Make each of `tokens` one token, in templates and in rows alike, and shown when decoded.

    Raises UserError for one that is empty, given twice, or a token already.
    """
    for place, token in enumerate(tokens):
        fault = _fault(tokenizer, token, tokens[:place])
        if fault:
            raise UserError(f"model.new_tokens.{place}: '{token}' {fault[0]}", hint=fault[1])
    # Not 'special': such are taken as plain text in rows, and left out of answers.
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])


def _fault(tokenizer: Any, token: str, before: Sequence[str]) -> tuple[str, str] | None:
    if not token.strip():
        return "is empty", "take a text that stands for one thing, such as '<tool>'"
    if token != token.strip():
        return "begins or ends with a space", "leave the spaces out"
    if token in before:
        return "is there twice", "leave one of them out"
    if token in tokenizer.get_vocab():
        return (
            f"is already a token of the model (number {tokenizer.convert_tokens_to_ids(token)})",
            "leave it out: rows and templates can use it as it is",
        )
    return None


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer and its chat template to `folder`, without traces of this machine."""
    tokenizer.save_pretrained(folder)
    clean_tokenizer_config(folder / "tokenizer_config.json")


def read_template(path: Path) -> str:
    """The text of a Jinja file. Raises UserError when it is missing or does not parse."""
    try:
        text = path.read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"chat template {path}: {reason}", hint="check model.chat_template") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template {path}, line {error.lineno}: {error.message}") from None
    return text


class _Generation(jinja2.ext.Extension):
    """Lets the `{% generation %}` blocks of transformers' templates parse."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def load_error(folder: Path, part: str, error: Exception, trusted: bool) -> TunesmithError:
    """What to tell of a library's `error` while the `part` in `folder` was read."""
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text and not trusted:
        return UserError(
            f"{folder}: the {part} brings its own Python code, which is not run",
            hint="read that code, then set model.trust_remote_code: true",
        )
    return UserError(
        f"{folder}: the {part} could not be loaded: {text.splitlines()[0][:300]}",
        hint="check that the folder is whole: copy or fetch it again",
    )
