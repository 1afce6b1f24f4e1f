"""The fullest moments while a model answers: of transformers' `generate`, of vLLM's profile run, of a pass of
our own engine.

Formulas over a decoder's sizes. All were checked on published peaks (docs/concepts/plan-serving.md).

Letters: T tokens, V vocabulary, h hidden size, f inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.core.units import GIB
from tunesmith.plan.cards import Card
from tunesmith.plan.decoder import Shape
from tunesmith.plan.serving import Weight

MIB = 1 << 20
# cuBLAS' workspace as torch takes it (CUDABlas.cpp): 4096 KiB x 2 + 16 KiB x 8, and 32 MiB on Hopper.
CUBLAS_BYTES, CUBLAS_BYTES_HOPPER = 4096 * 1024 * 2 + 16 * 1024 * 8, 32 * MIB
# Hidden states that a transformers decoder holds inside a layer: the embeddings and the layer's input, both
# by callers' variables, the residual, the normed input.
HELD_STATES = 4
VLLM_BLOCK = 16  # tokens of a block of vLLM's cache


def weights_of_shape(shape: Shape) -> list[Weight]:
    """The weights of a decoder of these sizes, named as transformers does."""
    hidden = shape.hidden
    found = [Weight("model.embed_tokens.weight", (shape.vocab, hidden), "embedding")]
    for at in range(shape.layers):
        found += _layer(shape, f"model.layers.{at}.")
    found += _norm("model.norm", hidden, shape.norm == "layer")
    return [*found, Weight("lm_head.weight", (shape.vocab, hidden), "head", tied=shape.tied)]


def _layer(shape: Shape, prefix: str) -> list[Weight]:
    hidden, f = shape.hidden, shape.intermediate
    outputs = {"q_proj": shape.query, "k_proj": shape.key, "v_proj": shape.key}
    found = [Weight(f"{prefix}self_attn.{name}.weight", (n, hidden), "linear") for name, n in outputs.items()]
    if shape.qkv_bias:
        found += [_other(f"{prefix}self_attn.{name}.bias", n) for name, n in outputs.items()]
    found.append(Weight(f"{prefix}self_attn.o_proj.weight", (hidden, shape.query), "linear"))
    if shape.qk_norm:
        found += [_other(f"{prefix}self_attn.{name}_norm.weight", shape.head_dim) for name in "qk"]
    ups = {"gate_proj": f, "up_proj": f} if shape.gated else {"up_proj": f}
    found += [Weight(f"{prefix}mlp.{name}.weight", (n, hidden), "linear") for name, n in ups.items()]
    found.append(Weight(f"{prefix}mlp.down_proj.weight", (hidden, f), "linear"))
    for at in range(shape.norms_per_layer):
        found += _norm(f"{prefix}norm_{at}", hidden, shape.norm == "layer")
    return found


def _norm(name: str, hidden: int, bias: bool) -> list[Weight]:
    return [_other(f"{name}.{part}", hidden) for part in (("weight", "bias") if bias else ("weight",))]


def _other(name: str, count: int) -> Weight:
    return Weight(name, (count,), "other")


# -- moments -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """The fullest moment: its name, and bytes by what they are."""

    at: str
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        return {"at": self.at, "gib": round(self.num_bytes / GIB, 3), "bytes": dict(self.parts)}


def layer_bytes(shape: Shape, tokens: int, each: int, *, attention: str = "flash_attention_2") -> int:
    """What one decoder layer of transformers holds at its fullest, over `tokens` of one sequence.

    In the MLP: the gate's activation, up, and their product (without a gate, the inner state before and after
    the activation) beside HELD_STATES hidden states. In attention: q, k, v, their rotated copies and the
    temporaries of the rotation; the scores as well where the kernel writes them (eager: in the model's format
    and in fp32, with the mask added and cast back).
    """
    mlp = HELD_STATES * shape.hidden + (3 if shape.gated else 2) * shape.intermediate
    attend = (HELD_STATES - 1) * shape.hidden + 4 * shape.query + 2 * shape.key
    scores = shape.heads * tokens * tokens * (2 * each + 4) if attention == "eager" else 0
    return max(tokens * mlp * each, tokens * attend * each + scores)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One call of transformers' `generate`, greedy or sampling, with its dynamic cache.

    each: bytes of a number of the hidden states, keys and values. full_logits: of all of the prompt's tokens,
    in the model's format and in fp32, as before transformers 4.45. dequantised: bytes of the largest matrix
    that a layer widens for its product. static_cache: keys and values of all tokens are there from the start.
    """

    prompt: int
    generated: int
    batch: int = 1
    each: int = 2
    full_logits: bool = False
    attention: str = "flash_attention_2"
    dequantised: int = 0
    static_cache: bool = False


