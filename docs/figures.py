"""The pictures in this folder that are plots.  Needs matplotlib: pip install '.[figures]'

    python docs/figures.py                          all that need no data: field, ramp, cost
    python docs/figures.py field                    the receptive field of a token
    python docs/figures.py ramp                     WSA, LEM and IWSA on a ramp
    python docs/figures.py cost                     cost against resolution
    python docs/figures.py maps --data DIR          feature maps (Figure 1); trains on DIR/train/CLASS/*.jpg
    python docs/figures.py attention --data DIR     attention of one token over a photograph, likewise
    python docs/figures.py attention --weights FILE                     of a network of your own
    python docs/figures.py curves --log runs/tiny/log.jsonl             a run of train_minimal.py

Each picture is a function that returns a figure; in a notebook: import figures; figures.field().
--weights takes what scalablevit.load_model does: checkpoints of train_minimal.py, published models.
"""
import argparse
import contextlib
import io
import json
import pathlib
import sys
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.transforms import v2

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]                         # this repository's files
import ablation  # noqa: E402
import scalablevit  # noqa: E402
from drawing import COLORS, NAMES, TEXT  # noqa: E402
from scalablevit import (  # noqa: E402
    ATTENTION, IWSA, LEM, SSA, SWSA, WSA, Block, PatchEmbed, ScalableViT, init_weights, load_model,
    merge_heads, scalablevit_s, scalablevit_tiny, window_merge)
from steps import set_to_means  # noqa: E402

PHOTOS = sorted((DOCS / "photos").glob("*.jpg"))
TO_TENSOR = [
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
]
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2,
    "lines.markersize": 4,
    "svg.hashsalt": "scalablevit",                                   # the same file each time
    "figure.constrained_layout.use": True,
}
plt.rcParams.update(STYLE)


# ---------------------------------------------------------------------------- networks to draw
NETWORKS = {                        # the rows of Figure 1, and the network itself
    "WSA": {"pattern": ("wsa", "wsa")},
    "SSA, r_c = 1": {"pattern": ("ssa", "ssa"), "rc": (1, 1, 1, 1)},
    "SSA": {"pattern": ("ssa", "ssa")},
    "IWSA & SSA": {},
}


def trained(name, data, size=112, steps=600, folder=pathlib.Path("runs/figures")):
    """A tiny network of NETWORKS that classifies data/train/CLASS/*.jpg, trained if not yet stored."""
    file = folder / f"{name} {data.name} {size} {steps}.pt"
    if not file.exists():
        print(f"training {name} for {file}", flush=True)
        torch.manual_seed(0)
        augment = [v2.RandomResizedCrop(size, (0.25, 1)), v2.RandomHorizontalFlip()]
        images = datasets.ImageFolder(data / "train", v2.Compose(augment + TO_TENSOR))
        classes = len(images.classes)
        model = scalablevit_tiny(num_classes=classes, **NETWORKS[name])
        classify(model, images, steps)
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save({"model": model.state_dict(), "config": model.config}, part)
        part.replace(file)
    return file


