"""How fast ScalableViT-S and its kernels are, beside their peers.

    python tests/bench.py [kernels] [models] [large] [--device cuda] [--batch 8] [--threads 2] [--seconds 2]

    kernels   the four stage shapes at 224x224: the plain PyTorch form, the kernel, and a copy that reads and writes as
              many bytes as the kernel must
    models    inference and training steps of S, with kernels and without, beside timm's Swin-T, if timm is installed
    large     `forward_features` of one image, 224x224 to 1344x1344, beside Swin-T's

One run takes turns between the sides, so that whatever else the machine does meets all of them.  Medians in milliseconds.
"""
import argparse
import ctypes
import math
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


def kernels(args):
    if args.device not in KERNELS:
        sys.exit(f"scalablevit_kernels is not built for {args.device} (kernels: {', '.join(KERNELS) or 'none'})")
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


def swin_t():
    """timm's Swin-T, or None."""
    try:
        try:
            import timm
        except RuntimeError:                                       # a torchvision that was built for another PyTorch:
            library = torch.library.Library("torchvision", "FRAGMENT")     # it misses two operators that are not used
            for name in "nms", "qnms":
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            import timm
        return timm.create_model("swin_tiny_patch4_window7_224", dynamic_img_size=True)
    except ImportError as error:
        print(f"without Swin-T, since timm does not import: {error}")


def models(args):
    """Rows: what is done; columns: milliseconds, and how many times as fast as Swin-T S is."""
    peer, images = swin_t(), torch.randn(args.batch, 3, 224, 224, device=args.device)
    labels = torch.randint(0, 1000, (args.batch,), device=args.device)

    def inference(model, dtype, autocast):
        model, x = model.to(args.device, dtype).eval(), images.to(dtype)

        def call():
            with torch.inference_mode():
                model(x)
        return call

    def training(model, dtype, autocast):
        model = model.to(args.device, dtype).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def call():
            with torch.autocast(args.device, torch.bfloat16, enabled=autocast):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return call

    print(f"{'batch ' + str(args.batch) + ', 224x224':34}{'S':>9}{'plain':>9}{'Swin-T':>9}{'S / Swin-T':>12}{'S / plain':>11}")
    for name, make, dtype, autocast in (("inference, float32", inference, torch.float32, False),
                                        ("inference, bfloat16", inference, torch.bfloat16, False),
                                        ("training step, float32", training, torch.float32, False),
                                        ("training step, bfloat16 autocast", training, torch.float32, True)):
        own = make(scalablevit.scalablevit_s(), dtype, autocast)
        sides = [switched(KERNELS, own), switched((), own)] + [make(peer, dtype, autocast)] * (peer is not None)
        s, plain, *swin = medians(sides, args.device, 4 * args.seconds)
        print(f"{name:34}{s:9.0f}{plain:9.0f}{swin[0] if swin else math.nan:9.0f}"
              f"{swin[0] / s if swin else math.nan:12.2f}{plain / s:11.2f}", flush=True)


def large(args):
    """Rows: sizes; columns: milliseconds of `forward_features`, and how they grow with the area."""
    peer, own = swin_t(), scalablevit.scalablevit_s().to(args.device).eval()
    print(f"{'one image, float32':34}{'S':>9}{'Swin-T':>9}{'S / Swin-T':>12}{'ms per 224² of area':>21}")
    for H, W in (224, 224), (448, 448), (800, 1280), (512, 2048), (1344, 1344):
        x = torch.randn(1, 3, H, W, device=args.device)
        sides = [own.forward_features] + [peer.to(args.device).eval().forward_features] * (peer is not None)
        with torch.inference_mode():
            s, *swin = medians([lambda side=side: side(x) for side in sides], args.device, 4 * args.seconds)
        print(f"{f'{H}x{W}':34}{s:9.0f}{swin[0] if swin else math.nan:9.0f}"
              f"{swin[0] / s if swin else math.nan:12.2f}{s / (H * W / 224 ** 2):21.1f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="ScalableViT-S and its kernels beside their peers.")
    parser.add_argument("what", nargs="*", default=["kernels"], help="kernels (the default), models or large")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--seconds", type=float, default=2, help="per line")
    args = parser.parse_args()
    if unknown := {*args.what} - {"kernels", "models", "large"}:
        parser.error(f"what to measure is kernels, models or large, got {min(unknown)!r}")
    torch.set_num_threads(args.threads)
    if sys.platform == "linux":
        # Memory that is freed stays with the process: whether an allocator hands it back, so that the next call pays for
        # fresh pages, is chance, and would cost a kernel or a copy several times what it does.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):                               # glibc
            libc.mallopt(-1, 2 ** 31 - 1)                          # M_TRIM_THRESHOLD
            libc.mallopt(-3, 2 ** 31 - 1)                          # M_MMAP_THRESHOLD
    print(f"PyTorch {torch.__version__}, {args.device}, {args.threads} threads, kernels: {', '.join(KERNELS) or 'none'}")
    for what in args.what:
        {"kernels": kernels, "models": models, "large": large}[what](args)


if __name__ == "__main__":
    main()
