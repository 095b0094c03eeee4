"""What detection.py and segmentation.py share: settings, the training loop and pictures.

Settings and stopping are train_minimal.py's; what each program adds, detection.py shows.  Left out
of torchvision's references: aspect-ratio grouping, SyncBN, EMA.
"""
import functools
import importlib.util
import json
import math
import pathlib
import sys
import time

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision import ops, utils
from torchvision.transforms.v2 import functional as v2

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))          # this repository's files
import train_minimal  # noqa: E402
from dense_data import Mosaics  # noqa: E402  (needs the path, too)
from train_minimal import (  # noqa: E402
    DEVICE, RANK, WORLD_SIZE, UserError, autocast, load_image, save, say)

GENERAL = dict(train_minimal.GENERAL, checkpointing=False)          # of the backbone's blocks
GENERAL["fuse"] = importlib.util.find_spec("scalablevit_kernels") is not None
del GENERAL["compile"]
# Appendix C, Table 8.  lr is for 16 images a step; it drops to a tenth at `fall`, again at 11/12.
SETTINGS = dict(
    batch_size=2, accum=max(1, 8 // WORLD_SIZE), steps=0, epochs=0, lr=1e-4, warmup_steps=0,
    power=0.0, fall=1.0, weight_decay=1e-4, width=256, mosaics=1600, segment=0, seed=0)


def recipe(program, known):
    settings = dict(SETTINGS, **program.SETTINGS)
    for name, choices in program.RECIPES.items():
        choice = known.get(name, next(iter(choices)))
        if choice not in choices:
            raise UserError(f"{name} must be one of {list(choices)}, not {choice!a}")
        settings.update(choices[choice], **{name: choice})
    if not known["data"] or (pathlib.Path(known["data"]) / "train").is_dir():
        settings.update(program.MOSAIC)
    return settings


def parse_args(program, argv=None):
    args, run = train_minimal.parse_args(
        argv, program.__doc__, GENERAL, functools.partial(recipe, program), "framework")
    if (run or args.eval or args.predict) and "framework" not in run.get("settings", {}):
        raise UserError(f"{str(args.init)!a} must be a file that this program has saved")
    vars(args).update(compile=False, aug_repeats=1, init="" if run else args.init)
    return args, run


def load_data(program, args, split):
    """Mosaics, fresh in training and for validation always the same; else the program's data."""
    folder = pathlib.Path(args.data or args.output / "digits")
    if not args.data and RANK == 0 and not folder.exists():
        train_minimal.draw_digits(folder)
    if WORLD_SIZE > 1:
        dist.barrier()                                              # the digits are drawn
    if not (folder / "train").is_dir():
        return program.Data(folder, split, args)
    n = args.mosaics if split == "train" else math.ceil(args.mosaics / 8)
    return Mosaics(folder / split, n, args.size, program.view)


class Pyramid(torch.nn.Module):
    """Feature pyramid on the maps from index `first`: {"0": (B, width, ⌈H/s⌉, ⌈W/s⌉), ...}."""

    def __init__(self, backbone, width, first=0, extra=None):
        super().__init__()
        self.backbone = backbone
        self.first = first
        self.out_channels = width
        self.fpn = ops.FeaturePyramidNetwork(backbone.channels[first:], width, extra)

    def forward(self, images):
        maps = self.backbone.forward_features(images)[self.first:]
        return self.fpn({str(i): m for i, m in enumerate(maps)})


def build_model(program, args, run, classes):
    """The framework on a new backbone, on that of --init, or as in the run."""
    backbone = train_minimal.build_model(args, **run.get("config", dict(num_classes=0)))
    backbone.norm.requires_grad_(False)                             # only a classifier uses it
    backbone.set_grad_checkpointing(args.checkpointing)
    model = program.build(backbone, len(classes), args)
    args.backbone = backbone
    if run:
        model.load_state_dict(run["model"])
    return model.to(DEVICE, memory_format=torch.channels_last)


def load_model(program, file):
    args, run = parse_args(program, ["--eval", "--init", str(file)])
    return build_model(program, args, run, run["classes"]).eval(), run["classes"]


def train_step(program, net, optimizer, batches, step, args):
    """One optimizer step on accum batches; returns the mean loss of all processes."""
    net.train()
    progress = step / args.total
    falls = sum(progress >= fall for fall in (args.fall, max(args.fall, 11 / 12)))
    warmup = min(1, (step + 1) / max(1, args.warmup_steps))
    rate = args.lr * args.step_size / 16 * warmup * (1 - progress) ** args.power * 0.1 ** falls
    for group in optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros((), device=DEVICE)
    for i in range(args.accum):
        images, targets = zip(*next(batches))
        torch.manual_seed(hash((args.seed, step, i, RANK)))         # a resumed run draws the same
        net.require_backward_grad_sync = i + 1 == args.accum        # DDP averages once per step
        with autocast(args):
            loss = program.loss(net, images, targets) / args.accum
        loss.backward()
        total += loss.detach() / WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    torch.nn.utils.clip_grad_norm_(net.parameters(), math.inf, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


def evaluate(program, model, dataset, args):
    """The program's score and its text; each process evaluates its share of the images."""
    if WORLD_SIZE > 1:
        for buffer in model.buffers():                              # BatchNorm's statistics
            dist.broadcast(buffer, 0)
    keys = [(i, i) for i in range(RANK, len(dataset), WORLD_SIZE)]  # an item's seed is its index
    items = DataLoader(dataset, batch_size=None, sampler=keys, num_workers=args.workers)
    with autocast(args):
        return program.evaluate(model.eval(), items, args)


def train(program, model, train_set, val_set, steps, run, args):
    """Go on from where the run stands; evaluate after each epoch or each tenth of args.steps."""
    total = args.total = args.steps or args.epochs * steps
    every = math.ceil(args.steps / 10) or steps
    args.epochs = math.ceil(total / steps)                          # at least
    start = run.get("step", 0)
    log = run.get("log", [])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    if run:
        optimizer.load_state_dict(dict(optimizer.state_dict(), state=run["optimizer"]["state"]))
    say(f"{str(args.output)!a}: {len(train_set)} images, step {start} of {total}")
    net = DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    keys = train_minimal.training_batches(len(train_set), steps, start, args)
    batches = iter(DataLoader(
        train_set, batch_sampler=keys, num_workers=args.workers, collate_fn=list))
    began = time.time()
    for step in range(start, total):
        loss = train_step(program, net, optimizer, batches, step, args)
        done = step + 1
        scored = done % every == 0 or done == total
        if scored or done % 50 == 0:
            seconds = (time.time() - began) / (done - start)
            say(f"step {done}/{total}  loss {loss:.3f}  lr {optimizer.param_groups[0]['lr']:.1e}  "
                f"{seconds:.3f} s per step  {seconds * (total - done) / 60:.0f} min left")
        if scored:
            score, text = evaluate(program, model, val_set, args)
            log.append(dict(step=done, loss=loss, score=score))
            say(f"step {done}  {text}")
        if RANK == 0 and (scored or done % args.save_every == 0):
            config = args.backbone.config
            state = dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), config=config,
                settings=args.settings, classes=train_set.classes, steps=steps, step=done, log=log)
            if scored and score == max(entry["score"] for entry in log):
                save(state, args.output / "best.pt")
            save(dict(model=args.backbone.state_dict(), config=config), args.output / "backbone.pt")
            (args.output / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
            save(state, args.output / "last.pt")                    # last: the run goes on from it


def main(program, argv=None):
    torch.set_float32_matmul_precision("high")                      # TF32
    args, run = parse_args(program, argv)
    if args.predict:
        return predict(program, build_model(program, args, run, run["classes"]), run, args)
    if args.segment and not (args.data or args.init or run):        # first learn what digits are
        import segmentation
        args.init = args.output / "segmentation" / "backbone.pt"
        segmentation.main([
            "--steps", f"{args.segment}", "--output", f"{args.init.parent}", "--model", args.model])
    if WORLD_SIZE > 1:
        dist.init_process_group()
    val_set = load_data(program, args, "val")
    if run.get("classes", val_set.classes) != val_set.classes:
        raise UserError("the run has other classes than the data")
    if args.eval:
        model = build_model(program, args, run, val_set.classes)
        return say(evaluate(program, model, val_set, args)[1])
    train_set = load_data(program, args, "train")
    if train_set.classes != val_set.classes:
        raise UserError("train and val must have the same classes")
    steps = len(train_set) // args.step_size                        # per epoch
    train_minimal.check_run(run, steps, val_set.classes, args)
    torch.manual_seed(args.seed)
    model = build_model(program, args, run, val_set.classes)
    train(program, model, train_set, val_set, steps, run, args)
    show(program, model, val_set, args.output / f"{args.framework}.png")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def open_image(path):
    return v2.pil_to_tensor(load_image(path))                       # (3, H, W) uint8


def draw(program, image, found, classes):
    """What was found, on an image (3, H, W) uint8; small ones enlarged.  A legend has no boxes."""
    labels, texts, masks, boxes = program.describe(found, classes)
    colors = [f"hsv({222 * label % 360}, 70%, 100%)" for label in labels]
    zoom = max(1, min(320 // min(image.shape[1:]), 2000 // max(image.shape[1:])))
    size = [zoom * n for n in image.shape[1:]]
    image = v2.resize(image, size)
    if len(masks):
        masks = v2.resize(masks.float(), size) > 0.5
        image = utils.draw_segmentation_masks(image, masks, 0.5, colors)
    if len(boxes):
        image = utils.draw_bounding_boxes(image, zoom * boxes, colors=colors, width=2)
    picture = v2.to_pil_image(image)
    for i, text in enumerate(texts):
        place = (zoom * boxes[i, :2] + 2).tolist() if len(boxes) else (3, 26 * i)
        pen = ImageDraw.Draw(picture)
        pen.text(place, text, colors[i], font_size=24, stroke_width=2, stroke_fill="black")
    return picture


def predict(program, model, run, args):
    for path in args.predict:
        image = open_image(path)
        found = program.find(model, image)
        for text in program.describe(found, run["classes"])[1]:
            say(f"{path!a}: {text!a}")
        file = pathlib.Path(path).with_suffix(f".{pathlib.Path(program.__file__).stem}.png")
        draw(program, image, found, run["classes"]).save(file)
        say(f"{path!a}: {str(file)!a}")


def show(program, model, dataset, file):
    sheet = Image.new("RGB", (2160, 720), "white")
    for i in range(min(6, len(dataset))):
        image, truth = dataset[i, i]
        for row, found in enumerate((truth, program.find(model, image))):
            picture = draw(program, image, found, dataset.classes)
            sheet.paste(ImageOps.pad(picture, (352, 352), color="white"), (360 * i, 360 * row))
    if RANK == 0:
        sheet.save(file)
    say(f"truth above prediction: {str(file)!a}")


def publish(program):
    return [functools.partial(function, program) for function in (main, load_model, draw)]


def run_program(main):
    try:
        main()
    except (UserError, OSError, ImportError) as error:  # the last line: workers add more
        print(f"{sys.argv[0]}: {str(error).splitlines()[-1]!a}", file=sys.stderr)
        sys.exit(2)
