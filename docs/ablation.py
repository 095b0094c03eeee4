"""Tables 5(a), 5(b) and 7 of the paper in miniature: the same rows, on two tasks that one core can train on.

    python docs/ablation.py                                   print the tables from the runs in docs/ablation.jsonl
    python docs/ablation.py --results mine.jsonl              train again: 120 runs of about 2 minutes
    python docs/ablation.py --plot ablation.svg               learning curves; needs matplotlib

Each run is written to the results file when it finishes, so a stopped program resumes with the next run.  Use a new
file after a change to a row or to scalablevit.py, which the program does not notice.

A board is a map of 8 x 8 tokens.  The patch embedding is 1x1 here, so it does not mix them.

    local   tokens are black or white; each names the colors of the 12 tokens within two steps
    global  a quarter of the tokens are items, with a code of 16 bits and one of four hues; each of the others is given
            the code of one item on the board and names its hue; every item has a twin, one bit away

The network has one pair of blocks and windows of 2 x 2 tokens.  What was expected of each row, and why: ablation.md.
"""
import argparse
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
sys.path[:0] = [str(DOCS.parent), str(DOCS)]                         # this repository's files, not installed copies
from drawing import COLORS, FONT  # noqa: E402
from scalablevit import PatchEmbed, ScalableViT  # noqa: E402

RESULTS = pathlib.Path(__file__).with_name("ablation.jsonl")
NEAR = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if 1 <= abs(y) + abs(x) <= 2]    # rows down, columns right
ITEMS, BITS, HUES = 16, 16, 4
NET = dict(dim=32, depths=(2,), heads=(8,), rc=(2,), rn=(1 / 4,), window=2, mlp_ratio=2, num_classes=0)
SETTING = dict(batch=64, lr=3e-3, warmup=50, cooldown=100, weight_decay=0.05,   # for all rows; chosen on the last one
               every=50, patience=400, rise=0.5, ceiling=99.9, cap=1000)
ROWS = {  # name: (arguments, Top-1 and mIoU in the paper)
    "WSA": (dict(pattern=("wsa", "wsa")), 82.4, 38.9),                                  # Table 5(a)
    "IWSA": (dict(pattern=("iwsa", "iwsa")), 82.9, 43.5),
    "SSA": (dict(pattern=("ssa", "ssa")), 82.9, 44.4),
    "SSA, r_c = 1": (dict(pattern=("ssa", "ssa"), rc=(1,)), 82.6, 43.7),
    "SWSA & SSA": (dict(pattern=("swsa", "ssa")), 82.9, None),
    "SSA & IWSA": (dict(pattern=("ssa", "iwsa")), 83.0, None),
    "WSA & SSA, no PEG": (dict(pattern=("wsa", "ssa"), peg=False), 82.7, 41.7),         # Table 5(b): baseline
    "WSA & SSA": (dict(pattern=("wsa", "ssa")), 82.9, 43.2),                            # PEG
    "LEM & SSA, no PEG": (dict(pattern=("lem", "ssa"), peg=False), 82.8, None),         # LEM
    "IWSA & SSA, no PEG": (dict(pattern=("iwsa", "ssa"), peg=False), 83.0, 43.7),       # LIM
    "LEM & SSA": (dict(pattern=("lem", "ssa")), 83.0, 41.1),                            # PEG and LEM; Table 7
    "IWSA & SSA": (dict(pattern=("iwsa", "ssa")), 83.1, 44.9),                          # PEG and LIM: the network
}
CLAIMS = [  # the paper has the first above the second
    ("IWSA", "WSA"), ("SSA", "WSA"), ("SSA", "SSA, r_c = 1"), ("IWSA & SSA", "IWSA"), ("IWSA & SSA", "SSA"),
    ("IWSA & SSA", "SWSA & SSA"), ("IWSA & SSA", "SSA & IWSA"),                         # Table 5(a)
    ("WSA & SSA", "WSA & SSA, no PEG"), ("LEM & SSA, no PEG", "WSA & SSA, no PEG"),     # Tables 5(b) and 7
    ("IWSA & SSA, no PEG", "WSA & SSA, no PEG"), ("IWSA & SSA, no PEG", "WSA & SSA"), ("IWSA & SSA", "WSA & SSA"),
    ("IWSA & SSA", "IWSA & SSA, no PEG"), ("IWSA & SSA", "LEM & SSA"),
]


