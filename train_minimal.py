"""Train ScalableViT on a folder of images: one short program for a laptop and for a machine full of GPUs.

    python train_minimal.py                                    draws a small data set, trains `tiny` on it in minutes
    python train_minimal.py --data DIR                         DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg
    torchrun --nproc_per_node=8 train_minimal.py --data DIR --model s          the paper's batch and schedule on 8 GPUs
    python train_minimal.py --output runs/1 --resume           go on with a run; --eval evaluates its best.pt

Each run writes log.jsonl (one object per epoch), last.pt and best.pt into --output.
"""
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

import scalablevit

# What a run is trained with.  A flag of the same name overrides any of these.  S, B and L: the paper, Appendix C.
COMMON = dict(data=None, model="tiny", batch=64, lr=None, weight_decay=0.05, label_smoothing=0.1, clip=5.0, bf16=None,
              seed=0)
PAPER = dict(size=224, epochs=300, warmup_epochs=5, global_batch=1024, base_lr=1e-3, min_scale=0.08)
SETTINGS = {
    "tiny": dict(size=112, epochs=100, warmup_epochs=5, global_batch=64, base_lr=2e-3, min_scale=0.25, drop_path_rate=0.0),
    "s": dict(**PAPER, drop_path_rate=0.2),
    "b": dict(**PAPER, drop_path_rate=0.5),
    "l": dict(**PAPER, drop_path_rate=0.5),
}
DRAWN = dict(size=56, epochs=9, warmup_epochs=1, min_scale=0.5)       # instead, on the data set that is drawn here
RANGES = [("size", 1, 4096), ("epochs", 1, 10 ** 6), ("warmup_epochs", 0, 10 ** 6), ("global_batch", 1, 10 ** 6),
          ("batch", 1, 10 ** 6), ("base_lr", 1e-12, 10), ("lr", 1e-12, 10), ("weight_decay", 0, 10), ("clip", 1e-6, 10 ** 6),
          ("label_smoothing", 0, 0.99), ("drop_path_rate", 0, 0.99), ("min_scale", 1e-4, 1)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)              # of ImageNet, RGB in [0, 1]


# ---------------------------------------------------------------------------- the embedded data set
SHAPES = {  # what is drawn into a 100 x 100 mask, in order: (shape, coordinates, 1 to fill or 0 to cut out)
    "bars": [("rectangle", (x, 18, x + 14, 82), 1) for x in (18, 43, 68)],
    "crescent": [("ellipse", (10, 10, 90, 90), 1), ("ellipse", (32, 10, 112, 90), 0)],
    "cross": [("rectangle", (38, 8, 62, 92), 1), ("rectangle", (8, 38, 92, 62), 1)],
    "disc": [("ellipse", (12, 12, 88, 88), 1)],
    "dots": [("ellipse", (x, y, x + 28, y + 28), 1) for x in (16, 56) for y in (16, 56)],
    "frame": [("rectangle", (18, 18, 82, 82), 1), ("rectangle", (34, 34, 66, 66), 0)],
    "ring": [("ellipse", (10, 10, 90, 90), 1), ("ellipse", (30, 30, 70, 70), 0)],
    "square": [("rectangle", (20, 20, 80, 80), 1)],
    "star": [("polygon", [(50 + r * math.sin(a), 50 - r * math.cos(a)) for a, r in
                          zip(np.arange(10) * math.pi / 5, itertools.cycle((46, 18)))], 1)],
    "triangle": [("polygon", [(50, 6), (90, 74), (10, 74)], 1)],
}


