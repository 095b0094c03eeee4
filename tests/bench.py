"""Benchmark ScalableViT-S with and without the kernels against timm's Swin-T (`pip install timm`).

    python tests/bench.py models [--compile]      inference and training steps, and only the linear layers and convs
    python tests/bench.py large                   features of one image, 224x224 to 1344x1344, with peak memory
    python tests/bench.py kernels                 each operator against plain PyTorch, at the shapes of S's four stages

All take --device cuda, --batch 8, --threads 2 and --seconds 5 (per line).  The candidates of a line run alternately, so
that other load on the machine affects all of them alike.  Prints medians, and speeds relative to the last candidate.
"""
import argparse
import multiprocessing
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import scalablevit  # noqa: E402
from scalablevit_kernels import FusedIWSA, devices, fuse  # noqa: E402

STAGES = [(56, 64, 2), (28, 128, 4), (14, 256, 8), (7, 512, 16)]    # H = W, C, heads at 224x224


def medians(functions, args):
    """Median time of each function in milliseconds; the functions run alternately."""
    times, end = [[] for _ in functions], None
    while end is None or time.perf_counter() < end or len(times[0]) < 5:
        for function, own in zip(functions, times):
            start = time.perf_counter()
            function()
            if args.device == "cuda":
                torch.cuda.synchronize()
            own.append((time.perf_counter() - start) * 1e3)
        if end is None:                                            # the first round warms up
            times, end = [[] for _ in functions], time.perf_counter() + args.seconds
    return [statistics.median(own) for own in times]


def print_sides(what, names, functions, args, more=""):
    """Print one line: milliseconds and, in parentheses, speed relative to the last side."""
    times = medians(functions, args)
    sides = "".join(f"{name} {t:.1f} ({times[-1] / t:.2f})".ljust(28) for name, t in zip(names, times))
    print(f"{what:36}{sides}{more}", flush=True)
    return times


def swin(**kwargs):
    import timm
    return timm.create_model("swin_tiny_patch4_window7_224", **kwargs)


def inference(model, images, dtype):
    model, x = model.to(images.device, dtype).eval(), images.to(dtype, memory_format=torch.channels_last)

    def call():
        with torch.inference_mode():
            model(x)
    return call


def training(model, images, dtype):
    """A training step with float32 weights; bfloat16 means autocast."""
    model, images = model.to(images.device).train(), images.to(memory_format=torch.channels_last)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def call():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return call


def limit(images, dtype):
    """Only S's linear layers and convolutions, at their shapes: a lower bound for the time of inference."""
    model, calls = scalablevit.scalablevit_s().to(images.device, dtype).eval(), []
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_pre_hook(lambda layer, args: calls.append((layer, args[0].clone())))
    with torch.inference_mode():
        model(images.to(dtype, memory_format=torch.channels_last))
    for layer in model.modules():
        layer._forward_pre_hooks.clear()
    fuse(model)

    def call():
        with torch.inference_mode():
            for layer, x in calls:
                layer(x)
    return call


def models(args):
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    rows = [("inference", inference, torch.float32), ("inference", inference, torch.bfloat16),
            ("training step", training, torch.float32), ("training step, autocast", training, torch.bfloat16)]
    for what, make, dtype in rows:
        sides = {"fused": make(fuse(scalablevit.scalablevit_s()), images, dtype),
                 "not fused": make(scalablevit.scalablevit_s(), images, dtype), "Swin-T": make(swin(), images, dtype)}
        if make is inference:
            sides = {"limit": limit(images, dtype)} | sides
        times = print_sides(f"{what}, {str(dtype)[6:]}", sides, sides.values(), args)
        if make is inference:
            print(f"{'':36}fused / limit {times[1] / times[0]:.2f}")
    if args.compile:
        for freezing in False, True:
            with torch._inductor.config.patch(freezing=freezing):
                for dtype in torch.float32, torch.bfloat16:
                    sides = {name: inference(torch.compile(build()), images, dtype)
                             for name, build in (("not fused", scalablevit.scalablevit_s), ("Swin-T", swin))}
                    print_sides(f"compiled{', frozen' * freezing}, {str(dtype)[6:]}", sides, sides.values(), args)
                    torch._dynamo.reset()


