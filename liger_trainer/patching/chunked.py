"""An MLP over a bounded number of tokens at a time, for contexts whose MLP activations would not fit.

What an MLP computes for a token does not depend on other tokens. Over all tokens its inner activations are the widest
of a layer; over a chunk of them they are as large as the chunk. Each chunk is checkpointed: what lives on from forward
to backward is the MLP's input, and the backward makes the inner activations of one chunk at a time again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["chunked"]


@functools.cache
def chunked(forward: Callable[[Any, Tensor], Tensor], tokens: int) -> Callable[[Any, Tensor], Tensor]:
    """forward(self, x) for x of shape (..., H), called with at most so many tokens (rows of x) at a time.

    The modules that forward calls are called once a chunk, and once more for it in the backward, their hooks included.
    The gradients of their weights are added up chunk by chunk in their own dtype, as over several backward passes.
    """

    def run(self: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] <= tokens:
            return forward(self, x)
        parts = rows.split(tokens)
        if torch.is_grad_enabled():
            outputs = [checkpoint(forward, self, part, use_reentrant=False) for part in parts]
        else:
            outputs = [forward(self, part) for part in parts]
        return torch.cat(outputs).view(*x.shape[:-1], -1)

    return run