def classify(model, images, steps):
    """Train on batches of 32 with AdamW; the learning rate falls to 0."""
    batch = min(32, len(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    falling = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    step = 0
    while step < steps:
        for x, y in torch.utils.data.DataLoader(images, batch, shuffle=True, drop_last=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
            step += 1
            if step == steps:
                break


def load(file, **changes):
    """The network stored in a file, without its head, and its name: "WSA", "IWSA & SSA", ..."""
    model = load_model(file, num_classes=0, **changes)
    kinds = dict.fromkeys(model.config["pattern"])
    return model, " & ".join(NAMES[kind] for kind in kinds)


def photograph(file, size, shorter=None):
    """A picture of size x size, cut from the middle after its shorter side was made `shorter`."""
    picture = Image.open(file).convert("RGB")
    return v2.Compose([v2.Resize(shorter or size), v2.CenterCrop(size)])(picture)


def to_batch(pictures):
    """Pictures as one normalized batch (B, 3, size, size)."""
    convert = v2.Compose(TO_TENSOR)
    return torch.stack([convert(picture) for picture in pictures])


# ---------------------------------------------------------------------------- feature maps
@torch.no_grad()
def block_outputs(model, images):
    """Outputs of all blocks for images (B, 3, H, W), in order: a list of (B, H_i, W_i, C_i)."""
    after = []
    hooks = []
    for stage in model.stages:
        for block in stage.blocks:
            hook = block.register_forward_hook(lambda block, _, x: after.append(x))
            hooks.append(hook)
    model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return after


def maps(networks, photos=PHOTOS, size=112, block=2):
    """Figure 1: the mean absolute feature after a block.  A row for each of {name: file}."""
    pictures = [photograph(file, size) for file in photos]
    rows, columns = 1 + len(networks), len(pictures)
    figure, axes = plt.subplots(rows, columns, figsize=(2.4 * columns, 2.5 * rows), squeeze=False)
    for axis, picture in zip(axes[0], pictures):
        axis.imshow(picture)
    axes[0, 0].set_ylabel("photograph")
    for row, (name, file) in zip(axes[1:], networks.items()):
        model, _ = load(file)
        tokens = block_outputs(model, to_batch(pictures))[block - 1]            # (B, H, W, C)
        for axis, features in zip(row, tokens):
            axis.imshow(features.abs().mean(-1).numpy(), cmap="cividis")
        row[0].set_ylabel(name.replace("r_c", "$r_c$"))
    return without_ticks(figure)


# ---------------------------------------------------------------------------- receptive fields
def shades(kind):
    """White to the color of a kind of attention."""
    return LinearSegmentedColormap.from_list(kind, ["white", COLORS[kind]])


def untrained(kind, blocks, dim):
    """A stack of untrained blocks, without PEG; for SWSA shifted and unshifted ones alternate."""
    modules = []
    for i in range(blocks):
        if kind == "ssa":
            attn = SSA(dim, heads=2, rc=1.25, rn=1 / 16)
        elif kind == "swsa" and i % 2 == 1:
            attn = WSA(dim, heads=2)
        else:
            attn = ATTENTION[kind](dim, heads=2)
        modules.append(Block(attn, dim, mlp_ratio=4, drop_path_rate=0))
    return torch.nn.Sequential(*modules).apply(init_weights).double()


def influences(kind, blocks, side, row, column, dim=16):
    """Norm of d(one output token)/d(input tokens) for untrained blocks: (side, side)."""
    torch.manual_seed(0)
    net = untrained(kind, blocks, dim)
    x = torch.randn(1, side, side, dim, dtype=torch.float64, requires_grad=True)
    net(x)[0, row, column].square().sum().backward()
    return x.grad[0].norm(dim=-1)


def field(side=28, row=14, column=17, depths=(1, 2, 4)):
    """What one token depends on after some blocks, a row for each depth; below each map, how much."""
    figure, axes = plt.subplots(len(depths), len(NAMES), figsize=(13, 3 * len(depths)), squeeze=False)
    for (kind, name), line in zip(NAMES.items(), axes.T):
        for axis, blocks in zip(line, depths):
            size = influences(kind, blocks, side, row, column)
            seen = size > 0
            strength = torch.where(seen, size / size.max(), torch.nan).log10()
            axis.imshow(strength.clamp(min=-7).numpy(), cmap=shades(kind), vmin=-8.5, vmax=0)
            borders(axis, side, 7)
            outline(axis, row, column)
            share = 100 * seen.double().mean().item()
            axis.set_xlabel(f"{share:.0f} % of the map", size=18)
        line[0].set_title(name, size=20, weight="bold", color=TEXT[kind])
    without_ticks(figure)
    for axis in figure.axes:
        axis.spines[:].set(visible=True, color="0.6", linewidth=0.6)
    for axis, blocks in zip(axes[:, 0], depths):
        axis.set_ylabel("1 block" if blocks == 1 else f"{blocks} blocks", size=18)
    return figure


def borders(axis, side, M):
    """The borders of windows on a map of side x side tokens."""
    for place in range(M, side, M):
        axis.axhline(place - 0.5, color="0.6", linewidth=0.6)
        axis.axvline(place - 0.5, color="0.6", linewidth=0.6)


def outline(axis, row, column, side=1, shift=0.5):
    """Draw around a token, without covering it or its neighbors."""
    corner = (column * side - shift, row * side - shift)
    for color, width in (("white", 3), ("black", 1.5)):
        frame = Rectangle(corner, side, side, fill=False, edgecolor=color, linewidth=width)
        axis.add_patch(frame)


# ---------------------------------------------------------------------------- windows and LIM
def window_attentions(dim, heads, window=7):
    """WSA, LEM and IWSA by kind, with the same random weights: LEM's convolution is IWSA's."""
    torch.manual_seed(0)
    modules = {
        "wsa": WSA(dim, heads, window),
        "lem": LEM(dim, heads, window),
        "iwsa": IWSA(dim, heads, window),
    }
    weights = modules["iwsa"].state_dict()
    modules["wsa"].load_state_dict(weights, strict=False)
    renamed = {name.replace("lim", "lem"): w for name, w in weights.items()}
    modules["lem"].load_state_dict(renamed)
    return modules


@torch.no_grad()
def on_a_ramp(side=21):
    """The middle row of WSA's, LEM's and IWSA's output for a ramp, with weights set to means.

    LEM and IWSA add two means, attention's and the convolution's; half of that is returned, so
    that all three are means of the input.
    """
    ramp = torch.linspace(1, 2, side)
    x = ramp.expand(1, side, side)[..., None]                       # (1, side, side, 1)
    rows = {}
    for kind, module in window_attentions(1, heads=1).items():
        set_to_means(module)
        row = module(x)[0, side // 2, :, 0]
        rows[kind] = row if kind == "wsa" else row / 2
    return ramp, rows


def ramp():
    """WSA turns a ramp into stairs; LEM dips at every border; IWSA keeps the slope across borders."""
    x, rows = on_a_ramp()
    figure, axis = plt.subplots(figsize=(9, 4.5))
    axis.plot(x, color="0.6", linewidth=6, alpha=0.5)
    axis.text(2.4, 1.02, "input", color="0.4")
    for kind, row in rows.items():
        axis.plot(row, "o-", color=COLORS[kind])
    ends = {"wsa": (20.3, 1.84), "lem": (12.6, 1.22), "iwsa": (20.3, 1.57)}
    for kind, place in ends.items():
        axis.text(*place, NAMES[kind], color=TEXT[kind], weight="bold")
    axis.set_xticks(range(0, 21, 2))
    for border in (6.5, 13.5):
        axis.axvline(border, color="0.6", linewidth=1)
    axis.set(xlabel="column of the map (lines: borders of windows)", ylabel="mean")
    return figure


# ---------------------------------------------------------------------------- attention maps
def shift(attn, H, W):
    """Rows and columns of padding above and left of the map: 0, unless windows are shifted."""
    if not isinstance(attn, SWSA):
        return 0, 0
    M = attn.window
    padding = M - M // 2
    top = padding % M if H > M else 0
    left = padding % M if W > M else 0
    return top, left


@torch.no_grad()
def attention_maps(model, image):
    """The attention weights of every layer for one image (3, H, W), by the layer's name.

    Each is (heads, H_i, W_i, h, w): how much token (row, column) attends to each of h x w keys,
    with a sum of 1.  For SSA the keys are the cells of the map, for WSA, SWSA, LEM and IWSA the
    tokens of the token's window (0 where a window reaches beyond the map).
    """
    real = scalablevit.attention
    layers = {}
    running = []                                                    # the layer that calls attention
    seen = {}

    def recording(q, k, v, *args, **kwargs):
        keys = k.shape[-2]
        identity = torch.eye(keys, dtype=k.dtype, device=k.device)
        identity = identity.expand(*k.shape[:-1], keys)
        name, size = running[-1]
        weights = real(q, k, identity, *args, **kwargs)             # V = 1: the weights themselves
        seen[name] = unfolded(layers[name], weights, *size)
        return real(q, k, v, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(scalablevit, "attention", recording))
        for name, module in model.named_modules():
            if isinstance(module, (WSA, SSA)):
                layers[name] = module
                hook = module.register_forward_pre_hook(
                    lambda module, args, name=name: running.append((name, args[0].shape[1:3])))
                stack.callback(hook.remove)
        model.forward_features(image[None])
    return seen


def unfolded(attn, weights, H, W):
    """Attention weights of one image as the layer computes them -> (heads, H, W, h, w)."""
    if isinstance(attn, SSA):                                       # (1, heads, N, N_rn)
        keys = (-(-H // attn.s), -(-W // attn.s))
        return weights[0].unflatten(2, keys).unflatten(1, (H, W))
    M = round(weights.shape[-1] ** 0.5)                             # (windows, heads, M², M²)
    top, left = shift(attn, H, W)
    queries = merge_heads(weights)                                  # (windows, M², heads·M²)
    merged = window_merge(queries, H + top, W + left, M)[0, top:, left:]
    return merged.unflatten(2, (attn.heads, M, M)).permute(2, 0, 1, 3, 4)


def seen_by(attn, weights, row, column):
    """How much one token attends to the key of each token of the map, mean over the heads: (H, W).

    weights: those of attention_maps for the layer `attn`.  In SSA all tokens of a cell have the
    cell's key, in windows each has its own.
    """
    H, W, h, w = weights.shape[1:]
    own = weights[:, row, column].mean(0)                           # (h, w)
    if isinstance(attn, SSA):
        return own.repeat_interleave(attn.s, 0).repeat_interleave(attn.s, 1)[:H, :W]
    top, left = shift(attn, H, W)
    first_row = (row + top) // h * h
    first_column = (column + left) // w * w
    canvas = torch.zeros(H + top + h, W + left + w).to(own)
    canvas[first_row:first_row + h, first_column:first_column + w] = own
    return canvas[top:top + H, left:left + W]


def first_stage(kind, rn=1, rc=1.0):
    """The first stage of ScalableViT-S with one block, without weights (on the meta device)."""
    with torch.device("meta"):
        return ScalableViT(num_classes=0, depths=(1,), heads=(2,), rc=(rc,), rn=(rn,),
                           pattern=(kind, kind))


@torch.no_grad()
def ssa_matrices(model, images, stage):
    """Q', K' and V' of the first SSA block of a stage: (B, N or N_rn, channels) each."""
    attn = model.stages[stage].blocks[1].attn
    seen = {}
    hooks = []
    for name in "qkv":
        hook = getattr(attn, name).register_forward_hook(
            lambda layer, x, y, name=name: seen.update({name: y.flatten(1, -2)}))
        hooks.append(hook)
    model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in "qkv"]


LAYERS = ("stages.2.blocks.0.attn", "stages.2.blocks.1.attn")
PLACES = {"cat": (0.38, 0.2), "astronaut": (0.2, 0.43)}              # (y, x): an eye, a face


def attention(file, photos=PHOTOS, size=224, layers=LAYERS):
    """What one token of PLACES attends to, drawn over its photograph; a column for each layer."""
    model, _ = load(file)
    figure, axes = plt.subplots(len(PLACES), 1 + len(layers), figsize=(10.5, 7), squeeze=False)
    chosen = [photo for photo in photos if photo.stem in PLACES]
    for line, photo in zip(axes, chosen):
        y, x = PLACES[photo.stem]
        picture = photograph(photo, size)
        gray = np.asarray(picture.convert("L"))
        maps = attention_maps(model, to_batch([picture])[0])
        line[0].imshow(picture, extent=(0, 1, 1, 0))
        for axis, name in zip(line[1:], layers):
            attn = model.get_submodule(name)
            H, W = maps[name].shape[1:3]
            row, column = int(y * H), int(x * W)
            share = seen_by(attn, maps[name], row, column)
            kind = "ssa" if isinstance(attn, SSA) else "iwsa"
            over(axis, gray, share, COLORS[kind])
            outline(axis, row, column, 1 / H, 0)
            axis.set_title(NAMES[kind], color=TEXT[kind], weight="bold")
        outline(line[0], row, column, 1 / H, 0)
    return without_ticks(figure)


def over(axis, gray, share, color):
    """A gray photograph, colored where a token attends to; strongest where it attends most."""
    axis.imshow(gray, extent=(0, 1, 1, 0), cmap="gray", vmin=-150, vmax=300)
    strength = (share / share.max()).numpy()
    paint = np.zeros((*strength.shape, 4))
    paint[..., :3] = matplotlib.colors.to_rgb(color)
    paint[..., 3] = 0.85 * strength
    axis.imshow(paint, extent=(0, 1, 1, 0), interpolation="nearest")


# ---------------------------------------------------------------------------- the task of part 4
def learn_boards(updates=400, seed=0, **arguments):
    """Train two blocks on ablation.py's global task: -> percent right on each batch (updates,)."""
    torch.manual_seed(seed)
    config = {**ablation.NET, "in_chans": 36, "peg": False, **arguments}
    model = ScalableViT(**config)
    model.stages[0].embed = PatchEmbed(36, 32, kernel_size=1, stride=1)         # mixes no tokens
    head = torch.nn.Conv2d(32, ablation.HUES, 1)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, fused=True)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 50, total_iters=50)
    generator = torch.Generator().manual_seed(seed)
    right = []
    for _ in range(updates):
        boards, hues = ablation.draw_global(32, generator)          # (32, 36, 8, 8), (32, 1, 8, 8)
        hues = hues.squeeze(1)
        logits = head(model.forward_features(boards)[0])            # (32, hues, 8, 8)
        loss = F.cross_entropy(logits, hues, ignore_index=-1)       # -1: an item, which asks nothing
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        rising.step()
        asked = hues >= 0
        correct = logits.argmax(1) == hues
        right.append(100 * correct[asked].float().mean())
    return torch.stack(right)


def boards(seed=0, updates=400):
    """Learning curves: windows with LIM only, SSA with one item in a cell, SSA with four."""
    networks = {
        "IWSA & SSA, one item in a cell": ("ssa", "-", {"rn": (1 / 4,)}),
        "IWSA & SSA, four items in a cell": ("ssa", ":", {"rn": (1 / 16,)}),
        "IWSA only": ("iwsa", "-", {"pattern": ("iwsa", "iwsa")}),
    }
    figure, axis = plt.subplots(figsize=(9, 4.5))
    for name, (kind, style, arguments) in networks.items():
        right = learn_boards(updates, seed, **arguments)
        smooth = right.view(-1, min(25, updates)).mean(1)
        at = torch.arange(1, len(smooth) + 1) * updates / len(smooth)
        axis.plot(at, smooth, style, color=COLORS[kind])
        label = f"{name}: {smooth[-1]:.0f} %"
        axis.annotate(label, (updates, smooth[-1]), (6, 0), color=TEXT[kind], va="center",
                      textcoords="offset points")
    axis.axhline(25, color="0.6", linewidth=1)
    axis.annotate("guessing", (updates, 25), (6, -3), color="0.4", va="center",
                  textcoords="offset points")
    axis.set(xlabel="updates", ylabel="correct, %", xlim=(0, updates), ylim=(0, 103))
    return figure


# ---------------------------------------------------------------------------- cost
def attention_cost(sides=(112, 224, 448, 896, 1792)):
    """MACs of the two products of attention in one block: global, in windows, SSA."""
    kinds = {
        "global": ("black", "black", first_stage("ssa")),
        "SSA, $r_n$ = 1/64": (COLORS["ssa"], TEXT["ssa"], first_stage("ssa", 1 / 64)),
        "windows": (COLORS["wsa"], TEXT["wsa"], first_stage("wsa")),
    }
    figure, axis = plt.subplots(figsize=(9, 4.5))
    for name, (color, text, model) in kinds.items():
        macs = []
        for side in sides:
            count = scalablevit.count_macs(model, (side, side))["attention"]
            macs.append(count / 1e9)
        axis.loglog(sides, macs, "o-", color=color)
        axis.annotate(f"{name}: {macs[-1]:,.1f} G", (sides[-1], macs[-1]), (8, 0), color=text,
                      va="center", textcoords="offset points")
    pixels(axis, sides)
    axis.set_ylabel("G multiply-accumulates")
    return figure


def pixels(axis, sides):
    axis.set_xlabel("side of the image, pixels")
    axis.set_xticks(sides, [str(side) for side in sides])
    axis.minorticks_off()


def macs_by_part(model, side):
    """GMACs for one image: convolutions and linear layers; Q K^T and A V of windows; of SSA.

    The model must be on the meta device (shapes without memory).
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    flops = counter.get_flop_counts()                               # two per multiply-accumulate
    layers = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)
    windows = 0
    ssa = 0
    for name, module in model.named_modules():
        if isinstance(module, (WSA, SSA)):
            counts = flops[f"ScalableViT.{name}"]
            products = sum(n for operation, n in counts.items() if operation not in layers)
            if isinstance(module, SSA):
                ssa += products
            else:
                windows += products
    rest = counter.get_total_flops() - windows - ssa
    return [rest / 2e9, windows / 2e9, ssa / 2e9]


def cost(sides=(224, 336, 448, 672, 896, 1344)):
    """MACs of ScalableViT-S for one image, by part."""
    with torch.device("meta"):
        model = scalablevit_s(num_classes=0)
    by_side = [macs_by_part(model, side) for side in sides]
    figure, axis = plt.subplots(figsize=(9, 5))
    labels = [
        ("convolutions and linear layers", "black", "black", (-16, 8), "right"),
        ("attention of IWSA", COLORS["iwsa"], TEXT["iwsa"], (6, -20), "left"),
        ("attention of SSA", COLORS["ssa"], TEXT["ssa"], (14, -6), "left"),
    ]
    for part, (name, color, text, offset, align) in enumerate(labels):
        values = [macs[part] for macs in by_side]
        axis.loglog(sides, values, "o-", color=color)
        times = values[-1] / values[0]
        axis.annotate(f"{name}: × {times:.0f}", (sides[3], values[3]), offset, ha=align,
                      color=text, textcoords="offset points")
    axis.set_ylabel("G multiply-accumulates")
    pixels(axis, sides)
    return figure


# ---------------------------------------------------------------------------- training curves
def curves(log):
    """Training loss and accuracy per epoch, from train_minimal.py's log.jsonl."""
    lines = pathlib.Path(log).read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    at = [epoch["epoch"] for epoch in epochs]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    titles = {"loss": "training loss", "top1": "top-1, %"}
    for axis, (key, title) in zip(axes, titles.items()):
        axis.plot(at, [epoch[key] for epoch in epochs], "o-", color="black")
        axis.set(xlabel="epoch", title=title)
    return figure


def answers(run, each=2):
    """Images of train_minimal.py's digits, with the answers of the run's best network."""
    model = load_model(run / "best.pt")
    best = torch.load(run / "best.pt", weights_only=True)
    classes = best["classes"]
    size = best["settings"]["size"]
    pictures = []
    truth = []
    for label in classes:
        for i in range(each):
            file = run / "digits" / "val" / label / f"{10 * i + int(label):04}.png"
            pictures.append(photograph(file, size, round(size * 256 / 224)))    # as in training
            truth.append(label)
    with torch.no_grad():
        guesses = model(to_batch(pictures)).argmax(1)
    figure, axes = plt.subplots(2, len(pictures) // 2, figsize=(13, 3.4))
    for axis, picture, guess, label in zip(axes.flat, pictures, guesses, truth):
        axis.imshow(picture)
        answer = classes[guess]
        axis.set_title(answer, color="black" if answer == label else "red")
    return without_ticks(figure)


def side_by_side(pictures, titles, **options):
    """Pictures (H, W) or (H, W, 3) in a row, with the options of imshow; -> axes."""
    columns = len(titles)
    figure, axes = plt.subplots(1, columns, figsize=(13, 1 + 11 / columns))
    for axis, picture, title in zip(axes, pictures, titles):
        axis.imshow(picture, **options)
        axis.set_title(title)
    without_ticks(figure)
    return axes


def without_ticks(figure):
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


# ---------------------------------------------------------------------------- files
def save(figure, file):
    """Save as an SVG, a JPEG, or a PNG of 160 dpi with 256 colors, a third of the size."""
    if file.suffix == ".svg":
        figure.savefig(file, metadata={"Date": None})
    elif file.suffix == ".jpg":
        figure.savefig(file, dpi=160, pil_kwargs={"quality": 85})
    else:
        png = io.BytesIO()
        figure.savefig(png, dpi=160)
        few = Image.open(png).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        few.save(file, optimize=True)
    plt.close(figure)
    print(f"wrote {file}", flush=True)


def drawn(name, args):
    """The figure called `name`."""
    if name == "maps":
        rows = ["WSA", "SSA, r_c = 1", "SSA"]
        return maps({row: trained(row, args.data) for row in rows})
    if name == "attention":
        file = args.weights or trained("IWSA & SSA", args.data, size=224, steps=300)
        return attention(file)
    if name == "curves":
        return curves(args.log)
    return {"field": field, "ramp": ramp, "cost": cost}[name]()


FILES = {"field": "png", "ramp": "svg", "cost": "svg", "maps": "png", "attention": "jpg",
         "curves": "svg"}


def main():
    parser = argparse.ArgumentParser(description="Draws the pictures in docs/.")
    parser.add_argument("figures", nargs="*", help=f"{', '.join(FILES)} (default: the first three)")
    parser.add_argument("--weights", metavar="FILE", help="for attention")
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="for maps and attention")
    parser.add_argument("--log", default="runs/tiny/log.jsonl", help="for curves: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=DOCS, metavar="DIR", help="default: docs")
    args = parser.parse_args()
    for name in args.figures:
        if name not in FILES:
            parser.error(f"figures must be among {', '.join(FILES)}, got {name!r}")
        known = args.data or (name == "attention" and args.weights)
        if name in ("maps", "attention") and not known:
            parser.error(f"{name} needs --data DIR")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.figures or ["field", "ramp", "cost"]:
        save(drawn(name, args), args.out / f"{name}.{FILES[name]}")


if __name__ == "__main__":
    main()
