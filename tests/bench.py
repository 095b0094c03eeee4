"""Benchmark ScalableViT-S, as in the file and fused, against Swin-T and Twins-SVT-S (pip install timm).

    python tests/bench.py models        images of 224 x 224, with both, one or none of the two layers fused
    python tests/bench.py large         backbones with four maps, 224 x 224 to 1344 x 1344, and peak memory
    python tests/bench.py limit         S's time over that of its own linear layers and convolutions
    python tests/bench.py attention     SSA's attention, plain and PyTorch's, from 49 to 1000 keys
    python tests/bench.py kernels       each operator against plain PyTorch, at the shapes of S's four stages

The sides of a line run in turn, so that other load on the machine affects all alike.  Prints medians, and
speeds relative to the last side.
"""
import argparse
import ctypes
import itertools
import multiprocessing
import pathlib
import re
import statistics
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import scalablevit  # noqa: E402
from helpers import from_windows, to_windows  # noqa: E402
from scalablevit import IWSA, convolve, scalablevit_s  # noqa: E402
from scalablevit_kernels import FusedIWSA, FusedSSA, devices, fuse, unfuse  # noqa: E402
from scalablevit_kernels.fuse import attention as fused_attention  # noqa: E402

STAGES = [(56, 64, 2), (28, 128, 4), (14, 256, 8), (7, 512, 16)]    # H = W, C, heads at 224 x 224
LARGE = [(224, 224), (448, 448), (800, 1280), (1344, 1344)]        # the last one without steps
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---------------------------------------------------------------------------- measuring
def medians(functions, args):
    """Median time of each function in milliseconds, in rounds, after one that warms up."""
    rounds = []
    end = 0
    while len(rounds) < 2 or time.perf_counter() < end:
        rounds.append([])
        for function in functions:
            start = time.perf_counter()
            function()
            if args.device == "cuda":
                torch.cuda.synchronize()
            rounds[-1].append((time.perf_counter() - start) * 1e3)
        end = end or time.perf_counter() + args.seconds
    return [statistics.median(times) for times in zip(*rounds[1:])]


def print_sides(what, sides, args, width=26, memory=lambda name: ""):
    """Print a line: milliseconds and speed relative to the last side, for each side {name: function}."""
    times = medians(sides.values(), args)
    line = f"{what:44}"
    for name, t in zip(sides, times):
        line += f"{name} {t:.1f} ({times[-1] / t:.2f}{memory(name)})".ljust(width)
    print(line, flush=True)
    return times


def in_a_process(*network):
    """A function that calls the network, or measures the memory for it, in a process of its own."""
    context = multiprocessing.get_context("fork")
    pipe, end = context.Pipe()
    context.Process(target=serve, args=(end, *network), daemon=True).start()
    end.close()

    def ask(question="call"):
        pipe.send(question)
        return pipe.recv()                                          # EOFError if the process failed
    return ask


def serve(pipe, build, what, shape, args):
    call, = calls({"": build}, what, shape, args).values()
    while True:
        answer = peak(call, args) if pipe.recv() == "peak" else call()
        pipe.send(answer)


def peak(call, args):
    """Peak memory in MB of a call over what was held before it; on a GPU, all that is held."""
    ctypes.CDLL(None).mallopt(-3, 2 ** 16)      # M_MMAP_THRESHOLD: freed tensors go back at once
    call()                                      # libraries are loaded, and keep workspaces
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")           # resets VmHWM
    call()
    return resident("VmHWM") - before


