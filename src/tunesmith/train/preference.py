"""Learning from pairs of answers: DPO with its variants, ORPO and KTO.

Every loss is a mean over pairs. log p(answer) is the sum over its tokens, stop token included; r is the
answer's log p less the reference model's.

dpo     -ln σ(β (r_chosen - r_rejected)), Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with label smoothing
        ε: (1 - ε) of it and ε of the pair the other way round (Mitchell 2023, "A note on DPO with noisy
        preferences", eq. 3)
        hinge: max(0, 1 - β (r_chosen - r_rejected)), Zhao et al. 2023, arXiv:2305.10425
        ipo: (r_chosen - r_rejected - 1 / 2β)², Azar et al. 2023, arXiv:2310.12036, eq. 17, with r a mean over
        the answer's tokens
orpo    cross-entropy of the chosen answer (mean over its tokens) - β ln σ(ln odds_chosen - ln odds_rejected),
        odds = p / (1 - p), p the geometric mean of the tokens' probabilities: Hong et al. 2024,
        arXiv:2403.07691, eq. 6 and 7
kto     the mean of w_chosen (1 - σ(β (r_chosen - z))) and w_rejected (1 - σ(β (z - r_rejected))), z the mean
        of r over answers to other prompts, not below 0 and without gradient: Ethayarajh et al. 2024,
        arXiv:2402.01306, eq. 8

Shapes: P pairs of a micro-batch, B answers of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tunesmith.core.run_folder import RunFolder
from tunesmith.model.batch import Batch
from tunesmith.recipe.schema import Objective as Settings
from tunesmith.train.logprobs import answer_logprobs
from tunesmith.train.objective import Ranks
from tunesmith.train.reference import Reference

MEASURES = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


@dataclass(frozen=True)
class Answers:
    """One answer of every pair: log p [P], its tokens [P], and log p by the reference model [P]."""

    logps: Tensor
    tokens: Tensor
    reference: Tensor

    @property
    def ratios(self) -> Tensor:
        return self.logps - self.reference

    @property
    def means(self) -> Tensor:
        """log p of a token [P]."""
        return self.logps / self.tokens


def dpo_losses(chosen: Answers, rejected: Answers, settings: Settings) -> Tensor:
    """[P]"""
    beta, smoothing = settings.beta, settings.label_smoothing
    margins = chosen.ratios - rejected.ratios
    if settings.loss == "hinge":
        losses = torch.relu(1 - beta * margins)
    elif settings.loss == "ipo":
        by_token = chosen.ratios / chosen.tokens - rejected.ratios / rejected.tokens
        losses = (by_token - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - smoothing) * F.logsigmoid(beta * margins) - smoothing * F.logsigmoid(-beta * margins)
    return losses - settings.sft_weight * chosen.means if settings.sft_weight else losses


def orpo_losses(chosen: Answers, rejected: Answers, settings: Settings) -> Tensor:
    """[P]"""
    log_odds = chosen.means - rejected.means - (_log1mexp(chosen.means) - _log1mexp(rejected.means))
    return -chosen.means - settings.beta * F.logsigmoid(log_odds)


def kto_losses(chosen: Answers, rejected: Answers, settings: Settings, shift: Tensor) -> Tensor:
    """[P]; shift: the mean of r over answers to other prompts."""
    z = shift.detach().clamp(min=0)
    gains = settings.desirable_weight * (1 - torch.sigmoid(settings.beta * (chosen.ratios - z)))
    harms = settings.undesirable_weight * (1 - torch.sigmoid(settings.beta * (z - rejected.ratios)))
    return (gains + harms) / 2


def rewards(answers: Answers, settings: Settings) -> Tensor:
    """[P] how much more likely the answer became, in units of the loss; of orpo, β log p of a token."""
    if settings.type == "orpo":
        return settings.beta * answers.means
    per_token = settings.type == "dpo" and settings.loss == "ipo"
    return settings.beta * (answers.ratios / answers.tokens if per_token else answers.ratios)


def _log1mexp(x: Tensor) -> Tensor:
    """ln(1 - eˣ) for x < 0, exact at both ends (Mächler 2012); a certain answer counts as nearly certain."""
    x = x.clamp(max=-1e-12)
    small = x > -math.log(2)
    near = torch.where(small, x, -1.0)
    far = torch.where(small, -1.0, x)
    return torch.where(small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


class Preference:
    """The objective of dpo, orpo and kto; a unit is a pair.

    reference: None for orpo, which has none. The answer after the two of a pair, if there is one, is another
    prompt's: kto's z comes from it.
    """

    def __init__(self, settings: Settings, reference: Reference | None) -> None:
        self.settings, self.reference = settings, reference
        self.measures: tuple[str, ...] = (*MEASURES, "kl") if settings.type == "kto" else MEASURES
        self._measured = dict.fromkeys(self.measures, 0.0)
        self._read_only: list[Tensor] | None = None

    def prepare(self, engine: Ranks, run: RunFolder, *, begun: bool) -> None:
        if self.reference is None:
            return

        def logprobs(batch: Batch) -> Tensor:
            # Through the engine's own forward pass: it may have gathered the weights for it.
            self._read_only = []
            try:
                engine.forward(batch)
                return self._read_only[0]
            finally:
                self._read_only = None

        self.reference.prepare(engine, run, logprobs, begun=begun)

    def units(self, batch: Batch) -> int:
        return batch.num_documents

    def total(self, model: Any, batch: Batch) -> Tensor:
        if self._read_only is not None:
            logps, _ = answer_logprobs(model, batch)
            self._read_only.append(logps)
            return logps.sum().float()
        reference = None if self.reference is None else self.reference.of(batch)
        shift = self._shift(model, batch, reference)
        logps, tokens = answer_logprobs(model, batch.answers(0, 2))
        known = torch.zeros_like(logps) if reference is None else reference[:, :2].to(logps.device)
        chosen, rejected = (Answers(logps[:, i], tokens[:, i], known[:, i]) for i in (0, 1))
        losses = self._losses(chosen, rejected, shift)
        self._measure(chosen, rejected, shift)
        return losses.sum().float()

    def _losses(self, chosen: Answers, rejected: Answers, shift: Tensor | None) -> Tensor:
        if self.settings.type == "orpo":
            return orpo_losses(chosen, rejected, self.settings)
        if shift is not None:
            return kto_losses(chosen, rejected, self.settings, shift)
        return dpo_losses(chosen, rejected, self.settings)

    def _shift(self, model: Any, batch: Batch, reference: Tensor | None) -> Tensor | None:
        """kto: the mean of r over the answers to other prompts."""
        if self.settings.type != "kto" or reference is None:
            return None
        with torch.no_grad():
            logps, _ = answer_logprobs(model, batch.answers(2, 3))
        return (logps[:, 0] - reference[:, 2].to(logps.device)).mean()

    @torch.no_grad()
    def _measure(self, chosen: Answers, rejected: Answers, shift: Tensor | None) -> None:
        better, worse = rewards(chosen, self.settings), rewards(rejected, self.settings)
        found = [better, worse, better - worse, (better > worse).double()]
        if shift is not None:
            found.append(shift.clamp(min=0).expand_as(better))
        sums = torch.stack([values.sum() for values in found]).tolist()
        self._measured = {
            name: value + more for (name, value), more in zip(self._measured.items(), sums, strict=True)
        }

    def drain(self) -> dict[str, float]:
        found, self._measured = self._measured, dict.fromkeys(self.measures, 0.0)
        return found
