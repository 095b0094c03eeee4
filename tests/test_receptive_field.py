"""Which tokens an output token depends on, from gradients: the paper's claims about WSA, LIM, LEM and SSA."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

from helpers import random_tokens, randomised
from scalablevit import IWSA, LEM, PEG, SSA, SWSA, WSA, depthwise

sides = st.integers(1, 9)
windows = st.integers(1, 5)
few = settings(max_examples=15)


def field(module, H, W, C=4):
    """Boolean (H, W, H, W): does output token (i, j) depend on input token (k, l)?"""
    module = randomised(module)
    x = random_tokens(1, H, W, C).requires_grad_()
    out = (module(x) * random_tokens(C, seed=2)).sum(dim=-1).flatten()
    rows = [torch.autograd.grad(token, x, retain_graph=True)[0] for token in out]
    return torch.stack(rows).ne(0).any(dim=-1).reshape(H, W, H, W)


def where(H, W, related):
    """Boolean (H, W, H, W): related(i, k, H) and related(j, l, W) for tokens (i, j) and (k, l)."""
    rows = torch.tensor([[related(i, k, H) for k in range(H)] for i in range(H)])
    cols = torch.tensor([[related(j, l, W) for l in range(W)] for j in range(W)])
    return rows[:, None, :, None] & cols[None, :, None, :]


def same_window(M):
    return lambda i, k, n: i // M == k // M


def same_shifted_window(M):
    """A grid that starts at token M//2; an axis that fits in one window is not shifted."""
    return lambda i, k, n: (i + M - M // 2) // M == (k + M - M // 2) // M if n > M else True


def within(reach):
    return lambda i, k, n: abs(i - k) <= reach


@pytest.mark.parametrize("kind, same", [(WSA, same_window), (LEM, same_window), (SWSA, same_shifted_window)])
@few
@given(sides, sides, windows)
def test_a_token_sees_its_window_and_nothing_else(kind, same, H, W, M):
    assert torch.equal(field(kind(4, 2, M), H, W), where(H, W, same(M)))


@few
@given(sides, sides, windows, st.sampled_from([1, 3, 5]))
def test_lim_reaches_across_the_border_by_half_its_kernel(H, W, M, kernel):
    module = IWSA(4, 2, M)
    if kernel != 3:                                                 # unless changed
        module.lim = depthwise(4, kernel)
    assert torch.equal(field(module, H, W), where(H, W, same_window(M)) | where(H, W, within(kernel // 2)))


@few
@given(sides, sides, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([0.5, 1.0, 2.0]))
def test_ssa_sees_the_whole_map(H, W, s, rc):
    assert field(SSA(4, 2, rc, 1 / s ** 2), H, W).all()


@few
@given(sides, sides)
def test_peg_sees_its_neighbors(H, W):
    assert torch.equal(field(PEG(4), H, W), where(H, W, within(1)))


@pytest.mark.parametrize("kind", [WSA, SWSA, LEM, IWSA])
def test_samples_of_a_batch_do_not_mix(kind):
    """The windows of all samples form one batch; none may attend to another sample."""
    module, x = randomised(kind(4, 2, 3)), random_tokens(3, 5, 7, 4)
    torch.testing.assert_close(module(x), torch.cat([module(sample[None]) for sample in x]))
