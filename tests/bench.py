"""Benchmark ScalableViT-S, as in the file and fused, against timm's Swin-T and Twins-SVT-S (`pip install timm`).

    python tests/bench.py models [--compile]      images of 224 x 224, with both, one or none of the two layers fused
    python tests/bench.py large [--size H W]      backbones with four maps, 224 x 224 to 1344 x 1344, and peak memory
                                                  (both take --only step, --only float32 and so on)
    python tests/bench.py limit [--size H W]      S's time over that of its own linear layers and convolutions
    python tests/bench.py attention               SSA's attention, plain and PyTorch's, from 49 to 1000 keys
    python tests/bench.py kernels                 each operator against plain PyTorch, at the shapes of S's four stages

All take --device cuda, --batch (8; large: 1), --threads 2 and --seconds 5 (per line).  The candidates of a line run in
turn, so that other load on the machine affects all alike.  Prints medians, and speeds relative to the last candidate.
"""
import argparse
import ctypes
import itertools
import math
import multiprocessing
import pathlib
import statistics
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import scalablevit  # noqa: E402
from helpers import from_windows, to_windows  # noqa: E402
from scalablevit_kernels import FusedIWSA, FusedSSA, devices, fuse  # noqa: E402

STAGES = [(56, 64, 2), (28, 128, 4), (14, 256, 8), (7, 512, 16)]    # H = W, C, heads at 224x224
LARGE = [(224, 224), (448, 448), (800, 1280), (1344, 1344)]
STEPS_UP_TO = 800 * 1280                                            # larger images: only inference


# ------------------------------------------------------------------------------------------------ measuring
def medians(functions, args):
    """Median time of each function in milliseconds; the functions run in turn, at least three times."""
    times = [[] for _ in functions]
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for function, own in zip(functions, times):
            start = time.perf_counter()
            function()
            if args.device == "cuda":
                torch.cuda.synchronize()
            own.append((time.perf_counter() - start) * 1e3)
    if len(times[0]) > 3:                                           # the first round warms up
        times = [own[1:] for own in times]
    return [statistics.median(own) for own in times]


def print_sides(what, sides, args, memory=None):
    """Print one line: milliseconds, speed relative to the last side, and MB for each side {name: function}."""
    times = medians(sides.values(), args)
    line = f"{what:44}"
    for name, t in zip(sides, times):
        used = f", {memory[name]:.0f} MB" if memory else ""
        line += f"{name} {t:.1f} ({times[-1] / t:.2f}{used})".ljust(36 if memory else 26)
    print(line, flush=True)
    return times


def resident(which):
    """VmRSS, what the process holds, or VmHWM, the most it has held, in MB (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(which))


def peak(builders, what, shape, args):
    """Peak memory in MB of one call of a network, over what was held before it; on a GPU, all that is held."""
    call, = calls(builders, what, shape, args).values()
    if args.device == "cuda":
        call()
        return torch.cuda.max_memory_allocated() / 2 ** 20
    ctypes.CDLL(None).mallopt(-3, 2 ** 16)      # M_MMAP_THRESHOLD: freed tensors go back to the system at once
    call()                                      # libraries are loaded, and keep workspaces
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")           # resets VmHWM
    call()
    return resident("VmHWM") - before


def in_a_process(function, *args):
    """What the function returns in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    result = receiver.recv()                                        # EOFError if the process failed
    process.join()
    return result


# ------------------------------------------------------------------------------------------------ what is measured
def inference(model, images, dtype):
    model = model.to(images.device, dtype).eval()
    x = images.to(dtype, memory_format=torch.channels_last)

    def call():
        with torch.inference_mode():
            model(x)
    return call


def training(model, images, dtype):
    """A training step with float32 weights; bfloat16 means autocast."""
    model = model.to(images.device).train()
    x = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def call():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = model(x)
        sum(out.float().square().mean() for out in outputs).backward()  # of four maps, or of each image's logits
        optimizer.step()
        optimizer.zero_grad()
    return call


KINDS = {"inference, float32": (inference, torch.float32), "inference, bfloat16": (inference, torch.bfloat16),
         "step, float32": (training, torch.float32), "step, bfloat16 autocast": (training, torch.bfloat16)}


def plain():
    return scalablevit.scalablevit_s()


