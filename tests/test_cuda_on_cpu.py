"""The CUDA kernels, executed on a CPU: csrc/cuda.cu and the CUDA branch of csrc/ops.cpp against plain PyTorch in float64.

tests/cuda_on_cpu/ stands in for CUDA's headers and runs every thread of every block.  What it cannot show is what a GPU
alone has: its speed, its own compiler's code and its memory model.  The same cases under the sanitizers, once per change:

    CUDA_ON_CPU="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" pytest tests/test_cuda_on_cpu.py
    CUDA_ON_CPU="-O1 -g -fsanitize=thread -DREAL_THREADS" pytest tests/test_cuda_on_cpu.py    # shared memory's races; slow
"""
import math
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

FOLDER = pathlib.Path(__file__).parent / "cuda_on_cpu"
FLAGS = os.environ.get("CUDA_ON_CPU", "-O1").split()
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GRID = 2 ** 31 - 1
CXX = os.environ.get("CXX", "c++").split()[0]


class Process:
    """tests/cuda_on_cpu/process.py: calls an operator there, its kernels launched as asked."""

    def __init__(self, folder):
        self.log = open(folder / "log", "w+")
        names = [f"lib{name[0]}san.so" for name in ("address", "thread") if any(name in flag for flag in FLAGS)]
        preload = [subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
                   for name in [*names, "libstdc++.so.6"] if names]          # a sanitizer has to be there before Python
        env = {"ASAN_OPTIONS": "detect_leaks=0"} | os.environ | {"LD_PRELOAD": " ".join(preload)}
        self.process = subprocess.Popen([sys.executable, FOLDER / "process.py", folder, *FLAGS], env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        self.answer()

    def answer(self):
        try:
            answer = pickle.load(self.process.stdout)
        except EOFError:
            self.process.wait()
            self.log.seek(0)
            pytest.exit(f"the process that runs the kernels ended:\n{self.log.read()[-5000:]}", returncode=1)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __call__(self, name, *args, threads=64, blocks=GRID, failing=-1, seed=0):
        pickle.dump((name, args, (threads, blocks, failing, seed)), self.process.stdin)
        self.process.stdin.flush()
        return self.answer()


@pytest.fixture(scope="session")
def cuda(tmp_path_factory):
    if shutil.which(CXX) is None:
        pytest.skip("there is no C++ compiler")
    if shutil.which("ninja") is None:
        pytest.skip("there is no ninja, with which PyTorch builds extensions")
    process = Process(tmp_path_factory.mktemp("cuda_on_cpu"))
    yield process
    process.process.stdin.close()
    assert process.process.wait() == 0, "a sanitizer found something"


# ------------------------------------------------------------------------------------------------ the plain form
def partition(qkv, heads, M):
    """(B, H, W, 3C) -> (3, B·windows, heads, M², d)"""
    B, H, W, C3 = qkv.shape
    padded = F.pad(qkv, (0, 0, 0, -W % M, 0, -H % M))
    h, w = padded.shape[1] // M, padded.shape[2] // M
    cut = padded.reshape(B, h, M, w, M, 3, heads, C3 // 3 // heads).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return cut.reshape(3, B * h * w, heads, M * M, C3 // 3 // heads)


def merge_lim(z, qkv, weight, bias, M):
    """(B·windows, heads, M², d), (B, H, W, 3C) -> (B, H, W, C)"""
    B, H, W, C3 = qkv.shape
    h, w = -(-H // M), -(-W // M)
    merged = z.reshape(B, h, w, z.shape[1], M, M, z.shape[3]).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, h * M, w * M, C3 // 3)
    v = qkv[..., 2 * C3 // 3:].permute(0, 3, 1, 2)
    lim = F.conv2d(v, weight, bias, padding=weight.shape[-1] // 2, groups=C3 // 3)
    return merged[:, :H, :W] + lim.permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------ cases
launches = st.fixed_dictionaries(dict(threads=st.sampled_from([32, 48, 64]), blocks=st.sampled_from([1, 3, GRID]),
                                      seed=st.integers(0, 99)))


@st.composite
def cases(draw):
    """Arguments of the operators: maps that windows divide or not, any layout and alignment in memory."""
    B, H, W, M = draw(st.integers(0, 2)), draw(st.integers(1, 11)), draw(st.integers(1, 11)), draw(st.integers(1, 8))
    heads, d = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 8, 12, 16, 24, 33, 40]))
    k, dtype = draw(st.sampled_from([1, 3, 3, 3, 5, 7])), draw(st.sampled_from(DTYPES))
    windows, C = B * -(-H // M) * -(-W // M), heads * d
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def tensor(*shape, dtype=dtype):
        """Begins at a multiple of 16 bytes, or one number after one; contiguous, or with its dimensions in another order."""
        order = draw(st.sampled_from([list(range(len(shape)))] * 3 + [list(reversed(range(len(shape))))]))
        offset = draw(st.sampled_from([0, 0, 0, 1]))
        flat = torch.randn(offset + math.prod(shape), generator=generator).to(dtype)[offset:]
        return flat.view([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])

    z = {"contiguous": lambda: tensor(windows, heads, M * M, d),
         "as scaled_dot_product_attention's": lambda: tensor(windows, M * M, heads, d).transpose(1, 2),
         "part of more channels": lambda: tensor(windows, heads, M * M, d + 1)[..., :d],
         "any": lambda: tensor(d, windows, heads, M * M).permute(1, 2, 3, 0)}[draw(st.sampled_from([
             "contiguous", "as scaled_dot_product_attention's", "part of more channels", "any"]))]()
    weights = draw(st.sampled_from([dtype, torch.promote_types(dtype, torch.float32)]))    # autocast: float32
    return dict(heads=heads, M=M, qkv=tensor(B, H, W, 3 * C), z=z, weight=tensor(C, 1, k, k, dtype=weights),
                bias=tensor(C, dtype=weights), grad=tensor(B, H, W, C),
                grad_windows=tensor(3, windows, heads, M * M, d))


def close(got, exact):
    """Within the rounding of got's dtype, measured against the largest element; exact is float64."""
    assert got.shape == exact.shape
    error = (got.double() - exact).abs() / exact.abs().max().clamp_min(1) if exact.numel() else exact
    assert (error <= ROUNDING[got.dtype]).all(), f"off by {error.max()}"


@settings(max_examples=120)
@given(case=cases(), launch=launches)
def test_partition_moves_every_bit_both_ways(cuda, case, launch):
    qkv, heads, M, grad = case["qkv"], case["heads"], case["M"], case["grad_windows"]
    assert torch.equal(cuda("window_partition", qkv, heads, M, **launch), partition(qkv, heads, M))
    leaf = qkv.double().requires_grad_()
    partition(leaf, heads, M).backward(grad.double())
    got = cuda("window_partition_backward", grad, *qkv.shape[1:3], M, **launch)
    assert got.dtype == grad.dtype and torch.equal(got.double(), leaf.grad)


@settings(max_examples=120)
@given(case=cases(), launch=launches)
def test_merge_lim_against_its_definition_in_float64(cuda, case, launch):
    args = [case[name] for name in ("z", "qkv", "weight", "bias")]
    got = cuda("window_merge_lim", *args, case["M"], **launch)
    assert got.dtype == case["qkv"].dtype
    close(got, merge_lim(*(a.double() for a in args), case["M"]))


@settings(max_examples=80)
@given(case=cases(), launch=launches)
def test_merge_lim_backward_against_autograd_in_float64(cuda, case, launch):
    exact = [case[name].double().requires_grad_() for name in ("z", "qkv", "weight", "bias")]
    merge_lim(*exact, case["M"]).backward(case["grad"].double())
    got = cuda("window_merge_lim_backward", case["grad"], case["qkv"], case["weight"], case["heads"], case["M"], **launch)
    for a, b, like in zip(got, exact, ("qkv", "qkv", "weight", "bias")):
        assert a.dtype == case[like].dtype
        close(a, b.grad)
