"""count_macs against PyTorch's own counter, against loops over windows, and the growth that the paper speaks of."""
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import scalablevit
from helpers import architectures
from scalablevit import IWSA, LEM, SSA, SWSA, WSA, ScalableViT, count_macs, scalablevit_s, scalablevit_tiny

ROOT = Path(__file__).parent.parent


def counted(module, x, without=()):
    """(modules, attention) as FlopCounterMode sees them: two flops per multiply-accumulate.

    The counter knows the mathematical attention only, as two batched matrix products (bmm); the fused CPU kernel
    would go uncounted.  So the plain form is split in two, and with kernels, where IWSA is one operator, the sum must be
    the same.  Submodules whose name ends in one of `without` are taken out again.
    """
    def count():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            module(x)
        return counter

    with_kernels = count().get_total_flops()
    with mock.patch.object(scalablevit, "KERNELS", ()):
        counter = count()
    assert counter.get_total_flops() == with_kernels
    by_module = counter.get_flop_counts()
    counts = {str(op).removeprefix("aten."): flops for op, flops in by_module["Global"].items()}
    assert set(counts) <= {"convolution", "addmm", "mm", "bmm"}
    attention = counts.pop("bmm", 0)
    left_out = sum(sum(ops.values()) for name, ops in by_module.items() if name.endswith(tuple(without)))
    return (sum(counts.values()) - left_out) // 2, attention // 2


