"""Kernel faults that the tests must find: what is changed, where, and which tests are asked.

Each is one that was seen in a kernel library, or nearly made here: a wrong sign, a missing mask, a lost eps, a 32-bit
offset, a sum that is rounded too early, a dropped last tile, a stale cache, a forgotten divisor.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAULTS", "Fault"]

NORMS = "tests/kernels/test_norms.py"
SUMS = "tests/kernels/test_partial_sums.py"
ADD_NORM = "tests/kernels/test_add_rms_norm.py"
GATED = "tests/kernels/test_gated_activation.py"
ROTARY = "tests/kernels/test_rotary.py"
CE = "tests/kernels/test_cross_entropy.py"
LCE = "tests/kernels/test_linear_cross_entropy.py"
LLP = "tests/kernels/test_linear_log_probs.py"
JSD = "tests/kernels/test_divergence.py"
LJSD = "tests/kernels/test_linear_jsd.py"
PARTITION = "tests/kernels/test_partition.py"
TILES = "tests/kernels/test_tiles.py"
LOW_RANK = "tests/kernels/test_low_rank.py"
LABELS = "tests/kernels/test_labels_out_of_range.py"
CALLS = "tests/test_wrong_calls.py"
PARTS = "tests/distributed_vocab/test_ops.py -k 2-ranks"


@dataclass(frozen=True)
class Fault:
    """One change to one file of ``liger_trainer/kernels``.

    Attributes:
        name: what is wrong.
        file: the file, without folder and suffix.
        before, after: the text, which must occur, and what stands in its place; the first occurrence is changed, or
            that of number ``occurrence``.
        tests: files or tests of pytest, one of which must fail.
        occurrence: counted from 0.
    """

    name: str
    file: str
    before: str
    after: str
    tests: str
    occurrence: int = 0


FAULTS = [
    # Norms
    Fault("RMSNorm: eps lost", "_norm_kernels", "/ WIDTH + eps)", "/ WIDTH)", NORMS),
    Fault("RMSNorm, wide rows: eps lost", "_norm_kernels", "/ WIDTH + eps)", "/ WIDTH)", NORMS, 1),
    Fault(
        "norm: mean over the padded block",
        "_norm_kernels",
        "tl.sum(x * x, axis=1) / WIDTH",
        "tl.sum(x * x, axis=1) / BLOCK",
        NORMS,
    ),
    Fault(
        "norm: rows past the last one are stored",
        "_norm_kernels",
        "mask = live[:, None] & in_row[None, :]",
        "mask = in_row[None, :]",
        NORMS,
    ),
    Fault(
        "norm backward: wrong sign of the projection",
        "_norm_kernels",
        "dx = g - normalized",
        "dx = g + normalized",
        NORMS,
    ),
    Fault(
        "norm backward: projection forgotten",
        "_norm_kernels",
        "dx = g - normalized * (tl.sum(g * normalized, axis=1) / WIDTH)[:, None]",
        "dx = g",
        NORMS,
    ),
    Fault(
        "norm backward: the reciprocal root is not multiplied in", "_norm_kernels", "        dx *= rstd\n", "", NORMS
    ),
    Fault(
        "LayerNorm backward: mean of the gradient kept",
        "_norm_kernels",
        "dx -= (tl.sum(g, axis=1) / WIDTH)[:, None]",
        "dx -= 0.0",
        NORMS,
    ),
    Fault(
        "norm: offset of the weight ignored",
        "_norm_kernels",
        "return weight.to(tl.float32) + OFFSET",
        "return weight.to(tl.float32)",
        NORMS,
    ),
    Fault(
        "norm backward: weight's gradient from x, not normalised x",
        "_norm_kernels",
        "                dweight += dy * normalized\n",
        "                dweight += dy * x\n",
        NORMS,
    ),
    Fault(
        "norm backward: partial sums of other programs dropped",
        "_norm_kernels",
        "for start in range(0, n_partials, ROWS):",
        "for start in range(0, 1, ROWS):",
        SUMS,
    ),
    Fault(
        "norm backward: this program's later rows dropped",
        "_norm_kernels",
        "rows += step\n        live",
        "rows += step + n_rows\n        live",
        NORMS,
    ),
    Fault(
        "LayerNorm: variance not centred, wide rows",
        "_norm_kernels",
        "x = tl.where(mask, x - mean[:, None], 0.0)",
        "x = tl.where(mask, x, 0.0)",
        NORMS,
        1,
    ),
    Fault(
        "norm of a view: the row's stride taken for its width",
        "_norm_kernels",
        "x_ptr + rows[:, None] * x_stride",
        "x_ptr + rows[:, None] * WIDTH",
        NORMS,
    ),
    Fault(
        "addition and norm: norm of the unrounded sum's first term",
        "_norm_kernels",
        "x = total.to(tl.float32)",
        "x = x",
        ADD_NORM,
    ),
    Fault(
        "addition and norm backward: direct gradient lost",
        "_norm_kernels",
        "dx += dtotal.to(tl.float32)",
        "dx += 0.0",
        ADD_NORM,
    ),
    Fault("RMSNorm on the CPU: eps lost", "rms_norm", "rows.square().mean(-1) + eps", "rows.square().mean(-1)", NORMS),
    # Gated activations
    Fault(
        "gated activation: gate and up exchanged",
        "gated_activation",
        "activated, _ = _activation(gate, ACTIVATION)",
        "activated, _ = _activation(up, ACTIVATION)",
        GATED,
    ),
    Fault(
        "gated activation backward: gate's gradient without up",
        "gated_activation",
        "(dy * up * slope)",
        "(dy * slope)",
        GATED,
    ),
    Fault(
        "gated activation backward: up's gradient has the slope",
        "gated_activation",
        "(dy * activated)",
        "(dy * slope)",
        GATED,
    ),
    Fault(
        "gated activation: last block of a row dropped",
        "gated_activation",
        "(WIDTH + BLOCK - 1) // BLOCK",
        "WIDTH // BLOCK + (WIDTH < BLOCK)",
        GATED,
    ),
    Fault(
        "gated activation of a view: stride taken for width",
        "gated_activation",
        "up_ptr + rows * up_stride",
        "up_ptr + rows * WIDTH",
        GATED,
    ),
    # Rotary embedding
    Fault("rotary backward: not transposed", "rotary", "    if BACKWARD:", "    if False:", ROTARY),
    Fault(
        "rotary: halves taken for neighbours",
        "rotary",
        "        if INTERLEAVED:\n            first",
        "        if not INTERLEAVED:\n            first",
        ROTARY,
    ),
    Fault(
        "rotary: every batch row gets the first one's table",
        "rotary",
        "cos_ptr + batch * cos_batch_stride",
        "cos_ptr + 0 * cos_batch_stride",
        ROTARY,
    ),
    Fault("rotary: unturned elements of a head not copied", "rotary", "if HEAD_DIM > 2 * PAIRS:", "if False:", ROTARY),
    # Softmax losses
    Fault(
        "cross entropy: padding of the last block counted",
        "_softmax_loss",
        'z = tl.where(mask, z, float("-inf"))',
        "z = tl.where(mask, z, 0.0)",
        CE,
    ),
    Fault(
        "cross entropy: last, partial block dropped",
        "_softmax_loss",
        "        if n_whole < n_classes:\n            maximum",
        "        if False:\n            maximum",
        CE,
    ),
    Fault(
        "cross entropy: running sum not rescaled",
        "_softmax_loss",
        "total = total * rescale + tl.sum(exponentials, 1)",
        "total = total + tl.sum(exponentials, 1)",
        CE,
    ),
    Fault(
        "cross entropy: gradient misses the label",
        "_softmax_loss",
        "gradient -= tl.where(columns == label, hit, 0.0)",
        "gradient -= 0.0",
        CE,
    ),
    Fault(
        "cross entropy: wrong sign at the label",
        "_softmax_loss",
        "gradient -= tl.where(columns == label, hit, 0.0)",
        "gradient += tl.where(columns == label, hit, 0.0)",
        CE,
    ),
    Fault(
        "cross entropy: gradient of ignored rows left unwritten",
        "_softmax_loss",
        "tl.store(gradient_ptr + columns, zeros, mask=columns < n_classes)",
        "pass",
        CE,
    ),
    Fault(
        "cross entropy: soft-cap without its slope",
        "_softmax_loss",
        "    if SOFTCAP:\n        gradient *= slope\n",
        "",
        CE,
    ),
    Fault(
        "cross entropy: smoothing not spread",
        "_softmax_loss",
        "        else:\n            gradient -= spread",
        "        else:\n            gradient -= 0.0",
        CE,
    ),
    Fault("cross entropy: z-loss without its gradient", "_softmax_loss", "+ factor * 2.0 * z_loss * lse", "", CE),
    Fault(
        "cross entropy: z-loss without its factor 2", "_softmax_loss", "factor * 2.0 * z_loss", "factor * z_loss", CE
    ),
    Fault(
        "cross entropy: class weights ignored in the gradient",
        "_softmax_loss",
        "hit = factor * (1.0 - smoothing) * label_weight",
        "hit = factor * (1.0 - smoothing)",
        CE,
    ),
    Fault(
        "cross entropy: label out of range is a number",
        "_softmax_loss",
        'lse = tl.where(in_range, lse, float("nan"))',
        "lse = lse",
        LABELS,
    ),
    # The head in tiles
    Fault(
        "head: last tile dropped",
        "_tiles",
        "    for start, end in ranges:",
        "    for start, end in ranges[: max(1, len(ranges) - 1)]:",
        LCE,
    ),
    Fault("head: weight's gradient of the last tile only", "_tiles", "first=start == 0)", "first=True)", LCE),
    Fault(
        "head: weight's gradient accumulates in bf16",
        "_products",
        "total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)",
        "total.copy_(a @ b + (0 if first else total.to(a.dtype)))",
        LCE,
    ),
    Fault(
        "head: rows not gathered, those at the tile's place taken",
        "_tiles",
        "x = hidden.index_select(0, row_index)",
        "x = hidden[start:end]",
        LCE,
    ),
    Fault(
        "head: gradients of rows not scattered back",
        "_products",
        "total.index_copy_(0, rows, torch.mm(logit_gradient, weight))",
        "total[: len(rows)] = torch.mm(logit_gradient, weight)",
        LCE,
    ),
    Fault(
        "head: rows without label keep what was in memory",
        "_products",
        "make = torch.empty if every_row else torch.zeros",
        "make = lambda *a, **k: torch.full(a[0], 7.0, **k)",
        LCE,
    ),
    Fault(
        "head: bias forgotten in the product",
        "_products",
        "return torch.addmm(bias, hidden, weight.t(), out=out)",
        "return torch.mm(hidden, weight.t(), out=out)",
        LCE,
    ),
    Fault(
        "head: gradient of the bias of the last tile only",
        "_products",
        "self.bias += logit_gradient",
        "self.bias.copy_(logit_gradient.sum(0)) if True else logit_gradient",
        LCE,
    ),
    Fault(
        "head: low-rank term forgotten in a tile of classes",
        "_tiles",
        "class_bias, part, None if",
        "class_bias, None, None if",
        LOW_RANK,
    ),
    Fault(
        "head: gradient of the low-rank hidden states forgotten",
        "_products",
        "_write_rows(self.low_rank_hidden, rows, logit_gradient, low_rank.weight)",
        "self.low_rank_hidden.zero_()",
        LOW_RANK,
    ),
    Fault(
        "head: gradient of the low-rank weight of the last tile only",
        "_products",
        "accumulate_weight_gradient(self.low_rank_weight, logit_gradient, low_rank.hidden, first)",
        "accumulate_weight_gradient(self.low_rank_weight, logit_gradient, low_rank.hidden, True)",
        LOW_RANK,
    ),
    Fault(
        "head: low-rank rows not gathered, those at the tile's place taken",
        "_products",
        "return x[index] if isinstance(index, slice) else x.index_select(0, index)",
        "return x[index] if isinstance(index, slice) else x[: len(index)]",
        LOW_RANK,
    ),
    Fault(
        "head: num_items forgotten", "linear_cross_entropy", "divisor_tensor=num_items,", "divisor_tensor=None,", LCE
    ),
    Fault(
        "head: upstream gradient forgotten",
        "linear_cross_entropy",
        "factor = None if ctx.per_row else upstream",
        "factor = None",
        LCE,
    ),
    Fault(
        "head: a bound of the labels that is too small passes unseen",
        "_reduction",
        "return 1 / torch.where(count > n_processed, torch.nan, over)",
        "return 1 / over",
        LCE,
    ),
    Fault(
        "head: the partition loses a row at the block's end",
        "_tiles",
        "valid_before += tl.sum(valid, 0)",
        "valid_before += tl.sum(valid, 0) - (start > 0)",
        PARTITION,
    ),
    Fault(
        "head: scale applied twice in place",
        "_tiles",
        "n_blocks = tl.where(scale == 1.0, 0, n_blocks)",
        "scale = scale * scale",
        f"{TILES} {LCE}",
    ),
    Fault(
        "log-probabilities: stale cache of logits",
        "_products",
        "out[:n_kept].copy_(kept)",
        "out[:n_kept].zero_()",
        LLP,
    ),
    Fault("log-probabilities: entropy without its moment", "_log_prob_rows", "(lse2 - expected_z)", "(lse2)", LLP),
    Fault(
        "log-probabilities: entropy's gradient without log p",
        "_log_prob_rows",
        "log_factor -= upstream * 0.6931471805599453",
        "log_factor -= 0.0",
        LLP,
    ),
    Fault(
        "log-probabilities: mean over the padded row",
        "_log_prob_rows",
        "tl.sum(z_sum, 0) / n_all_classes",
        "tl.sum(z_sum, 0) / (n_all_classes + 1)",
        LLP,
    ),
    Fault(
        "divergence: ignored rows get a gradient", "_divergence_rows", "== ignore_index:", "== ignore_index - 1:", JSD
    ),
    Fault(
        "divergence: mixture with the weights exchanged",
        "_divergence_rows",
        "(1.0 - beta) + beta * tl.exp2(ratio)",
        "beta + (1.0 - beta) * tl.exp2(ratio)",
        JSD,
    ),
    # A head that ranks hold together
    Fault(
        "parts of a head: hidden's gradient not summed over the ranks",
        "_vocabulary",
        "if part is not None and gradient.numel():",
        "if False:",
        PARTS,
    ),
    Fault(
        "parts of a head: log-sum-exp of one rank alone",
        "_vocabulary",
        "lse = torch.logsumexp(ranks.lse, 0)",
        "lse = ranks.lse[0]",
        PARTS,
    ),
    Fault(
        "parts of a head: entropy without the ranks' shares",
        "_vocabulary",
        "torch.where(counts, share * values, 0)",
        "torch.where(counts, values, 0)",
        PARTS,
    ),
    Fault(
        "parts of a head: labels that differ between ranks pass",
        "_vocabulary",
        "wrong = held.sum(0) != 1",
        "wrong = held.sum(0) < 0",
        PARTS,
    ),
    Fault(
        "parts of a head: every rank takes the label for its own",
        "_softmax_loss",
        "-torch.where(here, hit, 0).unsqueeze(1)",
        "-hit.unsqueeze(1)",
        PARTS,
    ),
    Fault(
        "parts of a head: the label's column not counted from the part's first class",
        "_softmax_loss",
        "label_column = (safe_label - first_class)",
        "label_column = (safe_label - 0)",
        PARTS,
    ),
    Fault(
        "parts of a head: smoothing spread over the part",
        "_softmax_loss",
        "spread = factor * smoothing / n_all_classes",
        "spread = factor * smoothing / n_classes",
        PARTS,
    ),
    Fault(
        "parts of a head: class weights of the first part",
        "_softmax_loss",
        "        class_weights_ptr += first_class\n",
        "        pass\n",
        PARTS,
    ),
    Fault(
        "parts of a head: tiles of classes not counted from the part's first class",
        "linear_log_probs",
        "first_class=own_first + first_class",
        "first_class=first_class",
        PARTS,
    ),
    Fault(
        "a second derivative is given where there is none",
        "_library",
        "    if torch.is_grad_enabled():\n        raise RuntimeError(",
        "    if False:\n        raise RuntimeError(",
        CALLS,
    ),
]
