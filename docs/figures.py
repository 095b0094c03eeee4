"""The pictures in this folder.  Needs matplotlib: pip install '.[figures]'

    python docs/figures.py                          all of the following
    python docs/figures.py maps                     feature maps (Figures 1 and 7); trains the networks, in minutes
    python docs/figures.py maps --data DIR          trained on DIR/train/CLASS/*.jpg instead of synthetic shapes
    python docs/figures.py maps --image FILE --weights FILE ...         of other networks, one column per file
    python docs/figures.py field                    the receptive field of a token
    python docs/figures.py cost                     cost against resolution
    python docs/figures.py curves --log runs/tiny/log.jsonl             learning curves of a run of train_minimal.py

Each picture is a function that returns a figure; in a notebook: import figures; figures.field().
--weights takes checkpoints of train_minimal.py, published models or plain state dicts.  Arguments missing from
"config" are inferred from the parameters, which cannot distinguish SWSA from WSA; the window size is assumed to be 7.
"""
import argparse
import io
import json
import pathlib
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.transforms import v2

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))           # this repository's file, not an installed copy
import ablation  # noqa: E402
import dense  # noqa: E402
import segmentation  # noqa: E402
from scalablevit import (  # noqa: E402
    ATTENTION, IWSA, LEM, SSA, WSA, Block, PatchEmbed, ScalableViT, attention, convert_official, init_weights,
    official_kwargs, scalablevit_s, scalablevit_tiny)

DOCS = pathlib.Path(__file__).parent
TO_TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
             v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
NAMES = {"wsa": "WSA", "lem": "LEM", "iwsa": "IWSA (LIM)", "swsa": "SWSA", "ssa": "SSA"}


# ---------------------------------------------------------------------------- Figures 1 and 7
def trained(kind, data=None, steps=1200, folder=pathlib.Path("runs/figures")):
    """The file in `folder` with a tiny network of one kind of attention, which is trained if the file does not exist.

    It is trained to classify data/train/CLASS/*.jpg or, without data, to segment synthetic shapes.
    """
    file = folder / f"{kind}-{data.name if data else 'drawn'}-{steps}.pt"
    if not file.exists():
        print(f"training {NAMES[kind]} for {file}", flush=True)
        torch.manual_seed(0)
        if data:
            augment = [v2.RandomResizedCrop(112, (0.25, 1)), v2.RandomHorizontalFlip()]
            images = datasets.ImageFolder(data / "train", v2.Compose(augment + TO_TENSOR))
            network = scalablevit_tiny(num_classes=len(images.classes), pattern=(kind, kind)).to(dense.DEVICE)
            dense.train(network, lambda model, x, y: F.cross_entropy(model(x.to(dense.DEVICE)), y.to(dense.DEVICE)),
                        dense.batches(images, 32), steps, dense.polynomial(steps, 0.9), 1e-3, 0.05)
        else:
            network = scalablevit_tiny(num_classes=0, pattern=(kind, kind)).to(dense.DEVICE)
            segmentation.train(segmentation.SemanticFPN(network, 4, 64, 32).to(dense.DEVICE), steps)
        dense.save(network, file)
    return file