def draw(shape, rng, side=64):
    """A picture of one class: its shape in any place, size, turn and colour, between clutter behind and before it."""
    def colour(low, high):
        return tuple(rng.randrange(low, high) for _ in range(3))

    def clutter(pen, n):
        for _ in range(n):
            x, y = rng.randrange(2 * side), rng.randrange(2 * side)
            w, h = rng.randrange(2, side // 2), rng.randrange(2, side // 2)
            kind = rng.choice(("line", "rectangle", "ellipse"))
            if kind == "line":
                pen.line((x, y, x + 2 * w - h, y + 2 * h - w), colour(0, 128), width=rng.randrange(1, 5))
            else:
                getattr(pen, kind)((x, y, x + w // 2, y + h // 2), colour(0, 128))

    picture = Image.new("RGB", (2 * side, 2 * side), colour(0, 128))      # twice as large: edges come out smooth
    clutter(ImageDraw.Draw(picture), 30)
    mask = Image.new("L", (100, 100))
    for kind, xy, fill in SHAPES[shape]:
        getattr(ImageDraw.Draw(mask), kind)(xy, 255 * fill)
    s = rng.randrange(round(0.9 * side), round(1.35 * side))
    mask = mask.rotate(rng.uniform(-25, 25), Image.BICUBIC).resize((s, s))
    picture.paste(colour(128, 256), (rng.randrange(8, 2 * side - s - 8), rng.randrange(8, 2 * side - s - 8)), mask)
    clutter(ImageDraw.Draw(picture), 3)
    return picture.resize((side, side), Image.BOX)


def draw_data_set(root, train=400, val=100):
    """root/{train,val}/CLASS/*.png, the same pictures every time; root appears when all of them are written."""
    part, rng = root.with_suffix(".part"), random.Random(0)
    for split, n in (("train", train), ("val", val)):
        for shape in SHAPES:
            folder = part / split / shape
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                draw(shape, rng).save(folder / f"{i:03}.png")
    part.rename(root)


# ---------------------------------------------------------------------------- images
def class_names(root):
    """The sorted names of root's folders."""
    names = sorted(d.name for d in root.iterdir() if d.is_dir() and d.name[0] != ".") if root.is_dir() else []
    if not names:
        raise SystemExit(f"{root} must be a folder with one folder of images per class")
    return names


class ImageFolder(Dataset):
    """root/CLASS/image -> (uint8 image (3, size, size), class index); classes in sorted order."""

    def __init__(self, root, classes, transform):
        unknown = set(class_names(root)) - set(classes)
        if unknown:
            raise SystemExit(f"{root} has the class {min(unknown)!r}, not among the {len(classes)} trained ones")
        extensions = Image.registered_extensions()
        self.items = [(path, i) for i, name in enumerate(classes) for path in sorted((root / name).rglob("*"))
                      if path.suffix.lower() in extensions and path.name[0] != "."]
        if not self.items:
            raise SystemExit(f"no images in {root}/CLASS/")
        self.transform = transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        path, label = self.items[index]
        with Image.open(path) as image:
            image = self.transform(image.convert("RGB"))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), label


def random_resized_crop(image, size, min_scale):
    """Training: a share min_scale to 1 of the area, ratio 3/4 to 4/3, resized (bicubic), and flipped half the time."""
    W, H = image.size
    scale, ratio, x, y, flip = torch.rand(5).tolist()
    area = W * H * (min_scale + (1 - min_scale) * scale)
    ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
    w, h = min(W, math.sqrt(area * ratio)), min(H, math.sqrt(area / ratio))
    x, y = x * (W - w), y * (H - h)
    image = image.resize((size, size), Image.BICUBIC, box=(x, y, x + w, y + h))
    return image.transpose(Image.FLIP_LEFT_RIGHT) if flip < 0.5 else image


def resize_and_center_crop(image, size):
    """Evaluation, as in the paper: the shorter side to 256/224 of size (bicubic), then the central size x size."""
    W, H = image.size
    scale = round(size * 256 / 224) / min(W, H)
    W, H = round(W * scale), round(H * scale)
    x, y = (W - size) // 2, (H - size) // 2
    return image.resize((W, H), Image.BICUBIC).crop((x, y, x + size, y + size))


# ---------------------------------------------------------------------------- checkpoints
def write(path, put):
    """put(file) into the file at path, whole or not at all: whoever stops the program here finds the old file."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        put(file)
    os.replace(part, path)


def load(path):
    """A checkpoint of this program, a published one, or a mere state dict; its "model" comes out under our names."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files hold their arguments as well
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise SystemExit(f"cannot load {path}: it is no checkpoint, or holds more than tensors and plain values") from None
    except (OSError, EOFError, RuntimeError) as error:
        raise SystemExit(f"cannot load {path}: {(str(error) or 'it is empty').splitlines()[0]}") from None
    if isinstance(checkpoint, dict) and "model" not in checkpoint:
        checkpoint = {"model": checkpoint}
    weights = isinstance(checkpoint, dict) and checkpoint["model"]
    if not (isinstance(weights, dict) and weights and all(isinstance(w, torch.Tensor) for w in weights.values())):
        raise SystemExit(f"cannot load {path}: it is neither a state dict nor a dictionary with one as its 'model'")
    if "patch_embeds.0.proj.weight" in weights:
        try:
            checkpoint = {"model": scalablevit.convert_official(weights)}
        except ValueError as error:
            raise SystemExit(f"cannot load {path}: {error}") from None
    return checkpoint


def load_weights(model, weights, name, whole):
    """Unless `whole`, a head that does not fit (one for other classes) is left as it was initialised."""
    own = model.state_dict()
    wrong = [key for key in {**own, **weights}
             if key not in own or key not in weights or own[key].shape != weights[key].shape]
    if wrong and (whole or not all(key.startswith("head.") for key in wrong)):
        raise SystemExit(f"the weights do not fit scalablevit_{name} with {model.num_classes} classes (--model, --data): "
                         f"{len(wrong)} parameters differ, {wrong[0]!r} is one")
    if wrong:
        say("the weights have a head for other classes: training a fresh one")
    model.load_state_dict(own | {key: weights[key] for key in weights if key not in wrong})


# ---------------------------------------------------------------------------- training
def say(text):
    """Print, from one process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def lr_factor(step, steps, warmup_steps, lr):
    """Learning rate at a step, over its peak: linearly up from 1e-6, then a cosine down to 1e-5."""
    low, end = min(1e-6 / lr, 1), min(1e-5 / lr, 1)
    if step < warmup_steps:
        return low + (1 - low) * step / warmup_steps
    return end + (1 - end) * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1))) / 2


def to_input(images, device):
    """uint8 images as the network takes them: ImageNet's mean and standard deviation taken out, on the device."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return (images.to(device, non_blocking=True) / 255 - mean) / std


@torch.no_grad()
def evaluate(model, loader, device, bf16):
    """Top-1 accuracy in percent.  Every process counts its own share of the images; the counts are added up."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=device)                                # right, all
    for images, labels in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(to_input(images, device))
        counts += torch.stack([(logits.argmax(1) == labels.to(device)).sum(), torch.tensor(len(labels), device=device)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    return 100 * counts[0].item() / counts[1].item()


def parse_args():
    """-> what to do, the settings to do it with, and the checkpoint to start from (or {})."""
    parser = argparse.ArgumentParser(description="Train ScalableViT on a folder of images.")
    add = parser.add_argument
    add("--output", type=pathlib.Path, metavar="DIR", help="of the run (default: runs/1, or the next free number)")
    add("--resume", action="store_true", help="go on from last.pt in --output")
    add("--eval", action="store_true", help="evaluate --init, or else best.pt in --output, and stop")
    add("--init", type=pathlib.Path, metavar="FILE", help="weights to start from: of this program, or published ones")
    add("--workers", type=int, default=8 if torch.cuda.is_available() else 0,
        help="processes that read images (default: %(default)s; without a GPU none, so that training has the cores)")
    add = parser.add_argument_group("settings (defaults: at the top of this file)").add_argument
    add("--data", type=os.path.abspath, metavar="DIR",          # a run that is resumed elsewhere still finds it
        help="with train/CLASS/ and val/CLASS/ (default: a data set drawn into --output)")
    add("--model", choices=SETTINGS, help="the size of the network")
    add("--size", type=int, help="of the square images, in pixels")
    add("--epochs", type=int, help="times through the training images, in all")
    add("--warmup-epochs", type=float, help="in which the learning rate rises")
    add("--global-batch", type=int, help="images per update, over all processes")
    add("--batch", type=int, help="images at a time in one process, at most; gradients add up to the global batch")
    add("--base-lr", type=float, help="peak learning rate at the default global batch, scaled linearly to another")
    add("--lr", type=float, help="peak learning rate, as it is")
    add("--weight-decay", type=float, help="of AdamW; none on biases, norms and the PEG")
    add("--label-smoothing", type=float, help="share of a label that is spread over all classes")
    add("--clip", type=float, help="largest norm of the gradient")
    add("--drop-path-rate", type=float, help="stochastic depth of the last block")
    add("--min-scale", type=float, help="smallest share of an image's area that a training crop takes")
    add("--bf16", action=argparse.BooleanOptionalAction, help="autocast to bfloat16 (default: on a GPU)")
    add("--seed", type=int, help="of the initialisation, the order of images and their crops")
    args = parser.parse_args()

    if args.workers < 0:
        parser.error(f"--workers must be 0 or more, got {args.workers}")
    if (args.resume or args.eval and not args.init) and not args.output:
        parser.error("--resume and --eval need --output, the folder of a run (or --eval --init FILE)")
    if args.resume and (args.eval or args.init):
        parser.error("--resume goes with neither --eval nor --init")
    if args.resume and not (args.output / "last.pt").exists():
        parser.error(f"{args.output} has no last.pt, since no epoch of that run was finished: start again without --resume")
    if args.output and not (args.resume or args.eval) and (args.output / "last.pt").exists():
        parser.error(f"{args.output} holds a run: --resume goes on with it; or choose another --output")
    start = args.output / "last.pt" if args.resume else args.init or args.eval and args.output / "best.pt"
    checkpoint = load(start) if start else {}

    # A flag, else what the checkpoint was trained with, else the default.  Mere starting weights tell their model only.
    saved = checkpoint.get("settings", {})
    if not (args.resume or args.eval):
        saved = {name: value for name, value in saved.items() if name == "model"}
    given = {name: getattr(args, name) for name in {**COMMON, **SETTINGS["s"]} if getattr(args, name) is not None}
    settings = {**COMMON, **saved, **given}
    settings = argparse.Namespace(**{**SETTINGS[settings["model"]], **({} if settings["data"] else DRAWN), **settings})
    if args.eval and not (settings.data or args.output):
        parser.error("--eval --init FILE needs --data")
    for name, low, high in RANGES:
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be between {low} and {high}, got {value}")
    return args, settings, checkpoint


def main():
    args, settings, checkpoint = parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))     # set by torchrun
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        run(args, settings, checkpoint, world, rank, device)
    except KeyboardInterrupt:
        raise SystemExit("stopped; --resume goes on from the last epoch that was finished") from None
    if world > 1:
        dist.destroy_process_group()


def run(args, settings, checkpoint, world, rank, device):
    # Folders.  The first process makes them, and the others learn of it.
    output = [args.output or next(p for n in itertools.count(1) if not (p := pathlib.Path(f"runs/{n}")).exists())]
    if world > 1:
        dist.broadcast_object_list(output)
    output = output[0]
    data = pathlib.Path(settings.data or output / "shapes")
    if rank == 0 and not settings.data and not data.exists():
        say(f"drawing a data set of {len(SHAPES)} classes into {data}")
        draw_data_set(data)
    if world > 1:
        dist.barrier()

    # Images
    cuda = device.type == "cuda"
    bf16 = cuda if settings.bf16 is None else settings.bf16
    classes = class_names(data / ("val" if args.eval else "train"))
    if args.resume or args.eval:
        classes = checkpoint.get("classes", classes)
    val_set = ImageFolder(data / "val", classes, functools.partial(resize_and_center_crop, size=settings.size))
    load_data = functools.partial(DataLoader, num_workers=args.workers, pin_memory=cuda)
    val_loader = load_data(Subset(val_set, range(rank, len(val_set), world)), batch_size=settings.batch)

    # Model
    torch.manual_seed(settings.seed)
    weights = checkpoint.get("model", {})
    plain_head = {"head_hidden": None} if "head.weight" in weights else {}      # the published models come with either
    model = getattr(scalablevit, f"scalablevit_{settings.model}")(
        num_classes=len(classes), drop_path_rate=settings.drop_path_rate, **plain_head)
    if checkpoint:
        load_weights(model, weights, settings.model, whole=args.eval or args.resume)
    model = model.to(device, memory_format=torch.channels_last)
    if args.eval:
        say(f"val top-1 {evaluate(model, val_loader, device, bf16):.2f} % of {len(val_set)} images")
        return

    train_set = ImageFolder(data / "train", classes, functools.partial(
        random_resized_crop, size=settings.size, min_scale=settings.min_scale))
    empty = set(range(len(classes))) - {label for _, label in train_set.items}
    if empty:
        raise SystemExit(f"{data / 'train' / classes[min(empty)]} has no images")
    global_batch = min(settings.global_batch, len(train_set))
    accumulate = math.ceil(global_batch / (world * settings.batch))             # backward passes per update
    batch = max(global_batch // (world * accumulate), 1)                        # images in each of them
    global_batch = batch * accumulate * world
    sampler = DistributedSampler(train_set, world, rank, seed=settings.seed)
    train_loader = load_data(train_set, batch_size=batch, sampler=sampler, drop_last=True)
    steps = len(train_loader) // accumulate                                     # updates per epoch

    # Optimisation
    exempt = model.no_weight_decay()
    groups = [{"params": [p for name, p in model.named_parameters() if name not in exempt]},
              {"params": [p for name, p in model.named_parameters() if name in exempt], "weight_decay": 0.0}]
    lr = settings.lr if settings.lr is not None else settings.base_lr * global_batch / SETTINGS[settings.model]["global_batch"]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=settings.weight_decay, fused=True)
    log, first = [], 0                                                          # one dictionary per epoch
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        log = checkpoint["log"]
        first = len(log)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = lr
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(
        lr_factor, steps=settings.epochs * steps, warmup_steps=settings.warmup_epochs * steps, lr=lr), first * steps - 1)
    net = DistributedDataParallel(model) if world > 1 else model

    say(f"scalablevit_{settings.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {len(classes)} classes, "
        f"{len(train_set)} training and {len(val_set)} validation images at {settings.size}x{settings.size}\n"
        f"{world} process(es) on {device.type}, {'bfloat16 autocast' if bf16 else 'float32'}, {steps} updates per epoch of "
        f"{global_batch} = {world} x {accumulate} x {batch} images, peak learning rate {lr:.2g}, writing to {output}")
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
    if first >= settings.epochs:
        say(f"all {settings.epochs} epochs are done: --epochs takes a larger number")
    began = printed = time.time()
    for epoch in range(first, settings.epochs):
        torch.manual_seed(settings.seed + epoch * world + rank)                 # a resumed run draws what this one would
        sampler.set_epoch(epoch)
        net.train()
        total_loss, epoch_began = torch.zeros((), device=device), time.time()
        for i, (images, labels) in enumerate(itertools.islice(train_loader, steps * accumulate), start=1):
            update = i % accumulate == 0
            with contextlib.nullcontext() if update or world == 1 else net.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = net(to_input(images, device))
                    loss = F.cross_entropy(logits, labels.to(device), label_smoothing=settings.label_smoothing)
                (loss / accumulate).backward()
            total_loss += loss.detach()
            if update:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            now = time.time()
            if now - printed > 2 or i == steps * accumulate:
                printed = now
                done = (epoch - first) * steps + i / accumulate
                left = (now - began) / done * ((settings.epochs - first) * steps - done)
                say(f"epoch {epoch + 1}/{settings.epochs}  step {i // accumulate}/{steps}  loss {total_loss.item() / i:.3f}  "
                    f"{i * batch * world / (now - epoch_began):.0f} img/s  {left // 60:.0f}:{left % 60:02.0f} left")
        if world > 1:
            dist.all_reduce(total_loss)
        top1 = evaluate(model, val_loader, device, bf16)
        log.append({"epoch": epoch + 1, "loss": total_loss.item() / (steps * accumulate * world), "top1": top1,
                    "lr": schedule.get_last_lr()[0], "seconds": time.time() - epoch_began})
        best = max(log, key=lambda entry: entry["top1"])                        # the earliest of equals
        say(f"epoch {epoch + 1}/{settings.epochs}  val top-1 {top1:.2f} %  (best {best['top1']:.2f} %)")
        if rank == 0:
            checkpoint = {"model": model.state_dict(), "settings": vars(settings), "classes": classes, "log": log}
            if best is log[-1]:
                write(output / "best.pt", functools.partial(torch.save, checkpoint))
            write(output / "last.pt", functools.partial(torch.save, {**checkpoint, "optimizer": optimizer.state_dict()}))
            lines = "".join(json.dumps(entry) + "\n" for entry in log)
            write(output / "log.jsonl", lambda file: file.write(lines.encode()))


if __name__ == "__main__":
    main()
