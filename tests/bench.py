"""How fast ScalableViT-S and its kernels are, and how much memory they take, beside their peers.

    python tests/bench.py [kernels] [models] [large] [--device cuda] [--batch 8] [--threads 2] [--seconds 2] [--compile]

    kernels   the four stage shapes at 224x224: the plain PyTorch form, the kernel, and a copy that reads and writes as
              many bytes as the kernel must
    models    inference and training steps of S, with kernels and without, beside timm's Swin-T, if timm is installed
    large     `forward_features` of one image, 224x224 to 1344x1344, beside Swin-T's

One run takes turns between the sides, so that whatever else the machine does meets all of them.  Medians in milliseconds.
Memory is what a process that does nothing else grows by until its peak, weights and all.
"""
import argparse
import ctypes
import math
import multiprocessing
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


def stage_calls(size, C, heads, args, dtype):
    """(name, function, its inputs, numbers per token that a forward and a backward pass must read and write, over 2C).

    A copy of n numbers reads n and writes n.  Per token and in units of C: the partition moves 3 + 3; merge reads Z and V
    and writes 1, backward it reads the gradient and V and writes dZ and the three thirds of dQKV; IWSA in one pass reads 3
    and writes 1, backward 3 + 1 and 3; SSA reads Q and writes 1, backward the gradient and Q, and dQ.
    """
    iwsa = scalablevit.IWSA(C, heads, M).to(args.device, dtype)
    rc = 1.25 if size > 7 else 1
    ssa = scalablevit.SSA(C, heads, rc, 49 / size ** 2).to(args.device, dtype)

    def tensor(*shape):
        return torch.randn(*shape, device=args.device).to(dtype).requires_grad_()

    qkv, lim = tensor(args.batch, size, size, 3 * C), [iwsa.lim.weight, iwsa.lim.bias]
    with torch.no_grad():                                          # laid out as attention leaves it
        windows = scalablevit.window_partition(qkv.detach(), heads, M)
        z = torch.nn.functional.scaled_dot_product_attention(*windows).requires_grad_()
    q, k, v = (tensor(args.batch, n, c) for n, c in ((size ** 2, int(C * rc)), (49, int(C * rc)), (49, C)))
    yield "partition", lambda: scalablevit.window_partition(qkv, heads, M), [qkv], 3, 3
    yield "merge + LIM", lambda: iwsa.merge(z, None, qkv, M), [z, qkv, *lim], 1.5, 3
    yield "IWSA, both", lambda: scalablevit.WSA.attend(iwsa, qkv, size, size), [qkv, *lim], 2, 3.5
    if args.device == "cpu":
        yield "IWSA, 1 pass", lambda: iwsa.attend(qkv, size, size), [qkv, *lim], 2, 3.5
        yield "SSA", lambda: ssa.attend(q, k, v), [q, k, v], (1 + rc) / 2, (1 + 2 * rc) / 2


def kernels(args):
    if args.device not in KERNELS:
        sys.exit(f"scalablevit_kernels is not built for {args.device} (kernels: {', '.join(KERNELS) or 'none'})")
    print(f"{'':44}{'plain':>9}{'kernel':>9}{'copy':>9}{'plain/kernel':>14}{'kernel/copy':>13}")
    for size, C, heads in STAGES:
        for dtype in torch.float32, torch.bfloat16:
            for name, function, inputs, forward_units, backward_units in stage_calls(size, C, heads, args, dtype):
                grad = torch.randn_like(function())

                def forward():
                    with torch.no_grad():
                        return function()

                def both():
                    return torch.autograd.grad(function(), inputs, grad)

                graphs = {devices: switched(devices, function)() for devices in ((), KERNELS)}

                def backward():
                    return torch.autograd.grad(graphs[scalablevit.KERNELS], inputs, grad, retain_graph=True)

                for what, call, units in (("forward", forward, forward_units), ("backward", backward, backward_units),
                                          ("forward + backward", both, forward_units + backward_units)):
                    source = torch.randn(int(args.batch * size ** 2 * C * units), device=args.device).to(dtype)
                    plain, kernel, copy = medians([switched((), call), switched(KERNELS, call), source.clone],
                                                  args.device, args.seconds)
                    print(f"{size:2}x{size:<2} C {C:<3} {str(dtype)[6:]:<9}{name:<13}{what:<18}{plain:9.3f}{kernel:9.3f}"
                          f"{copy:9.3f}{plain / kernel:14.2f}{kernel / copy:13.2f}", flush=True)


