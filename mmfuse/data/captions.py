"""Which of several captions a sample goes by: seeded in training, the first in evaluation."""

import json
import random
from collections.abc import Mapping
from itertools import pairwise

from mmfuse.data.recipe import JsonCaptions, MemberRule
from mmfuse.errors import SampleError
from mmfuse.modalities.media.sentences import BETWEEN_SENTENCES


def choose_caption(data: bytes, rule: MemberRule, *, seed: int | None) -> bytes:
    """One caption of several, drawn by `seed`, or the first without one; a whole member as it is.

    Raises:
        SampleError: there is none, or the JSON is not any.
    """
    if rule.captions == "whole":
        return data
    if rule.captions in ("lines", "sentences"):
        lines = [line for line in data.splitlines() if line.strip()]
        if rule.captions == "sentences" and len(lines) > 1:
            lines = [BETWEEN_SENTENCES.join(pair) for pair in pairwise(lines)]
        return _choose(lines, seed=seed, what="in any line")
    return _choose_in_json(data, rule.captions, seed=seed)


def order_by_weight(weights: Mapping[str, float], *, seed: int) -> tuple[str, ...]:
    """The names drawn one after the other without putting back, each by its weight among the rest.

    By exponential waiting times, so the first of those that a sample has is drawn by the weights of those that it has.
    """
    draw = random.Random(seed)
    waits = {name: draw.expovariate(weight) for name, weight in weights.items()}
    return tuple(sorted(waits, key=lambda name: waits[name]))


def _choose_in_json(data: bytes, captions: JsonCaptions, *, seed: int | None) -> bytes:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"not JSON: {error}") from error
    names = tuple(captions.keys) if seed is None else order_by_weight(captions.keys, seed=seed)
    for name in names:
        value = content
        for field in name.split("."):
            value = value.get(field) if isinstance(value, dict) else None
        found = value if isinstance(value, list) else [value]
        texts = [text for text in found if isinstance(text, str) and text.strip()]
        if texts:
            return _choose([text.encode("utf-8", "replace") for text in texts], seed=seed, what="")
    raise SampleError(f"no caption in any of the fields {', '.join(captions.keys)}")


def _choose(captions: list[bytes], *, seed: int | None, what: str) -> bytes:
    if not captions:
        raise SampleError(f"no caption {what}")
    return captions[0] if seed is None else random.Random(seed + 1).choice(captions)  # `seed` itself chose the field
