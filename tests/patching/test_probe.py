from __future__ import annotations

import pytest
import torch
from torch import nn

from liger_trainer.patching.probe import (
    Call,
    Noise,
    compute_device,
    difference,
    fingerprint,
    nearly_bitwise,
    no_farther,
    quiet,
    shadow,
    training_dtype,
)

CPU = torch.device("cpu")


def test_noise_is_private_and_repeats():
    state = torch.get_rng_state()
    a = Noise(CPU).normal(3, 4, dtype=torch.float32)
    torch.manual_seed(7)
    b = Noise(CPU).normal(3, 4, dtype=torch.float32)
    torch.set_rng_state(state)
    assert torch.equal(a, b)
    Noise(CPU).rows(2, 5, 8, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_go_through_the_magnitudes():
    sizes = Noise(CPU).rows(2, 5, 512, dtype=torch.float32).norm(dim=-1) / 512**0.5
    torch.testing.assert_close(sizes[0], torch.tensor([1e-3, 0.1, 1.0, 30.0, 300.0]), rtol=0.1, atol=0)
    assert Noise(CPU).rows(2, 5, 512, dtype=torch.float16).abs().max() < 200  # the square stays finite


def test_quiet_restores_what_a_part_disturbs():
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), quiet(CPU):
        torch.randn(3)
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode(), quiet(CPU):
        assert not torch.ones(2).is_inference()


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(()))
        self.inner = nn.BatchNorm1d(3)
        self.calls = 0
        self.scale = 2.0

    def forward(self, x):
        self.calls += 1
        return self.scale * self.inner(x)


def test_a_shadow_shares_nothing_that_it_could_change(untouched):
    part = Part()
    part.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    part.inner.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    check = untouched(part)
    copied = shadow(part)
    assert type(copied) is Part
    assert not list(copied.parameters(recurse=False))
    call = Call.of(copied.forward, [torch.randn(5, 3, requires_grad=True)], list(copied.parameters()))
    assert len(call.gradients) == 3
    assert copied.calls == 1
    assert int(copied.inner.num_batches_tracked) == 1
    check()
    assert part.calls == 0
    assert all(p.grad is None for p in [*part.parameters(), *copied.parameters()])


def test_fingerprint_tells_attributes_children_and_tensors_apart():
    parts = [Part() for _ in range(6)]
    parts[1].scale = 3.0
    parts[2].double()
    parts[3].inner.eps = 1e-3
    parts[4].scale = 2  # equal, and of another type
    assert fingerprint(parts[0]) == fingerprint(parts[5])
    assert len({fingerprint(part) for part in parts}) == 5


def test_devices_and_dtypes():
    meta = nn.Linear(2, 2, device="meta")
    assert compute_device(list(meta.parameters())) == (torch.accelerator.current_accelerator() or CPU)
    assert compute_device([]) == (torch.accelerator.current_accelerator() or CPU)
    assert training_dtype([torch.zeros(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.float16)]) == torch.float16
    assert training_dtype([torch.zeros(2, dtype=torch.float8_e4m3fn)]) == torch.bfloat16


class TestDifference:
    x = Noise(CPU).rows(4, 5, 64, dtype=torch.float32).requires_grad_()

    def of(self, function, dtype=torch.float32):
        return Call.of(function, [self.x.detach().to(dtype).requires_grad_()])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_none_within_rounding(self, dtype):
        ours = self.of(lambda x: (x.double() * torch.sigmoid(x.double())).to(x.dtype), dtype)
        assert difference(ours, self.of(nn.functional.silu, dtype), "here") is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "wrong",
        [
            nn.functional.mish,
            lambda x: nn.functional.silu(x.clamp(-10, 10)),
            lambda x: nn.functional.silu(x) * 1.03,
            lambda x: nn.functional.silu(x) + 1e-2,
            lambda x: torch.where(x > 700, 0, nn.functional.silu(x)),
        ],
    )
    def test_output(self, wrong, dtype):
        reason = difference(self.of(wrong, dtype), self.of(nn.functional.silu, dtype), "in the test")
        assert reason.startswith("output differs by")
        assert reason.endswith("in the test")

    def test_gradient_only(self):
        def straight_through(x):
            y = nn.functional.silu(x)
            return y.detach() + x - x.detach()

        reason = difference(self.of(straight_through), self.of(nn.functional.silu), "here")
        assert reason.startswith("gradient differs by")

    def test_missing_gradient(self):
        other = torch.full((), 2.0, requires_grad=True)
        reason = difference(self.of(lambda x: x.detach() * other), self.of(lambda x: x * 2), "here")
        assert reason == "only one of the two has a gradient, here"

    def test_dtype_shape_count_and_errors(self):
        plain = self.of(nn.functional.silu)
        assert "float32 expected, got (4, 5, 64) bfloat16" in difference(self.of(lambda x: x.bfloat16()), plain, "here")
        assert "expected, got (4, 5)" in difference(self.of(lambda x: x.sum(-1)), plain, "here")
        assert "1 outputs expected, got 2" in difference(self.of(lambda x: (x, x)), plain, "here")
        assert difference(self.of(lambda x: 1 / 0), plain, "here").startswith("the kernel raises ZeroDivisionError")
        assert difference(plain, self.of(lambda x: [x]), "here").startswith("its forward returns something that is not")

    def test_nan_where_a_number_is_expected(self):
        assert difference(self.of(lambda x: x * float("nan")), self.of(lambda x: x), "here") is not None

    def test_no_farther(self):
        x = torch.linspace(-9, 9, 40, dtype=torch.bfloat16).view(2, 20).requires_grad_()

        def written_out(x):
            return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x.pow(3))))

        def gelu(x, factor=1.0):
            return factor * nn.functional.gelu(x, approximate="tanh")

        exact = Call.of(gelu, [x.detach().double().requires_grad_()])
        once, often = Call.of(gelu, [x]), Call.of(written_out, [x])
        assert no_farther(once, often, exact)
        assert no_farther(often, often, exact)
        assert not no_farther(Call.of(lambda x: gelu(x, 1.3), [x]), often, exact)
        assert not no_farther(Call.of(lambda x: gelu(x).detach() + 0 * x, [x]), often, exact)
        assert not no_farther("raises", often, exact)
        assert not no_farther(Call.of(lambda x: gelu(x).float(), [x]), often, exact)

    def test_nearly_bitwise_sees_a_cast(self):
        once = self.of(lambda x: (nn.functional.silu(x.float()) * 1.7).to(x.dtype), torch.bfloat16)
        twice = self.of(lambda x: nn.functional.silu(x) * 1.7, torch.bfloat16)
        assert difference(once, twice, "here") is None
        assert not nearly_bitwise(once, twice)
        assert nearly_bitwise(twice, twice)
