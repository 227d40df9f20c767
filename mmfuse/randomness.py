"""Random numbers keyed by what they are for, never by who draws them.

Everything random after the plan (masks, negatives, augmentation) depends on the seed, the step and the sample alone,
so a run gives the same numbers on any number of ranks and workers, and after a resume. Only the libraries' own dropout,
which presets set to 0, is keyed by rank too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"), as signed 64-bit constants.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 of any shape; every bit of the input changes half of the output's."""
    x = x + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def keyed_uniform(*keys: Tensor | int) -> Tensor:
    """Uniform numbers in (0, 1), one for each combination of broadcast int64 `keys`, in fp32.

    Multiples of 2^-23 offset by half of one, so 0 and 1 never come and a logarithm is finite. One bit more, and fp32
    would round the largest to 1.
    """
    device = next((key.device for key in keys if isinstance(key, Tensor)), None)
    state = torch.zeros((), dtype=torch.int64, device=device)
    for key in keys:
        state = mix(state ^ key)
    return (_shift_right(state, 41).to(torch.float32) + 0.5) * 2.0**-23


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Torch's global CPU generator at `seed` inside, and as it was afterwards.

    `torch.manual_seed` would do, but queues a call with its traceback for CUDA each time: 0.3 ms and growing memory.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def seed_torch(seed: int, *, device: torch.device) -> None:
    """Sets torch's global generators, which hidden dropout draws from; without the queue of `torch.manual_seed`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