def fused(kinds=(FusedIWSA, FusedSSA)):
    """S with the given kinds of layer fused."""
    model = fuse(plain())
    for layer in model.modules():
        if type(layer) in (FusedIWSA, FusedSSA) and type(layer) not in kinds:
            layer.__class__ = type(layer).__base__
    return model


def timm_model(name, **kwargs):
    import timm
    return timm.create_model(name, **kwargs)


class Backbone(nn.Module):
    """The four maps of a ScalableViT, and no more parameters than they need."""

    def __init__(self, model):
        super().__init__()
        model.reset_classifier(0)
        model.norm = nn.Identity()
        self.forward_features = model.forward_features
        self.stages = model.stages

    def forward(self, images):
        return self.forward_features(images)


SIDES = {  # name: a function of the image size that builds the network, with a classifier
    "fused": lambda size: fused(),
    "IWSA only": lambda size: fused([FusedIWSA]),
    "SSA only": lambda size: fused([FusedSSA]),
    "file": lambda size: plain(),
    "Swin-T": lambda size: timm_model("swin_tiny_patch4_window7_224", img_size=size),
}
BACKBONES = {  # the same, with four maps
    "fused": lambda size: Backbone(fused()),
    "file": lambda size: Backbone(plain()),
    "Twins-SVT-S": lambda size: timm_model("twins_svt_small", features_only=True, img_size=size),
    "Swin-T": lambda size: timm_model("swin_tiny_patch4_window7_224", features_only=True, img_size=size),
}


def calls(builders, what, shape, args):
    """{name: a call of the network that its builder makes}"""
    make, dtype = KINDS[what]
    images = torch.randn(shape, device=args.device)
    return {name: make(build(shape[2:]), images, dtype) for name, build in builders.items()}


def chosen(args):
    return [what for what in KINDS if args.only in what]


def models(args):
    shape = (args.batch or 8, 3, *(args.size or (224, 224)))
    for what in chosen(args):
        print_sides(what, calls(SIDES, what, shape, args), args)
    for dtype in (torch.float32, torch.bfloat16) if args.compile else ():
        images = torch.randn(shape, device=args.device)
        compiled = {name: inference(torch.compile(SIDES[name](shape[2:])), images, dtype)
                    for name in ("file", "Swin-T")}
        print_sides(f"compiled inference, {str(dtype)[6:]}", compiled, args)
        torch._dynamo.reset()


def large(args):
    sizes = [args.size] if args.size else LARGE
    rows = [(size, what) for size in sizes for what in chosen(args)
            if KINDS[what][0] is inference or math.prod(size) <= STEPS_UP_TO]
    memory = {}
    for size, what in rows:                                         # before this process has threads: they do not
        shape = (args.batch or 1, 3, *size)                         # survive a fork
        memory[size, what] = {name: in_a_process(peak, {name: build}, what, shape, args)
                              for name, build in BACKBONES.items()}
    for size, what in rows:
        shape = (args.batch or 1, 3, *size)
        print_sides(f"{size[0]}x{size[1]} {what}", calls(BACKBONES, what, shape, args), args, memory[size, what])


# ------------------------------------------------------------------------------------------------ what is left
def limit(args):
    """Time of S, and of nothing but its linear layers and convolutions, at their shapes."""
    shape = (args.batch or 8, 3, *(args.size or (224, 224)))
    for what in ("inference, float32", "inference, bfloat16"):
        make, dtype = KINDS[what]
        images = torch.randn(shape, device=args.device)
        layers = recorded(fused(), images, dtype)
        whole, own = print_sides(what, {"fused": make(fused(), images, dtype), "linear and conv": layers}, args)
        print(f"{'':44}fused / linear and conv: {whole / own:.2f}")


