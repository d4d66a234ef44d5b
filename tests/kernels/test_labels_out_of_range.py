"""A label outside the classes gives NaN in the kernel itself, where on a GPU nobody looks at labels beforehand."""

from __future__ import annotations

import torch

from liger_trainer.kernels._softmax_loss import RowLoss, softmax_loss_rows


def test_such_a_row_is_nan_and_the_others_are_not(implementation, device):
    logits = torch.randn(4, 37, device=device)
    labels = torch.tensor([3, 37, -1, 5], device=device)
    token_loss, lse = torch.zeros(4, device=device), torch.zeros(4, device=device)
    softmax_loss_rows(
        logits,
        labels,
        RowLoss(-100, 1.0, 0.0, 0.0, 0.0, False),
        token_loss=token_loss,
        lse=lse,
        use_kernel=implementation == "triton",
    )
    assert token_loss.isnan().tolist() == [False, True, True, False]
    expected = torch.nn.functional.cross_entropy(logits[::3], labels[::3], reduction="none")
    torch.testing.assert_close(token_loss[::3], expected)
