"""The critic's head: one number per token from the policy's own trunk, or from one of the critic's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """Hidden state [..., d] → value [...], float32 whatever the trunk computes in.

    It starts at zero: final hidden states of Llama-type models are large, and a random head on them would make the
    first advantages noise.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.linear(hidden.float())
        return values.squeeze(-1)