def recorded(model, images, dtype):
    """A function that calls all of the model's linear layers and convolutions on the inputs that they have in it."""
    model = model.to(images.device, dtype).eval()
    inputs = []
    hooks = [layer.register_forward_pre_hook(lambda layer, args: inputs.append((layer, args[0].clone())))
             for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    inference(model, images, dtype)()
    for hook in hooks:
        hook.remove()

    def call():
        with torch.inference_mode():
            for layer, x in inputs:
                layer(x)
    return call


def attention(args):
    """SSA's attention in S's stages 1 and 3, with C/heads = 32 and C'/heads = 40, for the limits in fuse.py."""
    every = itertools.product((2, 8), (49, 64, 100, 128, 196, 256, 512, 1000), (torch.float32, torch.bfloat16))
    for heads, keys, dtype in every:
        queries = keys * (64 if heads == 2 else 4)                  # N = N_rn / r_n
        q = torch.randn(1, heads, queries, 40, device=args.device, dtype=dtype, requires_grad=True)
        k = torch.randn(1, heads, keys, 40, device=args.device, dtype=dtype, requires_grad=True)
        v = torch.randn(1, heads, keys, 32, device=args.device, dtype=dtype, requires_grad=True)
        both = {"PyTorch's": partial(pytorch_attention, q, k, v),
                "plain": partial(scalablevit.attention, q, k, v, 0.16)}
        what = f"{heads} heads, {keys} keys, {str(dtype)[6:]}"
        print_sides(f"{what}, inference", {name: forward(f) for name, f in both.items()}, args)
        print_sides(f"{what}, step", {name: backward(f, (q, k, v)) for name, f in both.items()}, args)


def pytorch_attention(q, k, v):
    """With V padded to the width of Q and K, as in fuse.py."""
    v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    return F.scaled_dot_product_attention(q, k, v, scale=0.16)[..., :32]


def forward(function):
    def call():
        with torch.inference_mode():
            function()
    return call


def backward(function, inputs):
    grad = torch.randn_like(function())

    def call():
        torch.autograd.grad(function(), inputs, grad)
    return call


# ------------------------------------------------------------------------------------------------ operators
def kernels(args):
    for size, C, heads in STAGES:
        for dtype in (torch.float32, torch.bfloat16):
            pairs, qkv = operators(size, C, heads, dtype, args)
            for name, (kernel, form) in pairs.items():
                what = f"{size}x{size} {str(dtype)[6:]} {name}"
                both = {"kernel": kernel, "plain": form}
                print_sides(f"{what}, forward", {side: forward(f) for side, f in both.items()}, args)
                print_sides(f"{what}, both", {side: backward(f, qkv) for side, f in both.items()}, args)


def operators(size, C, heads, dtype, args):
    """{name: (an operator, its form in plain PyTorch)}, and their input qkv."""
    ops = torch.ops.scalablevit
    layer = scalablevit.IWSA(C, heads).to(args.device, dtype)
    layer.qkv = layer.proj = nn.Identity()                          # only what is between the two linear layers
    weight, bias = layer.lim.weight, layer.lim.bias
    qkv = torch.randn(args.batch or 8, size, size, 3 * C, device=args.device).to(dtype).requires_grad_()
    with torch.no_grad():                                           # in the layout of attention's output
        z = F.scaled_dot_product_attention(*ops.window_partition(qkv, heads, 7))

    def merge():
        v = qkv.chunk(3, dim=-1)[2]
        return from_windows(z, size, size, 7) + scalablevit.convolve(layer.lim, v)

    pairs = {
        "partition": (lambda: ops.window_partition(qkv, heads, 7),
                      lambda: to_windows(qkv, heads, 7).contiguous()),
        "merge + LIM": (lambda: ops.window_merge_lim(z, qkv, weight, bias, 7), merge),
    }
    if args.device == "cpu":
        pairs["IWSA"] = (lambda: ops.iwsa(qkv, weight, bias, heads, 7), lambda: layer(qkv))
    return pairs, qkv


def main():
    commands = {"models": models, "large": large, "limit": limit, "attention": attention, "kernels": kernels}
    parser = argparse.ArgumentParser(description="Benchmarks ScalableViT-S as in the file and fused.")
    parser.add_argument("what", choices=commands)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, help="images (8; large: 1)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="image size (Twins: multiples of 32)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=5, help="per line")
    parser.add_argument("--only", default="", help="models, large: such as step, or inference, float32")
    parser.add_argument("--compile", action="store_true", help="models: also with torch.compile, without kernels")
    args = parser.parse_args()
    args.size = tuple(args.size) if args.size else None
    torch.set_num_threads(args.threads)
    print(f"PyTorch {torch.__version__}, {args.device}, {args.threads} threads, kernels for {', '.join(devices)}: "
          "milliseconds (times as fast as the last, peak memory)", flush=True)
    commands[args.what](args)


if __name__ == "__main__":
    main()
