"""A process in which torch.ops.scalablevit.* are the operators for CUDA, compiled for a CPU and taking its tensors.

    python tests/cuda_on_cpu/process.py FOLDER FLAG...          builds in FOLDER; calls what comes in, as Calls sends it
    python tests/cuda_on_cpu/process.py FOLDER FLAG... example  builds and makes one small call: for a debugger
"""
import ctypes
import os
import pathlib
import pickle
import sys

import torch
from torch.utils.cpp_extension import load

HERE = pathlib.Path(__file__).parent


def build(folder, flags):
    sys.setdlopenflags(os.RTLD_LAZY)     # ops.cpp names the CPU's kernels too: they are not here, and nobody calls them
    module = load("cuda_on_cpu", [str(HERE.parents[1] / "csrc/ops.cpp"), str(HERE / "kernels.cpp")],
                  extra_cflags=["-DWITH_CUDA", "'-DON_CUDA(tensor)=true'", "-fno-strict-aliasing", *flags],
                  extra_ldflags=["-Wl,-z,lazy", *(flag for flag in flags if "sanitize" in flag)],
                  extra_include_paths=[str(HERE)], build_directory=folder, with_cuda=False)
    return ctypes.CDLL(module.__file__)


def serve(library, requests, answers):
    """Each request is a function's name, its arguments and the launches' settings; the answer what it returned or raised."""
    torch.use_deterministic_algorithms(True)                       # torch.empty is full of NaN
    while True:
        name, args, settings = pickle.load(requests)
        try:
            if name == "windows_h":
                answer = (ctypes.c_int64 * 12)()
                library.windows_h((ctypes.c_int64 * 6)(*args[:6]), *map(ctypes.c_int64, args[6:]), answer)
                answer = list(answer)
            else:
                library.launch_with(*map(ctypes.c_int64, settings))
                answer = getattr(torch.ops.scalablevit, name)(*args)
        except RuntimeError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    folder, *flags = sys.argv[1:]
    library = build(folder, [flag for flag in flags if flag != "example"])
    if "example" in flags:
        qkv, z = torch.randn(1, 5, 9, 3 * 8), torch.randn(1 * 1 * 2, 2, 7 * 7, 4)
        print(torch.ops.scalablevit.window_merge_lim(z, qkv, torch.randn(8, 1, 3, 3), torch.randn(8), 7).shape)
    else:
        answers, sys.stdout = sys.stdout.buffer, sys.stderr
        pickle.dump("built", answers)
        answers.flush()
        try:
            serve(library, sys.stdin.buffer, answers)
        except EOFError:
            pass
