"""Whether one member decodes, as training would decode it and to its end, and what kind of bad it is otherwise."""

import io
import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import soundfile
import torch

from mmfuse.config import find_plugin
from mmfuse.data.captions import choose_caption
from mmfuse.data.recipe import MemberRule
from mmfuse.errors import SampleError
from mmfuse.modalities.base import ModalityConfig, Processor
from mmfuse.pages import mime_of
from mmfuse.shards.findings import describe_error

_BLOCK_FRAMES = 1 << 16


class Verdict(NamedTuple):
    """What is wrong with a member."""

    kind: str
    """One of `mmfuse.shards.findings.KINDS`, or what a modality calls it."""
    message: str


class MemberDecoder:
    """Decodes members of the modalities, JSON and NumPy arrays."""

    def __init__(self, rules: Mapping[str, MemberRule], configs: Mapping[str, ModalityConfig]) -> None:
        """With `rules` by modality: which members are its. Modalities without a config have their defaults."""
        torch.set_num_threads(1)  # there is a process for every core
        self._readers: dict[str, tuple[MemberRule, Processor]] = {}
        for modality, rule in rules.items():
            config = configs.get(modality) or find_plugin("mmfuse.modalities", modality).Config()
            processor = config.build_processor()
            self._readers |= {extension: (rule, processor) for extension in rule.extensions}

    def judge(self, extension: str, data: bytes) -> Verdict | None:
        """What is wrong with a member of these bytes; None for a good one and for extensions that nothing reads."""
        try:
            return self._judge(extension, data)
        except MemoryError:
            return Verdict("too_large", "memory does not suffice to decode it")
        except Exception as error:  # decoders of foreign bytes raise what they like, and training masks these too
            return Verdict("unexpected", f"{type(error).__name__}: {describe_error(error)}")

    def _judge(self, extension: str, data: bytes) -> Verdict | None:
        if not data.strip() and (extension in self._readers or extension in ("json", "npy")):
            return Verdict("empty", "no bytes" if not data else "nothing but blanks")
        if extension in self._readers:
            rule, processor = self._readers[extension]
            try:
                processor(choose_caption(data, rule, seed=None), seed=None)
            except SampleError as error:
                beyond = None if error.kind == "too_large" else _judge_sound(extension, data)
                return beyond or Verdict(error.kind, describe_error(error))
            return _judge_sound(extension, data)
        if extension == "json":
            return _judge_json(data)
        return _judge_array(data) if extension == "npy" else None


def _judge_sound(extension: str, data: bytes) -> Verdict | None:
    """Decodes a sound to its end: a processor reads no more than a clip of it."""
    if not mime_of(extension).startswith("audio/"):
        return None
    decoded = 0
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            while len(block := sound.read(_BLOCK_FRAMES, dtype="float32")):
                if not np.isfinite(block).all():
                    return Verdict("not_finite", f"after {decoded / sound.samplerate:.1f} s a value is not finite")
                decoded += len(block)
            promised, rate = sound.frames, sound.samplerate
    except soundfile.LibsndfileError as error:
        return Verdict("not_decodable", f"not a readable sound: {describe_error(error)}")
    if decoded < promised:
        return Verdict("not_decodable", f"ends after {decoded / rate:.1f} of {promised / rate:.1f} s")
    return None


def _judge_json(data: bytes) -> Verdict | None:
    try:
        json.loads(data)
    except (ValueError, RecursionError) as error:
        return Verdict("not_decodable", f"not JSON: {error}")
    return None


def _judge_array(data: bytes) -> Verdict | None:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        return Verdict("not_decodable", f"not a NumPy array: {describe_error(error)}")
    if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
        return Verdict("not_finite", "the array has values that are not finite")
    return None