def generation_peak(shape: Shape, weights: int, call: Generation) -> Peak:
    """The fullest moment of `call` with `weights` bytes of weights: prefill, first logits, last token."""
    token = shape.token_bytes(call.each) * call.batch
    total = call.prompt + call.generated
    early = token * (total if call.static_cache else call.prompt)
    tokens = call.prompt * call.batch
    moments = [
        Peak(
            "prefill",
            {
                "weights": weights,
                "cache": early,
                "layer": layer_bytes(shape, tokens, call.each, attention=call.attention),
                "sines and cosines": 2 * call.prompt * shape.head_dim * call.each,
                "widened weights": max(0, call.dequantised - tokens * shape.intermediate * call.each),
            },
        ),
        Peak(
            "first logits",
            {
                "weights": weights,
                "cache": early,
                "hidden states": tokens * shape.hidden * call.each,
                "logits": _logits(shape, call),
            },
        ),
        Peak(
            "last token",
            {"weights": weights, "cache": token * total, "copy of a layer's cache": _copy(shape, call)},
        ),
    ]
    return max(moments, key=lambda moment: moment.num_bytes)


def _logits(shape: Shape, call: Generation) -> int:
    """In the model's format and in fp32, both there while one is made of the other."""
    rows = call.batch * (call.prompt if call.full_logits else 1)
    return rows * shape.vocab * (4 if call.each == 4 else call.each + 4)


def _copy(shape: Shape, call: Generation) -> int:
    """torch.cat makes a layer's new keys while the old ones are still there."""
    if call.static_cache:
        return 0
    return (call.prompt + call.generated) * call.batch * shape.key * call.each


# -- vLLM --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CardKind:
    """What vLLM asks of a card before it chooses: its memory as the driver tells it, and its kind."""

    num_bytes: int
    is_hopper: bool = False
    is_a100: bool = False

    @property
    def multiprocessors(self) -> int:
        """Of an H100, an A100; about as many of others."""
        return 132 if self.is_hopper else 108


def card_kind(card: Card) -> CardKind:
    """Of a card in the table of cards."""
    return CardKind(
        num_bytes=int(card.usable_gib * GIB),
        is_hopper=card.capability[0] == 9,
        is_a100="a100" in card.name.lower(),
    )


@dataclass(frozen=True, kw_only=True)
class VllmVersion:
    """What of vLLM's memory changed between its versions.

    logit_bytes: that the sampler's dry run holds for each logit, the bf16 logits included: 38 where top-p
    sorts (values, 64-bit indices, the sort's own buffers), 14 with its own kernel from 0.17 on, which also
    keeps a row of fp32 logits for each multiprocessor (kernel_rows). chunked: long prompts are cut, so that
    the dry run has max_num_batched_tokens; V0 has max_model_len. counts_graphs: CUDA graphs are taken from
    the cache's room. utilization: the default of gpu_memory_utilization. one_card_gib, several_cards_gib: on
    each card besides torch's tensors, alone and under tensor parallelism (seen on cards of 80 GB).
    """

    name: str
    logit_bytes: int
    kernel_rows: bool
    chunked: bool
    counts_graphs: bool
    utilization: float
    one_card_gib: float
    several_cards_gib: float


V0 = VllmVersion(
    name="V0 (to 0.7)",
    logit_bytes=38,
    kernel_rows=False,
    chunked=False,
    counts_graphs=False,
    utilization=0.9,
    one_card_gib=0.35,
    several_cards_gib=3.5,
)
V1_SORTING = replace(V0, name="0.8 to 0.16", chunked=True, one_card_gib=0.13, several_cards_gib=2.1)
V1_KERNEL = replace(V1_SORTING, name="0.17 to 0.20", logit_bytes=14, kernel_rows=True, one_card_gib=0.25)
V1_GRAPHS = replace(V1_KERNEL, name="0.21 and later", counts_graphs=True, utilization=0.92)
VLLM_VERSIONS = (V1_SORTING, V1_KERNEL, V1_GRAPHS)  # of V1
# Of several cards without NVLink, as two V100 of 16 GB had it; cards from LINKED_CARD_GIB on are linked.
UNLINKED_GIB, LINKED_CARD_GIB = 0.4, 38
# Measured 0.6 to 1.1 GiB on an H100 with the default sizes of vLLM 0.19, and 0.36 GiB with sizes up to 16.
GRAPHS_GIB, GRAPHS_SPREAD_GIB = 0.9, 0.55
# How far the published figures besides torch, of one card and of several, are from those above.
NON_TORCH_SPREAD_GIB, SEVERAL_SPREAD_GIB = 0.12, 1.5


