"""The recipe's `compat` section: train on what another tool would have trained on, for comparison."""

from __future__ import annotations

from string import Formatter
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema


class Template(BaseModel):
    """How one turn is written, with {input}, {system} and {round} (from 1) put in; no Jinja."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    system: str = Field(
        "<|im_start|>system\n{system}<|im_end|>\n",
        description="Text before a turn that has a system message.",
    )
    instruction: str = Field(
        "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
        description="The question, up to where the answer begins.",
    )
    suffix: str = Field("<|im_end|>", description="Text right after an answer; it is learned.")
    suffix_as_eos: bool = Field(
        True, description="The suffix ends an answer; false: the tokenizer's end token follows it, learned."
    )
    sep: str = Field("\n", description="Text after that; not learned.")

    @field_validator("system", "instruction")
    @classmethod
    def _known_slots(cls, text: str) -> str:
        """Raises ValueError for anything in braces that is not put in."""
        for _, name, spec, conversion in Formatter().parse(text):
            if name is not None and (name not in ("input", "system", "round") or spec or conversion):
                raise ValueError(f"'{{{name}}}' is not put in; {{input}}, {{system}} and {{round}} are")
        return text


class Compat(BaseModel):
    """Token ids, labels, packs, order and learning rates of another tool's run, its traps included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tool: Literal["xtuner"] = Field("xtuner", description="The tool and its rules: xtuner 0.1.18.")
    template: Template = Field(Template(), description="Its prompt template; default: ChatML without system.")
    map_workers: int = Field(
        32,
        ge=1,
        description="Processes that it packs with: rows are cut into so many shards before packing, and the "
        "tokens left over at the end of each are lost.",
    )
    warmup_start: float = Field(
        1e-5, gt=0, le=1, description="Learning rate at the first micro-batch, as a share of train.lr."
    )
    gpus: int = Field(1, ge=1, description="GPUs of the run that is reproduced.")
    deepspeed: bool = Field(
        False, description="As with --deepspeed: micro-batches after the last whole step are never applied."
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """`compat: xtuner` is short for its defaults."""
        return {"tool": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Editors are told of the short form too."""
        return {"anyOf": [{"const": "xtuner"}, handler(core)]}