def features(model, images):
    model = model.to(images.device).eval()

    def call():
        with torch.inference_mode():
            model.forward_features(images)
    return call


BUILD = {"fused": lambda: fuse(scalablevit.scalablevit_s()), "not fused": scalablevit.scalablevit_s,
         "Swin-T": lambda: swin(dynamic_img_size=True)}


def peak(name, shape, args):
    """Peak memory growth in MB over two calls, in a fresh process (Linux), or peak GPU memory."""
    def resident(which):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith(which))

    torch.set_num_threads(args.threads)
    model, images = BUILD[name](), torch.randn(shape, device=args.device)
    before = resident("VmRSS")
    call = features(model, images)
    call(), call()
    return resident("VmHWM") - before if args.device == "cpu" else torch.cuda.max_memory_allocated() / 2 ** 20


def large(args):
    for size in (224, 224), (448, 448), (512, 2048), (800, 1280), (1344, 1344):
        images = torch.randn(1, 3, *size, device=args.device)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = [pool.apply(peak, (name, images.shape, args)) for name in BUILD]
        print_sides(f"{size[0]}x{size[1]}", BUILD, [features(build(), images) for build in BUILD.values()], args,
                    f"peak MB {', '.join(f'{m:.0f}' for m in memory)}")


def kernels(args):
    for size, C, heads in STAGES:
        for dtype in torch.float32, torch.bfloat16:
            plain = scalablevit.IWSA(C, heads).to(args.device, dtype)
            plain.qkv = plain.proj = nn.Identity()                  # only what is between the two linear layers
            fused = scalablevit.IWSA(C, heads).to(args.device, dtype)
            fused.load_state_dict(plain.state_dict(), strict=False)
            fused.qkv, fused.proj, fused.__class__ = plain.qkv, plain.proj, FusedIWSA
            qkv = torch.randn(args.batch, size, size, 3 * C, device=args.device).to(dtype).requires_grad_()
            lim, ops = (fused.lim.weight, fused.lim.bias), torch.ops.scalablevit
            with torch.no_grad():                                   # in the layout of attention's output
                z = F.scaled_dot_product_attention(*ops.window_partition(qkv, heads, 7))

            def merge():
                v = qkv.chunk(3, dim=-1)[2]
                return scalablevit.window_merge(z, size, size, 7) + scalablevit.convolve(plain.lim, v)

            for name, kernel, form in (
                    ("partition", lambda: ops.window_partition(qkv, heads, 7),
                     lambda: scalablevit.window_partition(qkv, heads, 7).contiguous()),
                    ("merge + LIM", lambda: ops.window_merge_lim(z, qkv, *lim, 7), merge),
                    ("IWSA", lambda: fused(qkv), lambda: plain(qkv))):
                grad = torch.randn_like(kernel())

                def forward(function):
                    with torch.no_grad():
                        function()

                for what, run in (("forward", forward),
                                  ("both", lambda function: torch.autograd.grad(function(), qkv, grad))):
                    print_sides(f"{size}x{size} {str(dtype)[6:]} {name}, {what}", ["kernel", "plain"],
                                [lambda: run(kernel), lambda: run(form)], args)


def main():
    parser = argparse.ArgumentParser(description="Benchmarks ScalableViT-S with and without kernels.")
    parser.add_argument("what", choices=("models", "large", "kernels"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=5, help="per line")
    parser.add_argument("--compile", action="store_true", help="models: also with torch.compile, without kernels")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"PyTorch {torch.__version__}, {args.device}, {args.threads} threads, kernels for {', '.join(devices)}, "
          f"batch {args.batch}: milliseconds (times as fast as the last)")
    {"models": models, "large": large, "kernels": kernels}[args.what](args)


if __name__ == "__main__":
    main()