def resident(which):
    """VmRSS, what the process holds, or VmHWM, the most it has held, in MB (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+)", status)[1]) / 1024


def forward(function):
    with torch.inference_mode():
        function()


def backward(function, inputs):
    out = function()
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def print_both(what, sides, inputs, args):
    print_sides(f"{what}, inference", {name: partial(forward, f) for name, f in sides.items()}, args)
    print_sides(f"{what}, step", {name: partial(backward, f, inputs) for name, f in sides.items()}, args)


# ---------------------------------------------------------------------------- networks
def inference(model, images, dtype):
    model = model.to(images.device, dtype).eval()
    return partial(forward, partial(model, images.to(dtype, memory_format=torch.channels_last)))


def training(model, images, dtype):
    """A training step with float32 weights; bfloat16 means autocast."""
    model = model.to(images.device).train()
    x = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def call():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = model(x)                                      # four maps, or each image's logits
        sum(out.float().square().mean() for out in outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return call


KINDS = {"inference, float32": (inference, torch.float32), "inference, bfloat16": (inference, torch.bfloat16),
         "step, float32": (training, torch.float32), "step, bfloat16 autocast": (training, torch.bfloat16)}


def fused(*kinds):
    """S with the given kinds of layer fused."""
    model = fuse(scalablevit_s())
    for layer in model.modules():
        if isinstance(layer, (FusedIWSA, FusedSSA)) and not isinstance(layer, kinds):
            unfuse(layer)
    return model


def maps_of(model):
    """The four maps of a ScalableViT, and no more parameters than they need."""
    model.reset_classifier(0)
    model.norm = nn.Identity()
    model.forward = model.forward_features
    return model


def timm_model(name, size, **arguments):
    import timm
    return timm.create_model(name, img_size=size, **arguments)


SWIN, TWINS = "swin_tiny_patch4_window7_224", "twins_svt_small"
SIDES = {  # name: a function of the image size that builds the network, with a classifier
    "fused": lambda size: fused(FusedIWSA, FusedSSA),
    "IWSA only": lambda size: fused(FusedIWSA),
    "SSA only": lambda size: fused(FusedSSA),
    "file": lambda size: scalablevit_s(),
    "Swin-T": partial(timm_model, SWIN),
}
BACKBONES = {  # the same, with four maps
    "fused": lambda size: maps_of(fuse(scalablevit_s())),
    "file": lambda size: maps_of(scalablevit_s()),
    "Twins-SVT-S": partial(timm_model, TWINS, features_only=True),
    "Swin-T": partial(timm_model, SWIN, features_only=True),
}


def calls(builders, what, shape, args):
    """{name: a call of the network that its builder makes}"""
    make, dtype = KINDS[what]
    images = torch.randn(shape, device=args.device)
    return {name: make(build(shape[2:]), images, dtype) for name, build in builders.items()}


def models(args):
    for what in KINDS:
        if args.only in what:
            shape = (args.batch or 8, 3, *(args.size or (224, 224)))
            print_sides(what, calls(SIDES, what, shape, args), args)


def large(args):
    import timm  # noqa: F401, once for all processes
    for size, what in itertools.product([args.size] if args.size else LARGE, KINDS):
        if args.only in what and (size in (args.size, *LARGE[:3]) or "inference" in what):
            network = (what, (args.batch or 1, 3, *size), args)
            sides = {name: in_a_process(build, *network) for name, build in BACKBONES.items()}
            print_sides(f"{size[0]}x{size[1]} {what}", sides, args, 36,
                        lambda name: f", {in_a_process(BACKBONES[name], *network)('peak'):.0f} MB")
            for process in multiprocessing.active_children():
                process.kill()


def limit(args):
    """Time of S, and of nothing but its linear layers and convolutions, at their shapes."""
    images = torch.randn(args.batch or 8, 3, *(args.size or (224, 224)), device=args.device)
    for name, dtype in DTYPES.items():
        sides = {"fused": inference(fuse(scalablevit_s()), images, dtype),
                 "linear and conv": recorded(fuse(scalablevit_s()), images, dtype)}
        whole, own = print_sides(f"inference, {name}", sides, args)
        print(f"{'':44}fused / linear and conv: {whole / own:.2f}")


def recorded(model, images, dtype):
    """All of the model's linear layers and convolutions, on the inputs that they have in it."""
    inputs = []
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_pre_hook(lambda layer, args: inputs.append((layer, args[0].clone())))
    inference(model, images, dtype)()
    for layer, _ in inputs:
        layer._forward_pre_hooks.clear()
    return partial(forward, lambda: [layer(x) for layer, x in inputs])


# ---------------------------------------------------------------------------- operators
def attention(args):
    """SSA's attention in S's stages 1 and 3, C/heads = 32 and C'/heads = 40, for the limits in fuse.py."""
    for heads, keys, name in itertools.product((2, 8), (49, 128, 196, 400, 512, 1000), DTYPES):
        queries = keys * (64 if heads == 2 else 4)                  # N = N_rn / r_n
        q, k, v = (torch.randn(1, heads, n, d, device=args.device, dtype=DTYPES[name], requires_grad=True)
                   for n, d in ((queries, 40), (keys, 40), (keys, 32)))
        sides = {"fuse.py's": partial(fused_attention, q, k, v, 0.16),
                 "PyTorch's": partial(pytorch_attention, q, k, v),
                 "plain": partial(scalablevit.attention, q, k, v, 0.16)}
        print_both(f"{heads} heads, {keys} keys, {name}", sides, (q, k, v), args)


def pytorch_attention(q, k, v):
    """With V padded to the width of Q and K, as in fuse.py."""
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), scale=0.16)[..., :32]


def kernels(args):
    ops = torch.ops.scalablevit
    for (size, C, heads), name in itertools.product(STAGES, DTYPES):
        layer = IWSA(C, heads).to(args.device, DTYPES[name])
        layer.qkv = layer.proj = nn.Identity()                      # only what is between them
        lim = (layer.lim.weight, layer.lim.bias)
        qkv = torch.randn(args.batch or 8, size, size, 3 * C, device=args.device, dtype=DTYPES[name])
        z = F.scaled_dot_product_attention(*ops.window_partition(qkv, heads, 7))
        qkv.requires_grad_()

        def merge():
            return from_windows(z, size, size, 7) + convolve(layer.lim, qkv.chunk(3, -1)[2])

        both = {"partition": (lambda: ops.window_partition(qkv, heads, 7),
                              lambda: to_windows(qkv, heads, 7).contiguous()),
                "merge + LIM": (lambda: ops.window_merge_lim(z, qkv, *lim, 7), merge)}
        if args.device == "cpu":
            both["IWSA"] = (lambda: ops.iwsa(qkv, *lim, heads, 7), lambda: layer(qkv))
        for operator, (kernel, form) in both.items():
            print_both(f"{size}x{size} {name} {operator}", {"kernel": kernel, "plain": form}, qkv, args)


def main():
    commands = {"models": models, "large": large, "limit": limit, "attention": attention, "kernels": kernels}
    parser = argparse.ArgumentParser(description="Benchmarks ScalableViT-S as in the file and fused.")
    parser.add_argument("what", choices=commands)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, help="images (8; large: 1)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of images, multiples of 32")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="per line (default: %(default)s)")
    parser.add_argument("--only", default="", help="models, large: such as step, or inference, float32")
    args = parser.parse_args()
    args.size = tuple(args.size) if args.size else None
    torch.set_num_threads(args.threads)
    print(f"PyTorch {torch.__version__}, {args.device}, {args.threads} threads, kernels for "
          f"{', '.join(devices)}: milliseconds (times as fast as the last, peak memory)", flush=True)
    commands[args.what](args)


if __name__ == "__main__":
    main()