def peers(device):
    """Names in timm of the models to compare with, those that timm can build here."""
    try:
        try:
            import timm
        except RuntimeError:                                       # a torchvision that was built for another PyTorch:
            library = torch.library.Library("torchvision", "FRAGMENT")     # it misses two operators that are not used
            for name in "nms", "qnms":
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            import timm                                            # noqa: F401
    except ImportError as error:
        print(f"without peers, since timm does not import: {error}")
        return {}
    return {"Swin-T": "swin_tiny_patch4_window7_224"} | ({"Twins-S": "twins_svt_small"} if device == "cuda" else {})


def build(name):
    if name == "S":
        return scalablevit.scalablevit_s()
    import timm
    return timm.create_model(name, **({"dynamic_img_size": True} if name.startswith("swin") else {}))


def inference(model, images, dtype):
    model, x = model.to(images.device, dtype).eval(), images.to(dtype, memory_format=torch.channels_last)

    def call():
        with torch.inference_mode():
            model(x)
    return call


def features(model, images, dtype):
    model, x = model.to(images.device, dtype).eval(), images.to(dtype)

    def call():
        with torch.inference_mode():
            model.forward_features(x)
    return call


def training(model, images, dtype):
    """Weights in float32 always; bfloat16 is autocast's."""
    model, images = model.to(images.device).train(), images.to(memory_format=torch.channels_last)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def call():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return call


def peak(args, name, make, shape, dtype):
    """MB that a process of its own grows by, until the peak of two calls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_here, (args, name, make, shape, dtype))


def peak_here(args, name, make, shape, dtype):
    def resident(which):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith(which))

    torch.set_num_threads(args.threads)
    peers(args.device)                                             # what an import takes is not counted
    images = torch.randn(*shape, device=args.device)
    if args.device == "cpu" and sys.platform != "linux":
        return math.nan
    before = resident("VmRSS") if args.device == "cpu" else 0
    call = make(build(name), images, dtype)
    call(), call()
    return resident("VmHWM") - before if args.device == "cpu" else torch.cuda.max_memory_allocated() / 2 ** 20


def models(args):
    """Rows: what is done; columns: milliseconds, how many times as fast as the others S is, and peak memory."""
    others = peers(args.device)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    print(f"{f'batch {args.batch}, 224x224':34}{'S':>9}{'plain':>9}{''.join(f'{name:>9}' for name in others)}"
          f"{'S / plain':>11}{''.join(f'  S / {name}' for name in others)}    peak MB: S{''.join(f', {name}' for name in others)}")
    for what, make, dtype in (("inference, float32", inference, torch.float32),
                              ("inference, bfloat16", inference, torch.bfloat16),
                              ("training step, float32", training, torch.float32),
                              ("training step, bfloat16 autocast", training, torch.bfloat16)):
        def side(name):
            model = build(name)
            return make(torch.compile(model) if args.compile else model, images, dtype)

        own = side("S")
        sides = [switched(KERNELS, own)] + [switched((), own)] * (not args.compile) + [side(name) for name in others.values()]
        s, *rest = medians(sides, args.device, 4 * args.seconds)
        plain, *rest = [math.nan, *rest] if args.compile else rest
        memory = [math.nan if args.compile else peak(args, name, make, images.shape, dtype)
                  for name in ("S", *others.values())]
        print(f"{what:34}{s:9.0f}{plain:9.0f}{''.join(f'{t:9.0f}' for t in rest)}{plain / s:11.2f}"
              f"{''.join(f'{t / s:{len(name) + 6}.2f}' for t, name in zip(rest, others))}"
              f"    {', '.join(f'{m:.0f}' for m in memory)}", flush=True)


def large(args):
    """Rows: sizes; columns: milliseconds and peak memory of one image's features, and how time grows with the area."""
    others = peers("cpu")
    print(f"{'features of one image, float32':34}{'S':>9}{'Swin-T':>9}{'S / Swin-T':>12}{'ms per 224² of area':>21}"
          f"    peak MB: S{', Swin-T' if others else ''}")
    for shape in (1, 3, 224, 224), (1, 3, 448, 448), (1, 3, 512, 2048), (1, 3, 800, 1280), (1, 3, 1344, 1344):
        images = torch.randn(*shape, device=args.device)
        sides = [features(build(name), images, torch.float32) for name in ("S", *others.values())]
        s, *swin = medians(sides, args.device, 4 * args.seconds)
        memory = [peak(args, name, features, shape, torch.float32) for name in ("S", *others.values())]
        print(f"{f'{shape[2]}x{shape[3]}':34}{s:9.0f}{swin[0] if swin else math.nan:9.0f}"
              f"{swin[0] / s if swin else math.nan:12.2f}{s / (shape[2] * shape[3] / 224 ** 2):21.1f}"
              f"    {', '.join(f'{m:.0f}' for m in memory)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="ScalableViT-S and its kernels beside their peers.")
    parser.add_argument("what", nargs="*", default=["kernels"], help="kernels (the default), models or large")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--compile", action="store_true", help="the models through torch.compile")
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
