"""The recipe's section `serve`: how a model is put behind the API. Its fields are the options of
`tunesmith serve` too, so that each is described, bounded and given its default once."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from tunesmith.recipe.section import Auto, Section

NO_KEYS_FILE = "none"
_OPTIONS = {
    "adapters": "--adapter",
    "cors_origins": "--cors-origin",
    "request_timeout_s": "--request-timeout",
    "grace_s": "--grace",
}
_Text = Annotated[str, Field(min_length=1)]


def option_of(name: str) -> str:
    """The option of `tunesmith serve` for the setting `name`."""
    return _OPTIONS.get(name) or "--" + name.replace("_", "-")


class Serve(Section):
    """The endpoint. Paths are relative to where `tunesmith serve` is called."""

    host: _Text = Field(
        "127.0.0.1", description="Address to listen on; the default is reachable from this machine only."
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one.")
    model_name: _Text | None = Field(
        None, description="Name in /v1/models; default: the run's or folder's name."
    )
    adapters: dict[str, _Text] = Field(
        default_factory=dict,
        description="More models on the same base: the name of each, and its adapter folder or run.",
    )
    merge: bool = Field(False, description="Fold the adapter into the weights: one model, faster.")
    max_length: Annotated[int, Field(ge=8)] | Auto = Field(
        "auto",
        description="Most tokens of prompt and answer together; auto: the model's limit, at most 4096.",
    )
    precision: Literal["fp32", "bf16", "fp16"] | Auto = Field(
        "auto", description="Of the served weights; auto: fp32 on CPU, bf16 on GPU."
    )
    weights: Literal["fp32", "bf16", "int8", "nf4"] | None = Field(
        None,
        description="Format of the weights: int8 and nf4 take the least memory; default: as precision says.",
    )
    engine: Literal["auto", "local", "vllm", "llamacpp"] = Field(
        "auto",
        description="What computes: local is our own, llamacpp serves a GGUF file. auto: vllm where it is "
        "installed beside a GPU, else local; the machine that serves decides.",
    )
    max_concurrent: int = Field(
        32, ge=1, description="Requests computed at the same time; more wait in line."
    )
    cache_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens of all prompts and answers that an engine keeps; default: what max_concurrent "
        "requests of max_length may need.",
    )
    replicas: int = Field(1, ge=1, le=64, description="Engines, each a process with the whole model.")
    api_key: str | None = Field(
        None, description="Key that clients must send, which may do everything; or set $TUNESMITH_API_KEY."
    )
    keys_file: _Text | None = Field(
        None,
        description="Keys with names, limits and rights, of 'tunesmith keys'; none: no file; default: "
        "$TUNESMITH_KEYS_FILE, else the user's own file where it has keys.",
    )
    cors_origins: list[str] = Field(
        default_factory=list,
        description="Web pages that may ask, such as https://chat.example.org; '*': all.",
    )
    metrics_open: bool = Field(False, description="Let other machines read /metrics without a key.")
    tls_cert: _Text | None = Field(None, description="Certificate chain (PEM): answer over https.")
    tls_key: _Text | None = Field(
        None, description="Its key (PEM), where the certificate's file does not hold it."
    )
    max_waiting: int = Field(1024, ge=1, description="Requests in line; one more is refused with 429.")
    max_requests: int = Field(
        1024, ge=1, description="Requests under way altogether, in line or computed; one more gets 429."
    )
    max_body_mib: float = Field(
        8.0, ge=0.001, allow_inf_nan=False, description="Largest body of a request, in MiB."
    )
    request_timeout_s: float = Field(
        3600.0, ge=0.1, allow_inf_nan=False, description="Seconds that a request may take, waiting included."
    )
    grace_s: float = Field(
        # Docker kills a container ten seconds after it has asked it to end.
        8.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds for running requests when the server is asked to end.",
    )
    log_requests: _Text | None = Field(
        None, description="File for one JSON line a request, without its text; '-': on stderr."
    )
    log_prompts: bool = Field(False, description="Prompts and answers too, in log_requests.")

    @field_validator("weights")
    @classmethod
    def _one_format(cls, weights: str | None, info: ValidationInfo) -> str | None:
        precision = info.data.get("precision", "auto")
        if weights in ("fp32", "bf16") and precision not in ("auto", weights):
            raise ValueError(f"is not what serve.precision says: '{precision}'")
        return weights

    @field_validator("adapters")
    @classmethod
    def _have_names(cls, adapters: dict[str, str]) -> dict[str, str]:
        if "" in adapters:
            raise ValueError("has an adapter without a name")
        return adapters

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not is_origin(origin):
                raise ValueError(f"has '{origin}', which is neither scheme://host[:port] nor *")
        return origins

    @field_validator("tls_key")
    @classmethod
    def _with_certificate(cls, key: str | None, info: ValidationInfo) -> str | None:
        _check_needed(key, info, "tls_cert")
        return key

    @field_validator("log_prompts")
    @classmethod
    def _with_log(cls, log_prompts: bool, info: ValidationInfo) -> bool:
        _check_needed(log_prompts, info, "log_requests")
        return log_prompts


def is_origin(text: str) -> bool:
    """Whether it is an origin as browsers send it, or `*`."""
    return text == "*" or re.fullmatch(r"https?://[^/?#\s@]+", text) is not None


def _check_needed(value: object, info: ValidationInfo, other: str) -> None:
    """Raises ValueError when a value is given without the setting that it needs."""
    if value and other in info.data and info.data[other] is None:
        raise ValueError(f"has no effect without serve.{other}")
