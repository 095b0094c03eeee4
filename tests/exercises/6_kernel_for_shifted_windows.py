"""Exercise 6: the partition kernel for shifted windows.  Needs the extension, built anew after each change.

Why     `SWSA` pads the whole qkv map at the top and on the left before `window_partition` copies it once more.  The
        kernel works out where each token comes from anyway; told the padding, it can do both at once.
Where   csrc/windows.h, where all of the thinking is: with `top` and `left` in `Windows`, `strip` begins so much before
        the map, and its first tokens may be padding, as its last ones may be today.
        csrc/cpu.cpp and csrc/cuda.cu fill the places that have no token with zeros: a line or two each.
        csrc/ops.cpp and csrc/ops.py hand the two numbers on: schema, check, shapes that go out, gradient.
"""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import scalablevit

pytest.importorskip("scalablevit_kernels")


@settings(max_examples=60)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(2, 6), st.data())
def test_output_and_gradient_are_those_of_the_padded_map(H, W, M, data):
    top, left = data.draw(st.integers(0, M - 1)), data.draw(st.integers(0, M - 1))
    qkv = torch.randn(2, H, W, 24, dtype=torch.float64, requires_grad=True)
    got = torch.ops.scalablevit.window_partition(qkv, 2, M, top, left)
    expected = scalablevit.window_partition(F.pad(qkv, (0, 0, left, 0, top, 0)), 2, M)
    assert torch.equal(got, expected)
    weight = torch.randn_like(got)
    assert torch.equal(*(torch.autograd.grad(out, qkv, weight)[0] for out in (got, expected)))
