"""Tables 5(a), 5(b) and 7 of the paper in miniature: the same rows, on two tasks for one core.

    python docs/ablation.py                         print the tables from docs/ablation.jsonl
    python docs/ablation.py --results mine.jsonl    train again: 120 runs of about 2 minutes
    python docs/ablation.py --plot ablation.svg     learning curves; needs matplotlib

Each run is written to the results file when it finishes, so a stopped program resumes with the next
run.  Use a new file after a change to a row or to scalablevit.py: the program does not notice it.

A board is a map of 8 x 8 tokens.  The patch embedding is 1x1 here, so it does not mix them.

    local   tokens are black or white; each names the colors of the 12 tokens within two steps
    global  a quarter of the tokens are items, with a code of 16 bits and one of four hues; each of
            the others is given the code of one item on the board and names its hue; every item has
            a twin, one bit away

The network has one pair of blocks and windows of 2 x 2 tokens.  What was expected of each row, and
why: ablation.md.
"""
import argparse
import itertools
import json
import pathlib
import random
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]                        # not installed copies
from drawing import COLORS, FONT, TEXT  # noqa: E402
from scalablevit import PatchEmbed, ScalableViT  # noqa: E402

RESULTS = DOCS / "ablation.jsonl"
ITEMS, BITS, HUES = 16, 16, 4
AROUND = itertools.product(range(-2, 3), repeat=2)                  # rows down, columns right
NEAR = [(y, x) for y, x in AROUND if 0 < abs(y) + abs(x) < 3]
NET = dict(dim=32, depths=(2,), heads=(8,), rc=(2,), rn=(1 / 4,), window=2, mlp_ratio=2,
           num_classes=0)
SETTING = {                                     # for all rows; chosen on the last one
    "batch": 64,
    "lr": 3e-3,
    "warmup": 50,
    "cooldown": 100,
    "weight_decay": 0.05,
    "every": 50,
    "patience": 400,
    "rise": 0.5,
    "ceiling": 99.9,
    "cap": 1000,
}


def row(first, second, top1, miou=None, **arguments):
    """Arguments of the network; Top-1 on ImageNet and mIoU on ADE20K in the paper."""
    return {"pattern": (first, second), **arguments}, top1, miou


ROWS = {
    "WSA": row("wsa", "wsa", 82.4, 38.9),                           # Table 5(a)
    "IWSA": row("iwsa", "iwsa", 82.9, 43.5),
    "SSA": row("ssa", "ssa", 82.9, 44.4),
    "SSA, r_c = 1": row("ssa", "ssa", 82.6, 43.7, rc=(1,)),
    "SWSA & SSA": row("swsa", "ssa", 82.9),
    "SSA & IWSA": row("ssa", "iwsa", 83.0),
    "WSA & SSA, no PEG": row("wsa", "ssa", 82.7, 41.7, peg=False),  # Table 5(b): baseline
    "WSA & SSA": row("wsa", "ssa", 82.9, 43.2),                     # PEG
    "LEM & SSA, no PEG": row("lem", "ssa", 82.8, peg=False),        # LEM
    "IWSA & SSA, no PEG": row("iwsa", "ssa", 83.0, 43.7, peg=False),    # LIM
    "LEM & SSA": row("lem", "ssa", 83.0, 41.1),                     # PEG and LEM; Table 7
    "IWSA & SSA": row("iwsa", "ssa", 83.1, 44.9),                   # PEG and LIM: the network
}
CLAIMS = [                                      # the paper has the first above the second
    ("IWSA", "WSA"),                                                # Table 5(a)
    ("SSA", "WSA"),
    ("SSA", "SSA, r_c = 1"),
    ("IWSA & SSA", "IWSA"),
    ("IWSA & SSA", "SSA"),
    ("IWSA & SSA", "SWSA & SSA"),
    ("IWSA & SSA", "SSA & IWSA"),
    ("WSA & SSA", "WSA & SSA, no PEG"),                             # Tables 5(b) and 7
    ("LEM & SSA, no PEG", "WSA & SSA, no PEG"),
    ("IWSA & SSA, no PEG", "WSA & SSA, no PEG"),
    ("IWSA & SSA, no PEG", "WSA & SSA"),
    ("IWSA & SSA", "WSA & SSA"),
    ("IWSA & SSA", "IWSA & SSA, no PEG"),
    ("IWSA & SSA", "LEM & SSA"),
]


