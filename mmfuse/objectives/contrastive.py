"""Pair contrastive: every two modalities of a sample find each other among the global batch (`pairs/contrast.py`)."""

import math
from collections.abc import Mapping
from itertools import combinations
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from mmfuse.errors import ConfigError
from mmfuse.model.model import ModelConfig, at_least_fp32
from mmfuse.objectives.base import Comparison, Need, ObjectiveConfig, StepInputs, Term
from mmfuse.objectives.pairs.candidates import CandidateConfig, Side
from mmfuse.objectives.pairs.contrast import Pair, contrast
from mmfuse.types import Batch

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
LARGEST_LOGIT_SCALE = math.log(100)
INITIAL_SIGMOID_SCALE, INITIAL_SIGMOID_BIAS = math.log(10), -10.0
"""Of SigLIP: nearly all pairs are negative, and the bias says so from the start."""


class Config(ObjectiveConfig):
    """InfoNCE or the sigmoid loss over pairs of modalities."""

    uses_fusion: ClassVar[bool] = False
    pairs: dict[str, NonNegativeFloat] | None = None
    """Weight by pair, such as `{text-image: 1, text-audio: 0.5}`; null: every pair, equally. The loss is their mean."""
    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    """`sigmoid` needs no softmax over the global batch and prefers batches below 32k (SigLIP)."""
    positives: Literal["own", "group"] = "own"
    """`group`: what other samples of the group (`group_pattern` of a recipe) say or show is right too, also where a
    sample has one modality alone. `own`: their pairs are left out, neither right nor wrong."""
    candidates: CandidateConfig = CandidateConfig()

    def needs(self, name: str, modalities: tuple[str, ...]) -> list[Need]:
        """Where pairs are named, each of them; of a group, one sample may hold the one side and another the other."""
        across, pairs = self.positives == "group", list(self._pair_weights(modalities))
        if self.pairs is None:
            return [Need(name, tuple(map(frozenset, pairs)), across)]
        return [Need(f"{name}.pairs.{'-'.join(pair)}", (frozenset(pair),), across) for pair in pairs]

    def build(self, model: ModelConfig, *, seed: int) -> "Contrastive":
        return Contrastive(self._pair_weights(tuple(model.modalities)), self)

    def _pair_weights(self, modalities: tuple[str, ...]) -> dict[tuple[str, str], float]:
        """By pair, in the order of the modalities.

        Raises:
            ConfigError: an unknown pair, or none with a weight above 0.
        """
        every = {frozenset(pair): pair for pair in combinations(modalities, 2)}
        weights: dict[tuple[str, str], float] = dict.fromkeys(every.values(), 1.0)
        if self.pairs is not None:
            weights = {}
            for name, weight in self.pairs.items():
                pair = every.get(frozenset(name.split("-")))
                if pair is None:
                    known = ", ".join("-".join(pair) for pair in every.values())
                    raise ConfigError(f"objectives.contrastive.pairs: {name!r} is not one of {known or 'no pairs'}")
                weights[pair] = weight
        weights = {pair: weight for pair, weight in weights.items() if weight > 0}
        if not weights:
            raise ConfigError("objectives.contrastive needs two modalities and a pair with a weight above 0")
        return weights


class Contrastive(Comparison):
    """Weighted mean of the pairs' losses, one learned scale a pair, with the sigmoid loss one bias too."""

    def __init__(self, weights: dict[tuple[str, str], float], config: Config) -> None:
        super().__init__()
        total, count = sum(weights.values()), len(weights)
        self.weights = {pair: weight / total for pair, weight in weights.items()}
        self.candidates, self.by_group = config.candidates, config.positives == "group"
        is_sigmoid = config.loss == "sigmoid"
        # Not 0-dimensional: DeepSpeed refuses such parameters.
        start = INITIAL_SIGMOID_SCALE if is_sigmoid else INITIAL_LOGIT_SCALE
        self.logit_scale = nn.Parameter(torch.full((count,), start))
        self.logit_bias = nn.Parameter(torch.full((count,), INITIAL_SIGMOID_BIAS)) if is_sigmoid else None

    def represent(self, inputs: StepInputs) -> Tensor:
        return stack_embeddings(inputs)

    def compare(self, vectors: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> dict[str, Term]:
        sides = modality_sides(vectors, batch)
        scales = exp_clamped(parameters["logit_scale"])
        biases = at_least_fp32(parameters["logit_bias"]) if "logit_bias" in parameters else [None] * len(scales)
        pairs = [
            Pair(*names, scale, bias, self.by_group)
            for names, scale, bias in zip(self.weights, scales, biases, strict=True)
        ]
        return {
            f"{pair.first}-{pair.second}": Term(weight * term.loss, term.rows, weight * term.row_losses)
            for pair, weight, term in zip(
                pairs, self.weights.values(), contrast(sides, pairs, batch, self.candidates), strict=True
            )
        }


def stack_embeddings(inputs: StepInputs) -> Tensor:
    """`(B, M, E)`: the modalities' embeddings, zeros where there is none."""
    return torch.stack([inputs.encoded.embeddings[name] for name in inputs.batch.modalities], dim=1)


def modality_sides(embeddings: Tensor, batch: Batch) -> dict[str, Side]:
    """Of `(B, M, E)`, by modality."""
    columns = zip(batch.modalities, embeddings.unbind(1), batch.present.unbind(1), strict=True)
    return {name: Side(embedding, present) for name, embedding, present in columns}


class _ClampInward(torch.autograd.Function):
    """Clamp whose gradient may leave the bound inwards: the same as clamping the parameter after each step, which under
    DeepSpeed would have to reach the fp32 master weights."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (x,), (low, high), grad = ctx.saved_tensors, ctx.bounds, grad_outputs[0]
        outward = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return grad.masked_fill(outward, 0), None, None


def exp_clamped(logit_scale: Tensor) -> Tensor:
    """The scales, between 1 and 100, in fp32 also where the parameter is bf16."""
    scale = _ClampInward.apply(at_least_fp32(logit_scale), 0.0, LARGEST_LOGIT_SCALE)
    assert isinstance(scale, Tensor)
    return scale.exp()
