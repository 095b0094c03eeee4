"""How fast the kernels are: the four stage shapes of ScalableViT-S at 224x224, against plain PyTorch and a plain copy.

    python tests/bench.py [--device cuda] [--batch 8] [--threads 2] [--seconds 2]

One run takes turns between the plain PyTorch form, the kernel, and a copy that reads and writes as many bytes as the
kernel must, so that whatever else the machine does meets all three.  Medians in milliseconds.
"""
import argparse
import ctypes
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import scalablevit  # noqa: E402

STAGES = [(56, 64, 2), (28, 128, 4), (14, 256, 8), (7, 512, 16)]    # H = W, C, heads
M, KERNELS = 7, scalablevit.KERNELS


def medians(functions, device, seconds):
    """Of each function, in milliseconds."""
    times, end = [[] for _ in functions], None
    while end is None or time.perf_counter() < end or len(times[0]) < 5:
        for function, own in zip(functions, times):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = function()
            if device == "cuda":
                torch.cuda.synchronize()
            own.append((time.perf_counter() - start) * 1e3)
            del result
        if end is None:                                            # the first round warms up
            times, end = [[] for _ in functions], time.perf_counter() + seconds
    return [statistics.median(own) for own in times]


def switched(kernels, function):
    """function with the kernels on or off."""
    def call():
        scalablevit.KERNELS = kernels
        return function()
    return call


def main():
    parser = argparse.ArgumentParser(description="The kernels against plain PyTorch and a plain copy.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--seconds", type=float, default=2, help="per line")
    args = parser.parse_args()
    if args.device not in KERNELS:
        sys.exit(f"scalablevit_kernels is not built for {args.device} (kernels: {', '.join(KERNELS) or 'none'})")
    torch.set_num_threads(args.threads)
    if sys.platform == "linux":
        # Memory that is freed stays with the process: whether an allocator hands it back, so that the next call pays for
        # fresh pages, is chance, and would cost a kernel or a copy several times what it does.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):                               # glibc
            libc.mallopt(-1, 2 ** 31 - 1)                          # M_TRIM_THRESHOLD
            libc.mallopt(-3, 2 ** 31 - 1)                          # M_MMAP_THRESHOLD
    print(f"{'':43}{'plain':>9}{'kernel':>9}{'copy':>9}{'plain/kernel':>14}{'kernel/copy':>13}")
    for size, C, heads in STAGES:
        for dtype in torch.float32, torch.bfloat16:
            iwsa = scalablevit.IWSA(C, heads, M).to(args.device, dtype)
            qkv = torch.randn(args.batch, size, size, 3 * C, device=args.device).to(dtype).requires_grad_()
            windows = scalablevit.window_partition(qkv.detach(), heads, M)
            with torch.no_grad():                                  # laid out as attention leaves it
                z = torch.nn.functional.scaled_dot_product_attention(*windows).requires_grad_()

            def partition():
                return scalablevit.window_partition(qkv, heads, M)

            def merge():
                return iwsa.merge(z, None, qkv, M)

            inputs = {partition: [qkv], merge: [z, qkv, iwsa.lim.weight, iwsa.lim.bias]}
            # Read and written per token, in units of C: partition 3 + 3; merge z, V and the output; its backward the
            # gradient and V, dz and the three thirds of dqkv.  A copy of n reads n and writes n.
            for name, function, forward_units, backward_units in (("partition", partition, 3, 3),
                                                                  ("merge + LIM", merge, 1.5, 3)):
                grad = torch.randn_like(function())

                def forward():
                    with torch.no_grad():
                        return function()

                def both():
                    return torch.autograd.grad(function(), inputs[function], grad)

                graphs = {kernels: switched(kernels, function)() for kernels in ((), KERNELS)}

                def backward():
                    return torch.autograd.grad(graphs[scalablevit.KERNELS], inputs[function], grad, retain_graph=True)

                for what, call, units in (("forward", forward, forward_units), ("backward", backward, backward_units),
                                          ("forward + backward", both, forward_units + backward_units)):
                    source = torch.randn(int(qkv.numel() // 3 * units), device=args.device).to(dtype)
                    plain, kernel, copy = medians([switched((), call), switched(KERNELS, call), source.clone],
                                                  args.device, args.seconds)
                    print(f"{size:2}x{size:<2} C {C:<3} {str(dtype)[6:]:<9}{name:<12}{what:<18}{plain:9.3f}{kernel:9.3f}"
                          f"{copy:9.3f}{plain / kernel:14.2f}{kernel / copy:13.2f}", flush=True)


if __name__ == "__main__":
    main()
