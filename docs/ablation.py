"""Tables 5(a), 5(b) and 7 of the paper in miniature: the same rows, on a task that a laptop can train on.

    python docs/ablation.py --seeds 5                         the table at once: docs/ablation.jsonl has these runs
    python docs/ablation.py --results mine.jsonl              12 networks x 3 seeds anew; 20 s each on one core

Every finished run is in the file of results at once: a stopped program goes on where it was.  The file does not know
the code: after a change to a row or to scalablevit.py, take another file.

The task: a board of 8 x 8 cells, empty or grey, and one in one of four hues.  Every grey cell's class is that hue, an
empty cell's is 0.  What a cell is, it shows; which hue it takes is far away for most.  A cell has 4 x 4 pixels, and so
one token.  The network is one stage of four blocks with windows of 2 x 2 tokens, which alone carry the hue over a
sixteenth of the board.  A linear layer on each token answers.
"""
import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))           # the file beside, not an installed copy
from scalablevit import ScalableViT  # noqa: E402

RESULTS = pathlib.Path(__file__).with_name("ablation.jsonl")
CELLS, HUES = 8, 4
NET = dict(dim=32, depths=(4,), heads=(2,), rc=(1.25,), rn=(1 / 4,), window=2, num_classes=0)
SETTING = dict(steps=200, batch=32, lr=2e-3, warmup=50, weight_decay=0.05)            # for all rows; chosen on the last
ROWS = {  # name: (arguments, Top-1 and mIoU in the paper)
    "WSA": (dict(pattern=("wsa", "wsa")), 82.4, 38.9),                                  # Table 5(a)
    "IWSA": (dict(pattern=("iwsa", "iwsa")), 82.9, 43.5),
    "SSA": (dict(pattern=("ssa", "ssa")), 82.9, 44.4),
    "SSA, r_c = 1": (dict(pattern=("ssa", "ssa"), rc=(1,)), 82.6, 43.7),
    "SWSA & SSA": (dict(pattern=("swsa", "ssa")), 82.9, None),
    "SSA & IWSA": (dict(pattern=("ssa", "iwsa")), 83.0, None),
    "neither": (dict(pattern=("wsa", "ssa"), peg=False), 82.7, 41.7),                   # Table 5(b)
    "PEG": (dict(pattern=("wsa", "ssa")), 82.9, 43.2),
    "LEM": (dict(pattern=("lem", "ssa"), peg=False), 82.8, None),
    "LIM": (dict(pattern=("iwsa", "ssa"), peg=False), 83.0, 43.7),
    "PEG and LEM": (dict(pattern=("lem", "ssa")), 83.0, 41.1),                          # and Table 7
    "IWSA & SSA = PEG and LIM": (dict(pattern=("iwsa", "ssa")), 83.1, 44.9),            # the network itself
}
TABLES = {"Table 5(a): self-attention": [*list(ROWS)[:6], list(ROWS)[-1]],
          "Table 5(b): around WSA & SSA": list(ROWS)[6:], "Table 7: LEM against LIM": list(ROWS)[-2:]}


def draw(n, generator):
    """n boards (n, 3, 32, 32) and the class of each cell (n, 8, 8): 0 empty, 1 to 4 the hue of the coloured cell."""
    palette = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]]).float()
    hue, where = (torch.randint(m, (n,), generator=generator) for m in (HUES, CELLS * CELLS))
    grey = torch.rand(n, CELLS * CELLS, generator=generator) < 0.5
    grey[torch.arange(n), where] = True
    colours = grey[..., None].expand(-1, -1, 3) * 0.5 - 0.25                            # (n, 64, 3)
    colours[torch.arange(n), where] = palette[hue]
    images = colours.view(n, CELLS, CELLS, 3).permute(0, 3, 1, 2)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = images + 0.25 * torch.randn(images.shape, generator=generator)
    return images, (grey * (hue + 1)[:, None]).view(n, CELLS, CELLS)


def train(row, seed):
    """-> mean IoU of the five classes, in percent, on boards that no training saw."""
    torch.manual_seed(seed)
    backbone = ScalableViT(**NET | ROWS[row][0])
    head = nn.Conv2d(backbone.num_features, 1 + HUES, 1)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, SETTING["lr"], weight_decay=SETTING["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, SETTING["lr"], SETTING["steps"], SETTING["warmup"] / SETTING["steps"])  # up, and a cosine down
    generator = torch.Generator().manual_seed(seed)                                     # the same boards for every row
    for _ in range(SETTING["steps"]):
        images, labels = draw(SETTING["batch"], generator)
        loss = F.cross_entropy(head(backbone.forward_features(images)[-1]), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
    backbone.eval()
    with torch.no_grad():
        images, labels = draw(1000, torch.Generator().manual_seed(10 ** 6))
        answers = head(backbone.forward_features(images)[-1]).argmax(1)
    return 100 * statistics.mean(((answers == c) & (labels == c)).sum().item()
                                 / ((answers == c) | (labels == c)).sum().item() for c in range(1 + HUES))


def setting():
    """What all rows share, as it stands in the file of results: runs under another setting are kept apart."""
    return json.loads(json.dumps({**SETTING, **NET}))


def finished():
    """{(row, seed): mean IoU} of the runs under this setting."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {(run["row"], run["seed"]): run["miou"] for run in lines if run["setting"] == setting()}


def run(row, seed):
    began = time.time()
    result = {"row": row, "seed": seed, "miou": train(row, seed), "seconds": round(time.time() - began),
              "setting": setting()}
    part = RESULTS.with_suffix(".part")                                                 # whole or not at all
    part.write_text((RESULTS.read_text() if RESULTS.exists() else "") + json.dumps(result) + "\n")
    part.replace(RESULTS)
    print(f"{row}, seed {seed}: mean IoU {result['miou']:.1f} %, {result['seconds']} s", flush=True)


def table():
    """Markdown: mean and standard deviation over the seeds, beside the paper."""
    runs, lines = finished(), []
    for title, rows in TABLES.items():
        lines += [f"| {title} | mean IoU here, % | seeds | paper: mIoU on ADE20K | paper: Top-1 on ImageNet |",
                  "|---|---|---|---|---|"]
        for row in rows:
            mious = [miou for (name, _), miou in runs.items() if name == row]
            spread = f" ± {statistics.stdev(mious):.1f}" if len(mious) > 1 else ""
            here = f"{statistics.mean(mious):.1f}{spread}" if mious else "–"
            lines.append(f"| {row} | {here} | {len(mious)} | {ROWS[row][2] or '–'} | {ROWS[row][1]} |")
        lines.append("")
    return "\n".join(lines)


def main():
    global RESULTS
    parser = argparse.ArgumentParser(description="The paper's ablations in miniature.")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: %(default)s)")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, metavar="FILE",
                        help="default: docs/ablation.jsonl")
    args = parser.parse_args()
    seeds, RESULTS = args.seeds, args.results
    if seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {seeds}")
    for seed in range(seeds):                                                           # a whole table, then the next
        for row in ROWS:
            if (row, seed) not in finished():
                run(row, seed)
    print(table())


if __name__ == "__main__":
    main()
