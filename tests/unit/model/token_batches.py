"""Random token batches for the fusion, in fp64."""

import torch
from torch import Tensor

from mmfuse.types import TokenBatch

NAMES = ("text", "image", "audio")
LENGTHS = {"text": 7, "image": 4, "audio": 5}
WIDTH = 16


def make_tokens(presence: str, *, seed: int = 0) -> TokenBatch:
    """Tokens of samples such as `"tia ti -"`; text and sound have padding, never all of it, entries in any order."""
    generator = torch.Generator().manual_seed(seed)
    patterns, tokens, masks, rows = presence.split(), {}, {}, {}
    for name in NAMES:
        own = torch.tensor([row for row, pattern in enumerate(patterns) if name[0] in pattern], dtype=torch.int64)
        rows[name] = own[torch.randperm(len(own), generator=generator)]
        shape = (len(own), LENGTHS[name])
        tokens[name] = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        fewest = LENGTHS[name] if name == "image" else 1
        masks[name] = torch.arange(LENGTHS[name]) < torch.randint(
            fewest, LENGTHS[name] + 1, (len(own), 1), generator=generator
        )
    return TokenBatch(tokens, masks, rows, len(patterns))


def random_presence(seed: int, count: int = 9) -> str:
    """Any subsets, the empty one included."""
    bits = torch.randint(8, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join("".join(n[0] for i, n in enumerate(NAMES) if bit >> i & 1) or "-" for bit in bits)


def stream_of(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """All real tokens `(N, D)`, with the sample and the modality of each."""
    samples = [batch.rows[n][:, None].expand_as(batch.masks[n])[batch.masks[n]] for n in NAMES]
    modalities = [torch.full_like(sample, number) for number, sample in enumerate(samples)]
    return torch.cat([batch.tokens[n][batch.masks[n]] for n in NAMES]), torch.cat(samples), torch.cat(modalities)
