"""What encoders of spectrum patches share: one token for each strip of frames, sounds up to a clip's length."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.modalities.base import PatchEncoder
from mmfuse.types import Features


class StripEncoder(PatchEncoder):
    """`fbank (n, frames, mel)`, `frames (n,)` -> tokens, each the mean over frequency of the patches of one time."""

    num_mel_bins: int
    time_stride: int
    """Frames from a token to the next."""
    time_patches: int
    """Tokens of a full clip."""

    def patches(self, inputs: Features) -> tuple[Tensor, Tensor]:
        """Strips of as many frames as lie between the beginnings of two tokens, in all mel bins; one for each token."""
        mask = self.real_tokens(inputs)
        return self._strips(inputs["fbank"], mask.shape[1]).flatten(2).float(), mask

    def hide(self, inputs: Features, hidden: Tensor) -> Features:
        fbank = inputs["fbank"]
        strips = self._strips(fbank, hidden.shape[1]).masked_fill(hidden[:, :, None, None], 0.0)  # 0 is the mean
        rest = fbank[:, hidden.shape[1] * self.time_stride :]  # of the last patch, beyond the last token's own strip
        return {**inputs, "fbank": torch.cat([strips.flatten(1, 2)[:, : fbank.shape[1]], rest], dim=1)}

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        return tokens

    def real_tokens(self, inputs: Features) -> Tensor:
        """bool `(n, tokens in time)`: a token is real where its first frame is."""
        fbank, frames = inputs["fbank"], inputs["frames"]
        count = min(math.ceil(fbank.shape[1] / self.time_stride), self.time_patches)
        starts = torch.arange(count, device=frames.device) * self.time_stride
        return starts < frames[:, None]

    def minimal_inputs(self, device: torch.device) -> Features:
        fbank = torch.zeros(1, 1, self.num_mel_bins, device=device)
        return {"fbank": fbank, "frames": torch.ones(1, dtype=torch.int64, device=device)}

    def _strips(self, fbank: Tensor, count: int) -> Tensor:
        """`(n, count, stride, mel)` of the first frames, padded with zeros."""
        length = count * self.time_stride
        return F.pad(fbank[:, :length], (0, 0, 0, max(0, length - fbank.shape[1]))).unflatten(1, (count, -1))