def vllm_version(major: int, minor: int) -> VllmVersion:
    """The rules of a release such as 0.19."""
    if (major, minor) < (0, 8):
        return V0
    if (major, minor) < (0, 17):
        return V1_SORTING
    return V1_KERNEL if (major, minor) < (0, 21) else V1_GRAPHS


@dataclass(frozen=True, kw_only=True)
class VllmRun:
    """A server of vLLM. tokens, sequences: of the dry run; each: bytes of a number of the hidden states.

    tensor_parallel, pipeline_parallel: cards that share each layer, and that share the layers out.
    """

    version: VllmVersion
    card: CardKind
    tokens: int
    sequences: int
    each: int = 2
    tensor_parallel: int = 1
    pipeline_parallel: int = 1


def default_batch(card: CardKind) -> tuple[int, int]:
    """max_num_batched_tokens and max_num_seqs of `vllm serve`, not given (its engine/arg_utils.py)."""
    if card.num_bytes >= 160 * GIB:
        return 16384, 1024
    if card.num_bytes >= 70 * GIB and not card.is_a100:
        return 8192, 1024
    return 2048, 256


def vllm_activation(shape: Shape, run: VllmRun, *, last: bool = True) -> Peak:
    """What vLLM's dry run adds to the weights: of the forward pass and the sampler's, the larger.

    last: on the last card of a pipeline; there are no logits on the others.
    """
    cublas = CUBLAS_BYTES_HOPPER if run.card.is_hopper else CUBLAS_BYTES
    forward = Peak("forward", {"layer": _vllm_layer(shape, run), "cuBLAS": cublas})
    if not last:
        return forward
    # fp32 logits need no second copy in fp32.
    logit = run.version.logit_bytes - (2 if run.each == 4 else 0)
    rows = min(run.card.multiprocessors, run.sequences) if run.version.kernel_rows else 0
    states = (run.tokens + 2 * run.sequences) * shape.hidden * run.each
    logits = run.sequences * shape.vocab * logit
    sampler = Peak(
        "sampler",
        {"logits": logits, "kernel": 4 * shape.vocab * rows, "hidden states": states, "cuBLAS": cublas},
    )
    return max(forward, sampler, key=lambda peak: peak.num_bytes)


def _vllm_layer(shape: Shape, run: VllmRun) -> int:
    """The MLP's fused gate and up and their product beside the hidden states.

    V0 holds three hidden states; the compiled graphs of V1 also the queries, keys and values before and after
    attention.
    """
    inner = (3 if shape.gated else 2) * shape.intermediate
    around = 2 * (shape.query + 2 * shape.key) if run.version.chunked else 0
    held = 4 if run.version.chunked else 3
    return run.tokens * ((inner + around) // run.tensor_parallel + held * shape.hidden) * run.each


def vllm_non_torch(run: VllmRun) -> int:
    """Bytes on a card that are not torch's; NCCL and direct links between cards take most."""
    if run.tensor_parallel == 1:
        return int(GIB * run.version.one_card_gib)
    linked = run.card.num_bytes >= LINKED_CARD_GIB * GIB
    return int(GIB * (run.version.several_cards_gib if linked else UNLINKED_GIB))


def vllm_graphs(run: VllmRun) -> int:
    """Bytes of CUDA graphs that are taken from the cache's room."""
    return int(GIB * GRAPHS_GIB) if run.version.counts_graphs else 0


def vllm_spread(run: VllmRun) -> int:
    """Bytes by which the room of the cache may be larger or smaller than predicted for a known version."""
    other = NON_TORCH_SPREAD_GIB if run.tensor_parallel == 1 else SEVERAL_SPREAD_GIB
    return int(GIB * (other + (GRAPHS_SPREAD_GIB if run.version.counts_graphs else 0)))