def draw_local(n, generator):
    """n boards (n, 1, 8, 8) of -1 and 1, and the colors around each token (n, 12, 8, 8): 0, 1, or -1 off the board."""
    color = torch.randint(2, (n, 8, 8), generator=generator)
    around = F.pad(color, (2, 2, 2, 2), value=-1)                                       # (n, 12, 12)
    labels = torch.stack([around[:, 2 + y:10 + y, 2 + x:10 + x] for y, x in NEAR], dim=1)
    return 2.0 * color[:, None] - 1, labels


def draw_global(n, generator):
    """n boards (n, 36, 8, 8) and the hue that each token asks for (n, 1, 8, 8), -1 for items, which ask for none.

    Channels: an item's code (16 of -1 and 1), its hue (4, one-hot), the code that another token asks with (16).
    There is one item in each cell of 2 x 2 tokens, so each key of SSA, which summarizes a cell, has one to describe.
    """
    code = 2.0 * torch.randint(2, (n, ITEMS // 2, BITS), generator=generator) - 1
    bit = F.one_hot(torch.randint(BITS, (n, ITEMS // 2), generator=generator), BITS)
    code = torch.cat([code, code * (1 - 2 * bit)], dim=1)                               # (n, 16, 16): twins
    hue = torch.randint(HUES, (n, ITEMS), generator=generator)
    is_item = F.one_hot(torch.randint(4, (n, ITEMS), generator=generator), 4).bool()[..., None]      # (n, 16, 4, 1)
    wanted = torch.randint(ITEMS, (n, ITEMS * 4), generator=generator)                  # one for each token
    question = code.gather(1, wanted[..., None].expand(-1, -1, BITS)).view(n, ITEMS, 4, BITS)
    cells = torch.cat([is_item * code[:, :, None], is_item * F.one_hot(hue, HUES)[:, :, None], ~is_item * question], 3)
    labels = hue.gather(1, wanted).view(n, ITEMS, 4, 1).masked_fill(is_item, -1)
    boards, labels = (t.view(n, 4, 4, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(n, -1, 8, 8) for t in (cells, labels))
    return boards, labels


TASKS = {"local": (draw_local, 2, len(NEAR)), "global": (draw_global, HUES, 1)}         # answers, questions to a token


def train(row, task, seed):
    """Train until validation accuracy stops rising, then decay the learning rate to 0; -> dict of results."""
    began = time.time()
    draw, answers, questions = TASKS[task]
    generator = torch.Generator().manual_seed(seed)                                     # the same boards for every row
    validation = draw(256, torch.Generator().manual_seed(10 ** 6))
    test = draw(1000, torch.Generator().manual_seed(10 ** 6 + 1))                       # used once
    torch.manual_seed(seed)
    channels = validation[0].shape[1]
    backbone = ScalableViT(**NET | ROWS[row][0], in_chans=channels)
    backbone.stages[0].embed = PatchEmbed(channels, NET["dim"], kernel_size=1, stride=1)
    head = nn.Conv2d(backbone.num_features, answers * questions, 1)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, SETTING["lr"], weight_decay=SETTING["weight_decay"], fused=True)

    def network(boards):
        return head(backbone.forward_features(boards)[-1]).unflatten(1, (answers, questions))

    def update(rate):
        boards, labels = draw(SETTING["batch"], generator)
        loss = F.cross_entropy(network(boards), labels, ignore_index=-1)
        optimizer.param_groups[0]["lr"] = rate * SETTING["lr"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()

    @torch.no_grad()
    def evaluate(boards, labels):
        right = network(boards).argmax(1) == labels                                     # (n, questions, 8, 8)
        return 100 * right[labels >= 0].float().mean().item()

    curve = []                                                                          # [i]: after (i + 1) every
    while not stopped(curve):
        for i in range(SETTING["every"]):
            update(min(1, (len(curve) * SETTING["every"] + i + 1) / SETTING["warmup"]))
        curve.append(evaluate(*validation))
    for i in range(SETTING["cooldown"]):
        update(1 - (i + 1) / SETTING["cooldown"])
    curve = [round(figure, 2) for figure in curve]
    to_95 = next(((i + 1) * SETTING["every"] for i, figure in enumerate(curve) if figure >= 95), None)
    return {"final": evaluate(*test), "updates": len(curve) * SETTING["every"], "to_95": to_95,
            "area": statistics.mean(continued(curve)), "seconds": round(time.time() - began), "curve": curve}


def stopped(curve):
    """Whether to stop: at the ceiling, at the cap, or without a rise over the last `patience` updates."""
    recent = SETTING["patience"] // SETTING["every"]
    flat = len(curve) > recent and max(curve[-recent:]) < max(curve[:-recent]) + SETTING["rise"]
    return flat or len(curve) * SETTING["every"] >= SETTING["cap"] or bool(curve) and curve[-1] >= SETTING["ceiling"]


def continued(curve):
    """The curve up to the cap, where a run that has stopped keeps its last value; its mean is the normalized area."""
    return curve + curve[-1:] * (SETTING["cap"] // SETTING["every"] - len(curve))


def setting():
    """The settings that all rows share, as in the results file.  Runs with other settings are ignored."""
    return json.loads(json.dumps({**SETTING, **NET}))


def finished():
    """{(row, task, seed): results} of the runs with these settings."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {(run["row"], run["task"], run["seed"]): run for run in lines if run["setting"] == setting()}


def run(row, task, seed):
    """Train and add a line to the results file, which is replaced atomically."""
    result = {"row": row, "task": task, "seed": seed, **train(row, task, seed), "setting": setting()}
    part = RESULTS.with_suffix(".part")
    part.write_text((RESULTS.read_text() if RESULTS.exists() else "") + json.dumps(result) + "\n")
    part.replace(RESULTS)
    print(f"{task}, {row}, seed {seed}: {result['final']:.1f} %, {result['updates']} updates, {result['seconds']} s",
          flush=True)


def figures(row, task, key):
    """{seed: result} of a row's finished runs."""
    return {seed: run[key] for (r, t, seed), run in finished().items() if (r, t) == (row, task)}


def table():
    """Markdown: mean and standard deviation over the seeds, then the paper's mIoU on ADE20K and Top-1 on ImageNet.

    Per task: final accuracy; median number of updates to 95 % (how many runs got there); area under the curve.
    """
    heads = [f"{task}, % | to 95 % | area, %" for task in TASKS]
    lines = ["| | " + " | ".join(heads) + " | mIoU | Top-1 |", "|---" * (3 * len(TASKS) + 3) + "|"]
    for row, (_, top1, miou) in ROWS.items():
        cells = [row]
        for task in TASKS:
            finals, areas, to_95 = ([*figures(row, task, key).values()] for key in ("final", "area", "to_95"))
            reached = [updates for updates in to_95 if updates]
            spread = f" ± {statistics.stdev(finals):.1f}" if len(finals) > 1 else ""
            cells += [f"{statistics.mean(finals):.1f}{spread}" if finals else "–",
                      f"{statistics.median(reached):.0f} ({len(reached)})" if reached else "–",
                      f"{statistics.mean(areas):.1f}" if areas else "–"]
        lines.append("| " + " | ".join([*cells, str(miou or "–"), str(top1)]) + " |")
    return "\n".join(lines) + "\n"


def overview():
    """Markdown, in brief: mean final accuracy per task, then the paper's Top-1 and mIoU."""
    lines = ["| | " + " | ".join(f"{task}, %" for task in TASKS) + " | Top-1 | mIoU |", "|---" * (len(TASKS) + 3) + "|"]
    for row, (_, top1, miou) in ROWS.items():
        finals = [f"{statistics.mean(figures(row, task, 'final').values()):.1f}" for task in TASKS]
        lines.append("| " + " | ".join([row, *finals, str(top1), str(miou or "–")]) + " |")
    return "\n".join(lines) + "\n"


def interval(values, resamples=10_000):
    """95 % bootstrap interval of the mean: the middle 95 % of the means of values resampled with replacement."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    return means[resamples // 40], means[-resamples // 40 - 1]


def difference(first, second, task):
    """First row minus second in points, paired by seed: (mean, low, high, verdict on "first is better")."""
    ours, theirs = figures(first, task, "final"), figures(second, task, "final")
    paired = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    low, high = interval(paired)
    verdict = "appears" if low > 0 else "reversed" if high < 0 else "absent"
    if min(statistics.mean(ours.values()), statistics.mean(theirs.values())) >= 99:
        verdict = "ceiling"
    return statistics.mean(paired), low, high, verdict


def differences():
    """Markdown: the differences that the paper's tables claim, on each task with intervals, then in the paper."""
    lines = ["| | " + " | ".join(TASKS) + " | mIoU | Top-1 |", "|---" * (len(TASKS) + 3) + "|"]
    for first, second in CLAIMS:
        cells = [f"{first} − {second}"]
        for task in TASKS:
            mean, low, high, verdict = difference(first, second, task)
            cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {verdict}")
        (_, *ours), (_, *theirs) = ROWS[first], ROWS[second]                            # (Top-1, mIoU) each
        cells += [f"{a - b:+.1f}" if a and b else "–" for a, b in zip(ours, theirs)][::-1]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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


def color(row):
    """That of the kind of attention which is named first."""
    kind = row.split()[0].strip(",").lower()
    return COLORS[kind]


def curves(file):
    """Plot validation accuracy against updates, mean over the seeds; each row's name at its end.

    A run that has stopped keeps its last value.
    """
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 12, "svg.hashsalt": "scalablevit", "font.family": "sans-serif",
                         "font.sans-serif": FONT.split(", ")})
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), sharey=True, layout="constrained")
    for axis, (task, rows) in zip(axes, CURVES.items()):
        for row, (style, moved) in rows.items():
            runs = [continued(curve) for curve in figures(row, task, "curve").values()]
            mean = torch.tensor(runs).mean(0)
            updates = SETTING["every"] * torch.arange(1, len(mean) + 1)
            axis.plot(updates, mean, style, color=color(row), linewidth=2)
            axis.annotate(row.replace("r_c", "$r_c$"), (updates[-1], mean[-1]), (6, moved), color=color(row), va="center",
                          textcoords="offset points")
        axis.set(xlabel="updates", title=task)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("correct, %")
    figure.savefig(file, metadata={"Date": None} if str(file).endswith(".svg") else None)
    plt.close(figure)


def main():
    global RESULTS
    parser = argparse.ArgumentParser(description="The paper's ablations in miniature.")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each row and task (default: %(default)s)")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, metavar="FILE",
                        help="default: docs/ablation.jsonl")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw learning curves; needs matplotlib")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {args.seeds}")
    RESULTS = args.results
    torch.set_num_threads(1)                                                            # more do not help: too small
    for seed in range(args.seeds):                                                      # all rows with one seed first
        for task in TASKS:
            for row in ROWS:
                if (row, task, seed) not in finished():
                    run(row, task, seed)
    print(table(), differences(), sep="\n")
    if args.plot:
        curves(args.plot)


if __name__ == "__main__":
    main()