def load(file):
    """The network stored in a file, without its head, and its name: "WSA", "IWSA & SSA", ..."""
    with torch.serialization.safe_globals([argparse.Namespace]):     # published files may hold training arguments
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    weights, known = checkpoint.get("model", checkpoint), checkpoint.get("config", {})
    if "patch_embeds.0.proj.weight" in weights:
        weights, known = convert_official(weights), official_kwargs(weights)
    weights = {name: w for name, w in weights.items() if not name.startswith("head.")}
    stages = range(len({name.split(".")[1] for name in weights if name.startswith("stages.")}))
    depths = [len({name.split(".")[3] for name in weights if name.startswith(f"stages.{i}.blocks.")}) for i in stages]
    dim, telling = len(weights["stages.0.embed.norm.weight"]), {"iwsa": "lim", "lem": "lem", "ssa": "k"}
    layers = [{name.split(".")[5] for name in weights if name.startswith(f"stages.0.blocks.{j}.attn.")} for j in (0, 1)]
    pattern = [next((kind for kind, layer in telling.items() if layer in own), "wsa") for own in layers]
    if dim not in (24, 64, 96, 128):
        raise SystemExit(f"{file}: no scalablevit_* has {dim} channels in its first stage")
    heads = [max(dim // 32, 1) * 2 ** i for i in stages]            # true for all four sizes; parameters do not tell
    rc = [1.0] * len(depths)
    if "ssa" in pattern:
        j = pattern.index("ssa")
        rc = [len(weights[f"stages.{i}.blocks.{j}.attn.q.weight"]) / (dim * 2 ** i) for i in stages]
    model = ScalableViT(**dict(dim=dim, depths=depths, heads=heads, rc=rc, pattern=pattern,
                               peg="stages.0.peg.conv.weight" in weights) | known | dict(num_classes=0))
    model.load_state_dict(weights)
    return model.eval(), " & ".join(dict.fromkeys(kind.upper() for kind in model.config["pattern"]))


@torch.no_grad()
def block_outputs(model, images):
    """Outputs of all blocks for images (B, 3, H, W), in order: a list of (B, H_i, W_i, C_i)."""
    after = []
    hooks = [block.register_forward_hook(lambda block, _, x: after.append(x))
             for stage in model.stages for block in stage.blocks]
    model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return after


def border_step(tokens, M=7):
    """Mean distance between adjacent tokens (H, W, C) across window borders over that within windows, or nan."""
    across, inside = [], []
    for x in (tokens, tokens.transpose(0, 1)):
        steps = (x[1:] - x[:-1]).norm(dim=-1)                                           # (n - 1, other axis)
        border = torch.arange(1, len(x)) % M == 0
        across.append(steps[border].flatten())
        inside.append(steps[~border].flatten())
    return (torch.cat(across).mean() / torch.cat(inside).mean()).item()


def maps(image=DOCS / "cat.jpg", weights=None, data=None):
    """Mean absolute feature over channels after the 2nd, the 4th and the last block.

    The image with the window borders is shown on the left; below each map is its `border_step`.
    """
    picture = Image.open(image).convert("RGB")
    networks = [load(file) for file in weights or [trained(kind, data) for kind in ("wsa", "iwsa", "ssa")]]
    figure, axes = plt.subplots(3, 1 + len(networks), figsize=(2.75 * (1 + len(networks)), 8.8))
    for column, (model, name) in zip(axes.T[1:], networks):
        after = block_outputs(model, v2.Compose(TO_TENSOR)(picture)[None])
        for axis, beside, n in zip(column, axes[:, 0], (2, 4, len(after))):
            tokens, M = after[n - 1][0], model.config["window"]                         # (H, W, C)
            ratio = border_step(tokens, M)
            axis.imshow(tokens.abs().mean(-1).numpy())
            axis.set_xlabel("one window" if np.isnan(ratio) else f"step across borders × {ratio:.2f}")
            H, W = tokens.shape[:2]
            beside.imshow(picture, extent=(0, W, H, 0))
            beside.set_xlabel(f"block {n}: {H} × {W} tokens")
            grid(beside, range(M, max(H, W), M), color="white", linewidth=0.5)
        column[0].set_title(name, weight="bold")
    return without_ticks(figure)


# ---------------------------------------------------------------------------- receptive fields
def field(side=28, dim=16):
    """Norm of d(one output token)/d(input tokens) after 1, 2, 4 untrained blocks, relative to its largest value.

    Below each map: the share of tokens that is not 0, and that is above 10^-5.
    """
    figure, axes = plt.subplots(3, len(NAMES), figsize=(11, 7.6))
    for column, (kind, name) in zip(axes.T, NAMES.items()):
        for axis, n in zip(column, (1, 2, 4)):
            torch.manual_seed(0)
            kinds = ("swsa", "wsa") * 2 if kind == "swsa" else (kind,) * 4            # Swin begins with wsa
            attentions = [SSA(dim, 2, 1.25, 1 / 16) if k == "ssa" else ATTENTION[k](dim, 2) for k in kinds[:n]]
            net = torch.nn.Sequential(*(Block(attn, dim, 4, 0) for attn in attentions)).apply(init_weights).double()
            x = torch.randn(1, side, side, dim, dtype=torch.float64, requires_grad=True)
            net(x)[0, 14, 17].square().sum().backward()             # a token in the first row of its window
            size = x.grad[0].norm(dim=-1)                           # (side, side)
            shown = torch.where(size > 0, size / size.max(), torch.nan).log10().clamp(min=-7)
            axis.imshow(shown.numpy(), cmap="Blues", vmin=-9, vmax=0)
            axis.plot(17, 14, "r+", markersize=8, markeredgewidth=2)
            grid(axis, np.arange(7, side, 7) - 0.5, linewidth=0.4)
            strong = 100 * (size > 1e-5 * size.max()).double().mean()
            axis.set_xlabel(f"{100 * (size > 0).double().mean():.0f} % of the map ({strong:.0f} %)")
        column[0].set_title(name, weight="bold")
    for axis, blocks in zip(axes[:, 0], ("1 block", "2 blocks", "4 blocks")):
        axis.set_ylabel(f"after {blocks}")
    figure.suptitle("What one token (red) depends on.  White: no influence.  Darker: more, on a logarithmic scale.\n"
                    "Below: how much of the map has any influence (in brackets: above $10^{-5}$ of the largest)")
    return without_ticks(figure)


# ---------------------------------------------------------------------------- windows and LIM
def window_attentions(dim, heads):
    """WSA, LEM and IWSA by name, with the same random weights: LEM's convolution is IWSA's."""
    torch.manual_seed(0)
    modules = {kind.__name__: kind(dim, heads) for kind in (WSA, LEM, IWSA)}
    modules["WSA"].load_state_dict(modules["IWSA"].state_dict(), strict=False)
    modules["LEM"].load_state_dict({name.replace("lim", "lem"): w for name, w in modules["IWSA"].state_dict().items()})
    return modules


@torch.no_grad()
def set_to_means(module):
    """Make attention the mean of V over a window, F the mean of 3 x 3 tokens (zeros where padded), and V = X."""
    for name, parameter in module.named_parameters():
        parameter.fill_(1 / 9 if name in ("lim.weight", "lem.weight") else 0)          # Q = K = 0: equal weights
    dim = module.proj.in_features
    module.qkv.weight[2 * dim:] = module.proj.weight[:] = torch.eye(dim)


@torch.no_grad()
def influence(module, x, row, column):
    """How far each output token (norm) moves if one token of x (1, H, W, C) changes: (H, W)."""
    changed = x.clone()
    changed[0, row, column] += 1
    return (module(changed) - module(x))[0].norm(dim=-1)


def show_influence(moved, row, column):
    """Maps {title: (14, 14)} of `influence` on one logarithmic scale, with the changed token and borders of windows."""
    low, high = 1e-4, max(size.max() for size in moved.values())
    shades = [size.clamp(min=low).log10().where(size > 0, torch.nan) for size in moved.values()]
    titles = [f"{title}: {int((size[:, :7] > 0).sum())} left of the border, {int((size[:, 7:] > 0).sum())} right"
              for title, size in moved.items()]
    for axis in side_by_side(shades, titles, vmin=np.log10(low), vmax=np.log10(high)):
        axis.plot(column, row, "r+")
        grid(axis, [6.5])


def side_by_side(pictures, titles, **options):
    """Pictures (H, W) or (H, W, 3) in a row, with the options of imshow; -> axes."""
    figure, axes = plt.subplots(1, len(titles), figsize=(11, 1 + 9 / len(titles)))
    for axis, picture, title in zip(axes, pictures, titles):
        axis.imshow(picture, **options)
        axis.set_title(title, fontsize=11)
    without_ticks(figure)
    return axes


# ---------------------------------------------------------------------------- attention maps of SSA
def first_stage(kind, rn=1, rc=1.0):
    """The first stage of ScalableViT-S with a single block of one kind, without weights (on the meta device)."""
    with torch.device("meta"):
        return ScalableViT(num_classes=0, depths=(1,), heads=(2,), rc=(rc,), rn=(rn,), pattern=(kind, kind))


@torch.no_grad()
def ssa_matrices(net, images, stage):
    """Q', K' and V' of the first SSA block of a stage: (B, N or N_rn, channels) each."""
    attn, seen = net.stages[stage].blocks[1].attn, {}
    hooks = [getattr(attn, name).register_forward_hook(
        lambda layer, x, y, name=name: seen.update({name: y.flatten(1, -2)})) for name in "qkv"]
    net.forward_features(images)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in "qkv"]


def attention_matrix(net, images, stage=0):
    """Softmax(Q' K'^T / sqrt(d_k')) of (2), mean over the heads: (B, N, N_rn)."""
    q, k, _ = ssa_matrices(net, images, stage)
    attn = net.stages[stage].blocks[1].attn
    q, k = (matrix.unflatten(2, (attn.heads, -1)).transpose(1, 2) for matrix in (q, k))
    return attention(q, k, torch.eye(k.shape[2]).to(q), attn.scale).mean(1)         # V' = 1: the matrix itself


def learn_boards(rn, rc, updates=1500):
    """Train one IWSA and one SSA block on ablation.py's global task.

    -> the network, and the percentage of right answers on each batch of new boards: (updates,)
    """
    torch.manual_seed(0)
    net = ScalableViT(**ablation.NET | dict(in_chans=36, rn=(rn,), rc=(rc,)))
    net.stages[0].embed = PatchEmbed(36, 32, kernel_size=1, stride=1)           # does not mix tokens
    head, right, boards_of = torch.nn.Conv2d(32, ablation.HUES, 1), [], torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=3e-3, fused=True)
    for _ in range(updates):
        boards, hues = ablation.draw_global(32, boards_of)                      # (32, 36, 8, 8)
        hues, logits = hues.squeeze(1), head(net.forward_features(boards)[0])   # (32, 8, 8), (32, 4, 8, 8)
        optimizer.zero_grad()
        F.cross_entropy(logits, hues, ignore_index=-1).backward()               # -1: an item
        torch.nn.utils.clip_grad_norm_([*net.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        right.append(100 * (logits.argmax(1) == hues)[hues >= 0].float().mean())
    return net, torch.stack(right)


def answers(boards, bits=16):
    """(B, N, N): whether token n asks with a code that has just `bits` bits in common with item m's.

    With 16 it is the item that token n asks for, with 15 that item's twin (or one that is as close by chance).
    """
    code, question = boards[:, :16].flatten(2), boards[:, 20:].flatten(2)       # (B, 16, N) each, of -1 and 1
    return question.transpose(1, 2) @ code == 2 * bits - 16


def share_on_the_answer(net, boards):
    """How much attention, from 0 to 1, a question pays to the key of the cell with its answer; mean over questions."""
    A, answer = attention_matrix(net, boards), answers(boards)                  # (B, N, N_rn), (B, N, N)
    where = answer.float().view(-1, 1, 8, 8)                                    # a map of each question's answer
    right = F.avg_pool2d(where, net.stages[0].blocks[1].attn.s).flatten(1).view_as(A) > 0         # the answer's key
    return (A * right).sum(-1)[answer.any(-1)].mean().item()


def right_with_common_hue(boards, hues):
    """Percentage of questions that are answered right by the hue that most items of the board have."""
    common = boards[:, 16:20].sum(dim=(2, 3)).argmax(dim=1)                     # (B,)
    right = (hues == common[:, None, None, None])[hues >= 0]
    return 100 * right.float().mean().item()


def looks(networks):
    """Three boards with the hues of their items, and what networks {title: net} attend to in each one's first question.

    Red cross: the token that asks.  Circle: the item that it asks for.  Square: that item's twin.
    Numbers: percent of the attention on each cell, which is one key.
    """
    boards = ablation.draw_global(64, torch.Generator().manual_seed(1))[0][:3]  # (3, 36, 8, 8)
    answer, twin = answers(boards), answers(boards, bits=15)
    attended = [attention_matrix(net, boards) for net in networks.values()]     # (3, 64, N_rn) each
    figure, axes = plt.subplots(3, 1 + len(networks), figsize=(2.75 * (1 + len(networks)), 8.6))
    for b, row in enumerate(axes):
        n = int(answer[b].any(-1).nonzero()[0])                                 # the first token that asks
        hue = torch.where(boards[b, 16:20].sum(0) > 0, boards[b, 16:20].argmax(0), torch.nan)     # (8, 8)
        row[0].imshow(hue.numpy(), extent=(0, 8, 8, 0), cmap="Set2", vmin=0, vmax=7)
        for axis, A in zip(row[1:], attended):
            side, cell = round(A.shape[2] ** 0.5), 8 / A.shape[2] ** 0.5
            axis.imshow(A[b, n].view(side, side).numpy(), extent=(0, 8, 8, 0), vmin=0, vmax=1, cmap="Blues")
            grid(axis, np.arange(cell, 8, cell), linewidth=0.8)
            for m, share in enumerate(A[b, n].tolist()):
                axis.text((m % side + 0.5) * cell, (m // side + 0.5) * cell, f"{100 * share:.0f}", ha="center",
                          va="center", color="white" if share > 0.6 else "dimgrey", fontsize=9)
        for axis in row:
            axis.plot(n % 8 + 0.5, n // 8 + 0.5, "r+", markersize=12, markeredgewidth=2)
            for m, marker in ((answer[b, n].nonzero(), "o"), (twin[b, n].nonzero(), "s")):
                axis.plot(m % 8 + 0.5, m // 8 + 0.5, marker + "k", fillstyle="none", markersize=13, markeredgewidth=1.5)
            grid(axis, range(1, 8), linewidth=0.2)
    for axis, title in zip(axes[0], ("board: items and their hues", *networks)):
        axis.set_title(title)
    return without_ticks(figure)


# ---------------------------------------------------------------------------- cost
def macs_by_part(model, side):
    """GMACs for one image: convolutions and linear layers; Q K^T and A V of window attention; those of SSA.

    The model must be on the meta device (shapes without memory).
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    flops = counter.get_flop_counts()                               # two per multiply-accumulate
    products = {name: flops[f"ScalableViT.{name}"][torch.ops.aten.bmm]
                for name, _ in model.named_modules() if name.endswith(".attn")}
    both = sum(products.values())
    ssa = sum(n for name, n in products.items() if isinstance(model.get_submodule(name), SSA))
    return [n / 2e9 for n in (counter.get_total_flops() - both, both - ssa, ssa)]


def cost(sides=(224, 336, 448, 672, 896, 1344)):
    """MACs for one image by part, and the tiny network's time for one image on one thread."""
    with torch.device("meta"):
        model = scalablevit_s(num_classes=0)
    parts = zip(*(macs_by_part(model, side) for side in sides))
    model, seconds, threads = scalablevit_tiny(num_classes=0).eval(), [], torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for side in sides:
            image, runs = torch.randn(1, 3, side, side), []
            for _ in range(4):
                began = time.process_time()
                model(image)
                runs.append(time.process_time() - began)
            seconds.append(min(runs))
    torch.set_num_threads(threads)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(3, 2))
    for name, values, i, align, offset in zip(
            ("convolutions and\nlinear layers", "QKᵀ and AV of IWSA", "QKᵀ and AV of SSA"), parts, (2, 3, 3),
            ("right", "left", "left"), ((-6, 8), (-10, -18), (12, -6))):
        line, = left.loglog(sides, values, "o-")
        left.annotate(f"{name}: × {values[-1] / values[0]:.0f}", (sides[i], values[i]), offset, ha=align,
                      color=line.get_color(), textcoords="offset points")
    left.set(ylabel="G multiply-accumulates", title="ScalableViT-S: SSA's attention grows with the pixels squared")
    right.loglog(sides, seconds, "o-", label=f"measured: × {seconds[-1] / seconds[0]:.0f}")
    pixels = (np.array(sides) / sides[0]) ** 2
    right.loglog(sides, seconds[0] * pixels, "--", color="grey", label=f"with the pixels: × {pixels[-1]:.0f}")
    right.set(ylabel="seconds on one CPU thread", title="scalablevit_tiny: time outgrows the pixels")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.set_xlabel("side of the image, pixels")
        axis.set_xticks(sides, map(str, sides))
        axis.minorticks_off()
    return figure


# ---------------------------------------------------------------------------- training curves
def curves(log):
    """Training loss, top-1 accuracy and learning rate per epoch, from train_minimal.py's log.jsonl."""
    epochs = [json.loads(line) for line in pathlib.Path(log).read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3))
    for axis, key, label in zip(axes, ("loss", "top1", "lr"), ("training loss", "top-1, %", "learning rate")):
        axis.plot([e["epoch"] for e in epochs], [e[key] for e in epochs], "o-", markersize=3)
        axis.set(xlabel="epoch", title=label)
    return figure


def grid(axis, places, color="grey", **style):
    """Horizontal and vertical lines at the same places."""
    for place in places:
        axis.axhline(place, color=color, **style)
        axis.axvline(place, color=color, **style)


def without_ticks(figure):
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[])
    return figure


def save(figure, file):
    """Save as a PNG with 256 colors, a third of the size."""
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, dpi=80)
    Image.open(png).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(file, optimize=True)
    plt.close(figure)
    print(f"wrote {file}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Draws the pictures in docs/.")
    parser.add_argument("figures", nargs="*", help="maps, field, cost, curves (default: all)")
    parser.add_argument("--image", default=DOCS / "cat.jpg", help="for maps (default: docs/cat.jpg)")
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="for maps (default: three networks trained here)")
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="to train them on (default: synthetic shapes)")
    parser.add_argument("--log", default="runs/tiny/log.jsonl", help="for curves (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=DOCS, metavar="DIR", help="default: docs")
    args = parser.parse_args()
    make = {"maps": lambda: maps(args.image, args.weights, args.data), "field": field, "cost": cost,
            "curves": lambda: curves(args.log)}
    for name in args.figures:
        if name not in make:
            parser.error(f"figures must be among {', '.join(make)}, got {name!r}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.figures or make:
        save(make[name](), args.out / f"{name}.png")


if __name__ == "__main__":
    main()