# ---------------------------------------------------------------------------- tasks
def draw_local(n, generator):
    """n boards (n, 1, 8, 8) of -1 and 1, and the colors around each token (n, 12, 8, 8).

    A color is 0 or 1, and -1 off the board.
    """
    color = torch.randint(2, (n, 8, 8), generator=generator)
    around = F.pad(color, (2, 2, 2, 2), value=-1)                   # (n, 12, 12)
    labels = [around[:, 2 + y:10 + y, 2 + x:10 + x] for y, x in NEAR]
    return 2.0 * color[:, None] - 1, torch.stack(labels, dim=1)


def draw_global(n, generator):
    """n boards (n, 36, 8, 8) and the hue that each token asks for (n, 1, 8, 8), -1 for items.

    Channels: an item's code (16 of -1 and 1), its hue (4, one-hot), the code that another token
    asks with (16).  There is one item in each cell of 2 x 2 tokens, so each key of SSA, which
    summarizes a cell, has one to describe.
    """
    def draw(values, *shape):
        return torch.randint(values, (n, *shape), generator=generator)

    code = 2.0 * draw(2, ITEMS // 2, BITS) - 1                      # (n, 8, 16)
    bit = F.one_hot(draw(BITS, ITEMS // 2), BITS)
    twins = code * (1 - 2 * bit)
    code = torch.cat([code, twins], dim=1)                          # (n, 16, 16)
    hue = draw(HUES, ITEMS)                                         # (n, 16)
    place = F.one_hot(draw(4, ITEMS), 4)                            # in the item's cell
    is_item = place.bool()[..., None]                               # (n, 16, 4, 1)
    wanted = draw(ITEMS, ITEMS * 4)                                 # one for each token
    question = code.gather(1, wanted[..., None].expand(-1, -1, BITS))
    answer = hue.gather(1, wanted)
    tokens = torch.cat([
        is_item * code[:, :, None],
        is_item * F.one_hot(hue, HUES)[:, :, None],
        ~is_item * question.view(n, ITEMS, 4, BITS),
    ], dim=3)
    labels = answer.view(n, ITEMS, 4, 1).masked_fill(is_item, -1)
    return on_board(tokens), on_board(labels)


def on_board(tokens):
    """The tokens of each cell (n, cells, 4, C) -> (n, C, 8, 8)."""
    cells = tokens.view(len(tokens), 4, 4, 2, 2, -1)                # rows, columns; within a cell
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


TASKS = {                                       # answers to a question, questions to a token
    "local": (draw_local, 2, len(NEAR)),
    "global": (draw_global, HUES, 1),
}


# ---------------------------------------------------------------------------- runs
def train(name, task, seed):
    """Train until validation accuracy stops rising, then decay the learning rate to 0."""
    began = time.time()
    draw, answers, questions = TASKS[task]
    generator = torch.Generator().manual_seed(seed)                 # the same boards for every row
    validation = draw(256, torch.Generator().manual_seed(10 ** 6))
    test = draw(1000, torch.Generator().manual_seed(10 ** 6 + 1))   # used once
    channels = validation[0].shape[1]
    torch.manual_seed(seed)
    arguments = {**NET, **ROWS[name][0]}
    model = ScalableViT(in_chans=channels, **arguments)
    model.stages[0].embed = PatchEmbed(channels, model.num_features, kernel_size=1, stride=1)
    model.head = nn.Conv2d(model.num_features, answers * questions, 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=SETTING["weight_decay"], fused=True)

    def network(boards):
        features = model.forward_features(boards)[0]
        return model.head(features).unflatten(1, (answers, questions))

    def update(rate):
        boards, labels = draw(SETTING["batch"], generator)
        loss = F.cross_entropy(network(boards), labels, ignore_index=-1)
        optimizer.param_groups[0]["lr"] = rate * SETTING["lr"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    every = SETTING["every"]
    curve = []
    while not stopped(curve):
        for i in range(every):
            update(min(1, (len(curve) * every + i + 1) / SETTING["warmup"]))
        curve.append(accuracy(network, *validation))
    for i in reversed(range(SETTING["cooldown"])):
        update(i / SETTING["cooldown"])
    curve = [round(right, 2) for right in curve]
    good = [i for i, right in enumerate(curve, 1) if right >= 95]
    return {
        "final": accuracy(network, *test),
        "updates": len(curve) * every,
        "to_95": good[0] * every if good else None,
        "area": statistics.mean(continued(curve)),
        "seconds": round(time.time() - began),
        "curve": curve,
    }


@torch.no_grad()
def accuracy(network, boards, labels):
    """Percent of the questions that are answered correctly."""
    right = network(boards).argmax(1) == labels                     # (n, questions, 8, 8)
    return 100 * right[labels >= 0].float().mean().item()


def stopped(curve):
    """Whether to stop: at the ceiling, at the cap, or without a rise in `patience` updates."""
    if not curve:
        return False
    if curve[-1] >= SETTING["ceiling"] or len(curve) * SETTING["every"] >= SETTING["cap"]:
        return True
    recent = SETTING["patience"] // SETTING["every"]
    before = curve[:-recent]
    return bool(before) and max(curve[-recent:]) < max(before) + SETTING["rise"]


def continued(curve):
    """The curve up to the cap: a run that has stopped keeps its last value."""
    missing = SETTING["cap"] // SETTING["every"] - len(curve)
    return curve + curve[-1:] * missing


def setting():
    """The settings that all rows share, as in the results file."""
    return json.loads(json.dumps({**SETTING, **NET}))


def stored():
    """The lines of the results file."""
    return RESULTS.read_text().splitlines() if RESULTS.exists() else []


def finished():
    """{(row, task, seed): results} of the runs with these settings; others are ignored."""
    runs = {}
    for line in stored():
        run = json.loads(line)
        if run["setting"] == setting():
            runs[run["row"], run["task"], run["seed"]] = run
    return runs


def run(name, task, seed):
    """Train and add a line to the results file, which is replaced atomically."""
    result = train(name, task, seed)
    line = json.dumps({"row": name, "task": task, "seed": seed, **result, "setting": setting()})
    part = RESULTS.with_suffix(".part")
    part.write_text("\n".join([*stored(), line, ""]))
    part.replace(RESULTS)
    print(f"{task}, {name}, seed {seed}: {result['final']:.1f} %, {result['updates']} updates, "
          f"{result['seconds']} s", flush=True)


# ---------------------------------------------------------------------------- tables
def figures(name, task, key):
    """{seed: result} of a row's finished runs."""
    return {seed: run[key] for (*of, seed), run in finished().items() if of == [name, task]}


def markdown(heads, rows):
    """A table of strings."""
    lines = [f"| {' | '.join(cells)} |\n" for cells in rows]
    rule = "|---" * len(rows[0]) + "|\n"
    return f"| | {' | '.join(heads)} |\n{rule}" + "".join(lines)


def table():
    """Markdown: the mean and standard deviation over the seeds, then the paper's mIoU and Top-1.

    Per task: final accuracy; median number of updates to 95 % (how many runs got there); area
    under the curve.
    """
    rows = []
    for name, (_, top1, miou) in ROWS.items():
        cells = [name]
        for task in TASKS:
            finals = list(figures(name, task, "final").values())
            areas = figures(name, task, "area").values()
            reached = [n for n in figures(name, task, "to_95").values() if n]
            spread = f" ± {statistics.stdev(finals):.1f}" if len(finals) > 1 else ""
            cells.append(f"{statistics.mean(finals):.1f}{spread}")
            cells.append(f"{statistics.median(reached):.0f} ({len(reached)})" if reached else "–")
            cells.append(f"{statistics.mean(areas):.1f}")
        rows.append([*cells, str(miou or "–"), str(top1)])
    heads = [f"{task}, % | to 95 % | area, %" for task in TASKS]
    return markdown([*heads, "mIoU", "Top-1"], rows)


def overview():
    """Markdown, in brief: mean final accuracy per task, then the paper's Top-1 and mIoU."""
    rows = []
    for name, (_, top1, miou) in ROWS.items():
        cells = [name]
        for task in TASKS:
            mean = statistics.mean(figures(name, task, "final").values())
            cells.append(f"{mean:.1f}")
        rows.append([*cells, str(top1), str(miou or "–")])
    heads = [f"{task}, %" for task in TASKS]
    return markdown([*heads, "Top-1", "mIoU"], rows)


def interval(values, resamples=10_000):
    """95 % bootstrap interval of the mean: values are drawn anew, with replacement."""
    rng = random.Random(0)
    means = [statistics.fmean(rng.choices(values, k=len(values))) for _ in range(resamples)]
    means.sort()
    return means[resamples // 40], means[-resamples // 40 - 1]


def difference(first, second, task):
    """First row minus second in points, paired by seed: (mean, low, high, is the first better?)."""
    ours = figures(first, task, "final")
    theirs = figures(second, task, "final")
    paired = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    low, high = interval(paired)
    lower = min(statistics.mean(ours.values()), statistics.mean(theirs.values()))
    if lower >= 99:
        verdict = "ceiling"
    elif low > 0:
        verdict = "appears"
    elif high < 0:
        verdict = "reversed"
    else:
        verdict = "absent"
    return statistics.mean(paired), low, high, verdict


def differences():
    """Markdown: the differences that the paper's tables claim, on each task, then in the paper."""
    rows = []
    for first, second in CLAIMS:
        cells = [f"{first} − {second}"]
        for task in TASKS:
            mean, low, high, verdict = difference(first, second, task)
            cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {verdict}")
        for i in (2, 1):                                            # mIoU, Top-1
            ours = ROWS[first][i]
            theirs = ROWS[second][i]
            cells.append(f"{ours - theirs:+.1f}" if ours and theirs else "–")
        rows.append(cells)
    return markdown([*TASKS, "mIoU", "Top-1"], rows)


# ---------------------------------------------------------------------------- curves
CURVES = {  # task: {row: (style, points by which its label is moved)}
    "local": {
        "IWSA & SSA": ("-", 6),
        "WSA": ("--", -7),
        "IWSA & SSA, no PEG": (":", -18),
        "SSA": ("-", -32),
        "LEM & SSA, no PEG": (":", 0),
        "WSA & SSA, no PEG": (":", 0),
    },
    "global": {
        "SSA": ("-", 9),
        "IWSA & SSA, no PEG": (":", -5),
        "SSA, r_c = 1": ("--", -19),
        "IWSA & SSA": ("-", -33),
        "IWSA": ("--", 4),
        "WSA": ("--", -8),
    },
}


def curves(file):
    """Plot validation accuracy against updates, mean over the seeds; each row's name at its end.

    Its color is that of the kind of attention which is named first.
    """
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 12,
        "svg.hashsalt": "scalablevit",
        "font.family": "sans-serif",
        "font.sans-serif": FONT.split(", "),
    })
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), sharey=True, layout="constrained")
    for axis, (task, rows) in zip(axes, CURVES.items()):
        for name, (style, moved) in rows.items():
            kind = ROWS[name][0]["pattern"][0]
            runs = [continued(curve) for curve in figures(name, task, "curve").values()]
            mean = torch.tensor(runs).mean(0)
            updates = SETTING["every"] * torch.arange(1, len(mean) + 1)
            axis.plot(updates, mean, style, color=COLORS[kind], linewidth=2)
            axis.annotate(name.replace("r_c", "$r_c$"), (updates[-1], mean[-1]), (6, moved),
                          color=TEXT[kind], va="center", textcoords="offset points")
        axis.set(xlabel="updates", title=task)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("correct, %")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main():
    global RESULTS
    parser = argparse.ArgumentParser(description="The paper's ablations in miniature.")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each row and task")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, metavar="FILE",
                        help="default: docs/ablation.jsonl")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw learning curves")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {args.seeds}")
    RESULTS = args.results
    torch.set_num_threads(1)                                        # more do not help: too small
    for seed, task, name in itertools.product(range(args.seeds), TASKS, ROWS):
        if (name, task, seed) not in finished():
            run(name, task, seed)
    print(table(), differences(), sep="\n")
    if args.plot:
        curves(args.plot)


if __name__ == "__main__":
    main()
