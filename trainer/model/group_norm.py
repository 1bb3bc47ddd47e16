"""The group norm of the first convolution where utterances are padded: over the frames of each utterance alone."""

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with one group per channel, which leaves padding out of mean and variance.

    It normalises each channel over time. Zeros after the end would lower the variance of what an utterance consists of,
    the more of them the more, and its features would depend on who shares its batch.
    """

    num_frames: list[int] | None = None
    """Frames of each row before its padding, length B; None where nothing is padded."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` `[B, C, T]`; padded frames become 0."""
        if self.num_frames is None:
            return super().forward(input)
        # row by row with PyTorch's kernel: masked sums of the whole would keep several copies of it for backward
        rows = [
            nn.functional.pad(super(GroupNorm, self).forward(row[None, :, :length]), (0, input.shape[2] - length))
            for row, length in zip(input, self.num_frames, strict=True)
        ]
        return torch.cat(rows)
