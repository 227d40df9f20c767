"""A text modality whose texts say what becomes of the process that decodes them."""

import ctypes
import time

from mmfuse.errors import SampleError
from mmfuse.modalities.base import Encoder, ModalityConfig
from mmfuse.types import Features


class DeadlyConfig(ModalityConfig):
    """Settings of a modality that has none."""

    def build_processor(self) -> "DeadlyProcessor":
        return DeadlyProcessor()

    def build_encoder(self) -> Encoder:
        raise NotImplementedError


class DeadlyProcessor:
    """Does what a hostile member does to a decoder."""

    def __call__(self, data: bytes, *, seed: int | None) -> Features:
        if data == b"segfault":
            ctypes.string_at(0)
        elif data == b"hang":
            time.sleep(1000)
        elif data == b"memory":
            raise MemoryError
        elif data == b"surprise":
            raise RecursionError("a decoder that did not see this coming")
        elif data == b"kind":
            raise SampleError("nobody wants this", kind="unwanted")
        return {}

    def collate(self, features: list[Features]) -> Features:
        raise NotImplementedError
