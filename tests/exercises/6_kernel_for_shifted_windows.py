"""Exercise 6: the partition kernel for shifted windows.  Needs the extension, built anew after each change.

Why     `SWSA` pads and rolls the whole qkv map, three times as wide as its input, before `window_partition` copies it
        once more.  The kernel computes where each token comes from anyway; with a shift it can do all of it at once.
Where   csrc/windows.h, where all of the thinking is: `strip` starts so much further into the map, and the window at the
        seam takes its tokens from both ends of it, so that each of its strips is two, with M places between them.
        csrc/cpu.cpp and csrc/cuda.cu fill the places that have no token with zeros: one line each.
        csrc/ops.cpp and csrc/__init__.py hand the shift on: schema, gradient, fake form.
        scalablevit.py: the call in `window_partition`, and `SWSA`, which then only rolls its output back.
"""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import scalablevit
from helpers import random_tokens, randomised
from scalablevit import SWSA

pytestmark = pytest.mark.skipif(not scalablevit.KERNELS, reason="the extension is not built")


class Operators(TorchDispatchMode):
    """Collects (name, channels of the first tensor) of every operator that runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if isinstance(args[0], torch.Tensor) and args[0].ndim:
            self.seen.append((operator.overloadpacket.__name__, args[0].shape[-1]))
        return operator(*args, **kwargs or {})


def test_the_qkv_map_is_neither_padded_nor_rolled():
    with torch.no_grad(), Operators() as operators:
        SWSA(8, 2, 4)(torch.randn(1, 9, 14, 8))
    assert {name for name, channels in operators.seen if channels == 24}.isdisjoint({"roll", "constant_pad_nd"})


@settings(max_examples=60)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 6))
def test_output_and_gradients_are_those_of_the_plain_form(H, W, M):
    def run():
        module, x = randomised(SWSA(8, 2, M)), random_tokens(2, H, W, 8).requires_grad_()
        out = module(x)
        return out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scalablevit, "KERNELS", ())
        expected = run()
    for got, exact in zip(run(), expected):
        torch.testing.assert_close(got, exact)
