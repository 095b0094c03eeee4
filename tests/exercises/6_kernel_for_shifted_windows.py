"""Exercise 6: a partition kernel for shifted windows.  Needs the extension, rebuilt after each change.

Why     `SWSA` pads the whole qkv map at the top and left, and then `window_partition` copies it again.  The kernel
        computes the source of each token anyway; given the padding, it can do both in one pass.
Where   csrc/windows.h has the main change: with `top` and `left` in `Windows`, a strip can begin before the map, so its
        first tokens may be padding, as its last ones can be now.
        csrc/partition_merge_cpu.cpp and ..._cuda.cu: write zeros for padding tokens, a line or two each.
        csrc/ops.cpp and csrc/ops.py: pass on the two numbers (schema, checks, output shape, gradient).
"""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from helpers import to_windows

pytest.importorskip("scalablevit_kernels")


@settings(max_examples=60)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(2, 6), st.data())
def test_output_and_gradient_equal_those_of_the_padded_map(H, W, M, data):
    top, left = data.draw(st.integers(0, M - 1)), data.draw(st.integers(0, M - 1))
    qkv = torch.randn(2, H, W, 24, dtype=torch.float64, requires_grad=True)
    got = torch.ops.scalablevit.window_partition(qkv, 2, M, top, left)
    expected = to_windows(F.pad(qkv, (0, 0, left, 0, top, 0)), 2, M)
    assert torch.equal(got, expected)
    weight = torch.randn_like(got)
    assert torch.equal(*(torch.autograd.grad(out, qkv, weight)[0] for out in (got, expected)))
