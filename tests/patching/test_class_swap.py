from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from liger_trainer.patching.class_swap import is_swapped, stock_class, swap, unswap
from liger_trainer.patching.forwards import renamed_like, takes_one_input


class Doubler(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("count", torch.zeros(1))
        self.shared = self.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Twice."""
        return 2 * super().forward(inputs)


class OwnCopies(Doubler):
    """A class with a deepcopy and a pickle of its own."""

    def __deepcopy__(self, memo):
        copied = OwnCopies()
        copied.load_state_dict(self.state_dict())
        copied.copied = True
        return copied

    def __reduce__(self):
        return OwnCopies, ()


def tripled(self, x):
    return 3 * x


MEMBERS = {"forward": renamed_like(tripled, Doubler.forward)}
OTHER = {"forward": renamed_like(lambda self, x: 4 * x, Doubler.forward)}


def test_swap_and_unswap():
    module, x = Doubler(), torch.randn(2, 3)
    expected = module(x)
    swap(module, MEMBERS)
    assert is_swapped(module)
    assert torch.equal(module(x), 3 * x)
    assert isinstance(module, Doubler)
    assert stock_class(module) is Doubler
    assert type(module).__name__ == "Doubler"
    assert type(module).__module__ == Doubler.__module__
    assert type(module).__doc__ == Doubler.__doc__
    assert "Doubler" in repr(module)
    assert inspect.signature(module.forward) == inspect.signature(Doubler().forward)
    assert torch.equal(module(inputs=x), 3 * x)
    unswap(module)
    assert type(module) is Doubler
    assert torch.equal(module(x), expected)
    unswap(module)  # without effect


def test_one_class_for_equal_members_and_another_for_others():
    a, b, c = Doubler(), Doubler(), Doubler()
    swap(a, MEMBERS)
    swap(b, dict(MEMBERS))
    swap(c, OTHER)
    assert type(a) is type(b) is not type(c)


def test_swapping_twice_is_refused():
    module = Doubler()
    swap(module, MEMBERS)
    with pytest.raises(RuntimeError, match="Doubler is patched already"):
        swap(module, OTHER)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("cls", [Doubler, OwnCopies])
def test_a_pickle_holds_the_stock_class(cls, protocol):
    module = cls()
    swap(module, MEMBERS)
    pickled = pickle.dumps(module, protocol)
    assert b"liger_trainer" not in pickled
    loaded = pickle.loads(pickled)
    assert type(loaded) is cls
    assert loaded.state_dict().keys() == module.state_dict().keys()
    if cls is Doubler:
        assert torch.equal(loaded.weight, module.weight)
        assert loaded.shared is loaded.weight
    assert is_swapped(module)


def test_copies_are_swapped():
    module = Doubler()
    swap(module, MEMBERS)
    deep, shallow = copy.deepcopy(module), copy.copy(module)
    assert type(deep) is type(shallow) is type(module)
    assert deep.weight is not module.weight
    assert deep.shared is deep.weight
    assert shallow.weight is module.weight
    pair = copy.deepcopy(nn.ModuleList([module, module]))
    assert pair[0] is pair[1]
    unswap(deep)
    assert type(deep) is Doubler


def test_a_deepcopy_of_the_class_own_is_called():
    module = OwnCopies()
    swap(module, MEMBERS)
    copied = copy.deepcopy(module)
    assert copied.copied
    assert is_swapped(copied)


def test_a_class_derived_from_a_swapped_one_is_not_silently_replaced():
    module = Doubler()
    swap(module, MEMBERS)
    module.__class__ = type("FSDPDoubler", (type(module),), {})
    with pytest.raises(RuntimeError, match="FSDPDoubler"):
        unswap(module)


def test_compiled():
    module, x = Doubler(), torch.randn(2, 3)
    swap(module, MEMBERS)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), 3 * x)


def test_takes_one_input():
    assert takes_one_input(Doubler.forward)
    assert not takes_one_input(lambda self: None)
    assert not takes_one_input(lambda self, x, gate=None: None)
    assert not takes_one_input(lambda self, *x: None)
    assert not takes_one_input(torch.no_grad()(Doubler.forward))