@st.composite
def dividing(draw):
    """An architecture and an image size at which every window and every reduction of every stage divides the map."""
    kwargs = draw(architectures(max_stages=3, scales=(1, 2, 3), max_window=3))
    unit = math.lcm(kwargs["window"], *(math.isqrt(round(1 / rn)) for rn in kwargs["rn"]))
    stages = len(kwargs["depths"])

    def side():                              # up to three pixels short of a multiple of 4: the first map is the same
        return 4 * 2 ** (stages - 1) * unit * draw(st.integers(1, 6 // unit)) - draw(st.integers(0, 3))

    return kwargs, (side(), side())


@settings(max_examples=30)
@given(dividing())
def test_count_macs_equals_pytorch_s_counter(case):
    kwargs, (H, W) = case
    model = ScalableViT(**kwargs).eval()
    modules, attention = counted(model, torch.randn(1, kwargs["in_chans"], H, W))
    assert count_macs(model, (H, W)) == {"modules": modules, "attention": attention}


def test_count_macs_equals_pytorch_s_counter_on_the_real_models():
    for model in (scalablevit_tiny().eval(), scalablevit_s().eval()):
        modules, attention = counted(model, torch.randn(1, 3, 224, 224))
        assert count_macs(model, (224, 224)) == {"modules": modules, "attention": attention}


def tokens_per_window(n, M, shift):
    """Real tokens in each window along an axis.  SWSA rolls the axis, padding included, to the left by `shift`."""
    length = math.ceil(n / M) * M
    return list(Counter((i - shift) % length // M for i in range(n)).values())


def by_loops(attn, H, W, C):
    """Attention MACs of one module, and those of the convolution that may run over padding: real tokens only.

    SWSA's window at the seam is one window, as it is computed: the pairs that its mask then hides are real tokens.
    """
    if isinstance(attn, SSA):
        keys = sum(1 for _ in range(0, H, attn.s) for _ in range(0, W, attn.s))
        return H * W * keys * (attn.q.out_features + C), H * W * C if attn.s > 1 else 0   # each token meets one weight
    M, macs = attn.window, 0
    rows, cols = (tokens_per_window(n, M, M // 2 if isinstance(attn, SWSA) and n > M else 0) for n in (H, W))
    for h in rows:
        for w in cols:
            macs += 2 * (h * w) ** 2 * C                                                # Q Kᵀ and A V
    return macs, 9 * H * W * C if isinstance(attn, LEM) else 0


@given(architectures(max_stages=3), st.integers(1, 60), st.integers(1, 60))
def test_at_any_size_real_tokens_are_counted_and_padding_is_not(kwargs, H, W):
    model = ScalableViT(**kwargs).eval()
    modules, run_attention = counted(model, torch.randn(1, kwargs["in_chans"], H, W), without=[".lem", ".reduce.0"])
    attention = 0
    for i, stage in enumerate(model.stages):
        h, w = math.ceil(H / (4 * 2 ** i)), math.ceil(W / (4 * 2 ** i))
        for block in stage.blocks:
            a, c = by_loops(block.attn, h, w, kwargs["dim"] * 2 ** i)
            attention, modules = attention + a, modules + c
    assert count_macs(model, (H, W)) == {"modules": modules, "attention": attention}
    assert attention <= run_attention                                # what runs is full windows, padded and masked


# ------------------------------------------------------------------------------------------------ growth with N
@pytest.mark.parametrize("kind", [WSA, LEM, IWSA])
def test_window_attention_grows_linearly_in_N(kind):
    module = kind(8, 2, window=4)
    costs = [counted(module, torch.randn(1, 4 * k, 8, 8)) for k in (1, 2, 4, 8)]        # N = 32 k
    assert costs == [(costs[0][0] * k, costs[0][1] * k) for k in (1, 2, 4, 8)]
    assert costs[0][1] == 2 * 4 ** 2 * 32 * 8                                           # 2 M² N C
    assert costs == [module.macs(4 * k, 8) for k in (1, 2, 4, 8)]


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.sampled_from([0.5, 1.0, 1.25]))
def test_ssa_costs_N_times_N_rn(h, w, s, rc):
    module, (H, W) = SSA(8, 2, rc, 1 / s ** 2), (h * s, w * s)
    N, N_rn, scaled = H * W, h * w, 8 if s == 1 else int(8 * rc)
    assert module.macs(H, W)[1] == counted(module, torch.randn(1, H, W, 8))[1] == N * N_rn * (scaled + 8)


def test_ssa_is_quadratic_at_a_fixed_ratio_and_linear_at_a_fixed_number_of_keys():
    ratio = [SSA(8, 2, 1.0, 1 / 16).macs(8 * k, 8)[1] for k in (1, 2, 4)]
    assert ratio == [ratio[0], 4 * ratio[0], 16 * ratio[0]]
    keys = [SSA(8, 2, 1.0, 1 / (2 * k) ** 2).macs(8 * k, 8 * k)[1] for k in (1, 2, 4)]    # 4 x 4 keys, N = 64 k²
    assert keys == [keys[0], 4 * keys[0], 16 * keys[0]]


# ------------------------------------------------------------------------------------------------ python scalablevit.py
def command(*arguments):
    return subprocess.run([sys.executable, "scalablevit.py", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_command_prints_what_count_macs_counts():
    with torch.device("meta"):
        model = scalablevit_s()
    for arguments, size in (((), (224, 224)), (("--size", "97", "160"), (97, 160))):
        result = command(*arguments)
        assert result.returncode == 0 and result.stderr == ""
        cost = count_macs(model, size)
        table = result.stdout[result.stdout.index("scalablevit_s at"):result.stdout.index("scalablevit_b at")]
        assert f"scalablevit_s at {size[0]}x{size[1]}" in table
        total = next(line for line in table.splitlines() if "in all" in line).split()
        billions = [cost["modules"] / 1e9, cost["attention"] / 1e9, sum(cost.values()) / 1e9]
        assert total[-4:] == ["32,000,472", *(f"{n:.3f}G" for n in billions)]
        for i in range(4):
            shape = f"{64 * 2 ** i} x {math.ceil(size[0] / 2 ** (i + 2))} x {math.ceil(size[1] / 2 ** (i + 2))}"
            row = next(line for line in table.splitlines() if f"stage {i + 1}" in line)
            assert shape in row and f"{sum(p.numel() for p in model.stages[i].parameters()):,}" in row
        for paper in ("32M, 4.2G", "81M, 8.6G", "104M, 14.7G", "attention"):
            assert paper in result.stdout


@pytest.mark.parametrize("size", [("0", "5"), ("224", "-1"), ("a", "b"), ("224",)])
def test_the_command_refuses_a_bad_size(size):
    result = command("--size", *size)
    assert result.returncode == 2 and result.stdout == ""
    assert "--size" in result.stderr and "Traceback" not in result.stderr
