"""Train ScalableViT on a folder of images: one program for a laptop, a GPU, and several machines full of them.

    python train_minimal.py                                    tiny, on shapes that are drawn here: minutes
    python train_minimal.py --data DIR                         tiny, on DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg
    torchrun --nproc_per_node=8 train_minimal.py --data DIR --model s         the paper's run: 8 x 128 images a step
    python train_minimal.py --data DIR --model s --accum 8     the same steps on one GPU: 8 x 128 images each
    python train_minimal.py --output runs/s --eval             top-1 and top-5 of the best epoch

A run lives in --output: last.pt (every --save-every steps), best.pt and log.jsonl (every epoch).  The same command goes
on with a run that was stopped; --resume goes on with it under other settings, such as more epochs.
"""
import argparse
import contextlib
import fcntl
import json
import math
import os
import pathlib
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.nn        # DDP imports it late, and its defaults then hold the group: gloo's threads never end
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import write_png
from torchvision.transforms import InterpolationMode, v2

import scalablevit

SETTINGS = {  # for s, b and l, from the paper's Appendix C; RandAugment is of DeiT, whose recipe the paper follows
    "size": (224, "side of the square images, in pixels"),
    "epochs": (300, "times through as many images as there are"),
    "warmup_epochs": (5.0, "epochs in which the learning rate rises"),
    "batch_size": (128, "images in one forward pass of one process"),
    "accum": (1, "forward passes per step in each process, whose gradients are added up"),
    "lr": (1e-3, "peak learning rate for 1024 images a step, scaled linearly with their number"),
    "weight_decay": (0.05, "of AdamW; none on biases, norms and the PEG"),
    "clip_grad": (5.0, "largest norm of the gradient"),
    "drop_path_rate": (0.2, "stochastic depth of the last block; 0.5 for b and l"),
    "label_smoothing": (0.1, "share of a label that is spread over all classes"),
    "mixup": (0.8, "alpha of MixUp, 0 for none"),
    "cutmix": (1.0, "alpha of CutMix, 0 for none; with both, each step takes one of them, 50/50"),
    "reprob": (0.25, "share of the images that lose a rectangle to random erasing"),
    "randaugment": (2, "operations of RandAugment per image, each done half the time"),
    "min_scale": (0.08, "smallest share of an image's area in a training crop"),
    "aug_repeats": (3, "repeated augmentation: how often an epoch takes each of its images"),
    "seed": (0, "of everything that is drawn at random"),
}
TINY = dict(size=112, epochs=100, batch_size=64, lr=0.032, drop_path_rate=0.0, mixup=0.0, cutmix=0.0, reprob=0.0,
            randaugment=0, min_scale=0.25, aug_repeats=1)
TINY_ON_SHAPES = dict(TINY, size=56, epochs=10, warmup_epochs=1.0, min_scale=0.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)            # of ImageNet, RGB in [0, 1]
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))       # set by torchrun
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")


def make_parser():
    parser = argparse.ArgumentParser(usage="%(prog)s [--data DIR] [--model tiny|s|b|l] [options]", description=__doc__,
                                     epilog=f"For tiny: {TINY}\nWithout --data: {TINY_ON_SHAPES}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=os.path.abspath, metavar="DIR", help="with train/CLASS/ and val/CLASS/ (default: drawn shapes)")
    add("--model", choices=("tiny", "s", "b", "l"), help="the size of the network (default: tiny)")
    add("--output", type=pathlib.Path, metavar="DIR", help="of the run (default: runs/MODEL)")
    add("--init", type=os.path.abspath, metavar="FILE", help="weights to start from: of this program, or published ones")
    add("--resume", action="store_true", help="go on with the run in --output, under the settings given here")
    add("--eval", action="store_true", help="evaluate --init, or else best.pt in --output, and stop")
    add("--workers", type=int, default=8 if CUDA else 0, metavar="N", help="reading images for each training process")
    add("--save-every", type=int, default=1000, metavar="N", help="steps between two saves of last.pt (1000)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="autocast to bfloat16 (default: on a GPU)")
    add("--fuse", action="store_true", help="run the fused kernels of scalablevit_kernels")
    for name, (default, text) in SETTINGS.items():
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, metavar="N", help=f"{text} ({default})")
    return parser


def fail(message):
    """One line for a mistake that the user can mend."""
    print(f"train_minimal.py: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------- data
SHAPES = {  # which points they hold, for x and y from -1 to 1
    "bars": lambda x, y: (x.abs() < 0.7) & (y.abs() < 0.65) & ((4 * math.pi * x).cos() > 0),
    "crescent": lambda x, y: (x.hypot(y) < 0.8) & ((x - 0.4).hypot(y) > 0.75),
    "cross": lambda x, y: (torch.minimum(x.abs(), y.abs()) < 0.2) & (torch.maximum(x.abs(), y.abs()) < 0.8),
    "disc": lambda x, y: x.hypot(y) < 0.75,
    "dots": lambda x, y: (x.abs() - 0.4).hypot(y.abs() - 0.4) < 0.28,
    "frame": lambda x, y: (torch.maximum(x.abs(), y.abs()) - 0.5).abs() < 0.15,
    "ring": lambda x, y: (x.hypot(y) - 0.6).abs() < 0.2,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) < 0.62,
    "star": lambda x, y: x.hypot(y) < 0.55 + 0.3 * (5 * torch.atan2(x, -y)).cos(),
    "triangle": lambda x, y: (y < 0.5) & (1.8 * x.abs() < y + 0.85),
}


def draw_data_set(root, train=400, val=100, side=64):
    """root/{train,val}/CLASS/*.png: a shape in any place, size, turn and color, between rectangles behind and before it."""
    part, generator = root.with_suffix(".part"), torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, side)], indexing="ij")                  # (side, side)
    for folder, inside, n in [(part / split / name, SHAPES[name], n) for split, n in (("train", train), ("val", val))
                              for name in SHAPES]:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            image = torch.zeros(3, side, side)
            for layer in range(20):
                a, b, c, d, turn = torch.empty(5).uniform_(-1, 1, generator=generator).tolist()
                where, light = ((x - a).abs() < c / 3) & ((y - b).abs() < d / 3), 0
                if layer == 16:
                    u, v, scale = x - 0.35 * a, y - 0.35 * b, 0.575 + 0.125 * c
                    cos, sin, light = math.cos(turn / 2) / scale, math.sin(turn / 2) / scale, 128
                    where = inside(cos * u + sin * v, cos * v - sin * u)
                image = torch.where(where, light + 128 * torch.rand(3, 1, 1, generator=generator), image)
            write_png(image.to(torch.uint8), str(folder / f"{i:03}.png"))
    part.rename(root)                                               # only now that all of them are there


def read_image(path, size):
    """An upright RGB image.  A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves each side 3 x size or more."""
    if not os.path.isfile(path):                                    # opening a FIFO would wait for ever
        raise OSError("not a regular file")
    with Image.open(path) as image:
        image.draft("RGB", (3 * size, 3 * size))
        image.load()
        with contextlib.suppress(Exception):                        # EXIF may be damaged where the pixels are whole
            ImageOps.exif_transpose(image, in_place=True)
        return image if image.mode == "RGB" else image.convert("RGB")


class ImageFolder(Dataset):
    """The images in root/CLASS/ and in its folders, but not in folders that are links, which may lead back.

    The item of a key (index, seed) is (image (3, size, size) uint8, mask (1, size, size) uint8, 0 where it is erased,
    label, error).  In training, an image that cannot be read has another in its place, and error tells which it was.
    """

    def __init__(self, root, args, train):
        self.train, self.size, bicubic, bilinear = train, args.size, InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
        # v2 lacks DeiT's invert, solarize-add and noise on the magnitude, and its posterize is milder.
        operation = v2.RandAugment(1, magnitude=9, num_magnitude_bins=11, interpolation=bilinear, fill=(124, 116, 104))
        crop = [v2.RandomResizedCrop(args.size, (args.min_scale, 1), interpolation=bicubic), v2.RandomHorizontalFlip(),
                *args.randaugment * [v2.RandomApply([operation], p=0.5)]] if train else [
                v2.Resize(round(args.size * 256 / 224), bicubic), v2.CenterCrop(args.size)]
        self.transform = v2.Compose([*crop, v2.PILToTensor()])
        self.erase = v2.RandomErasing(args.reprob if train else 0, value=0)
        self.classes = sorted(d.name for d in os.scandir(root) if d.is_dir() and not d.name.startswith("."))
        self.samples = [(os.path.join(folder, file), label) for label, name in enumerate(self.classes)
                        for folder, _, files in sorted(os.walk(os.path.join(root, name))) for file in sorted(files)
                        if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith(".")]
        if len({label for _, label in self.samples}) < max(len(self.classes), 1):
            fail(f"{root} must have a folder for each class, with images in it")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        index, seed = key if self.train else (key, 0)
        torch.default_generator.manual_seed(seed)                   # the same image, whichever process reads it
        error = ""
        for _ in range(100 if self.train else 1):
            path, label = self.samples[index]
            try:
                image = read_image(path, self.size)
            except Exception as reason:                             # Pillow's decoders raise almost anything
                error = error or f"{path} ({reason})"
                index = int(torch.randint(len(self), ()))
                continue
            return self.transform(image), self.erase(torch.ones(1, self.size, self.size, dtype=torch.uint8)), label, error
        raise OSError(f"cannot read {error}")


def training_batches(n, args, first, last):
    """The keys of this process's images, batch by batch, from step `first` to `last`.

    Repeated augmentation: an epoch shuffles the n images, puts each aug_repeats times in a row, and takes n of these.
    A step deals them out one by one: copies go to different processes, and images half a batch apart (see `mix`) lie
    half a step apart, however many processes and batches share the step.
    """
    b, accum = args.batch_size, args.accum
    for step in range(first, last):
        epoch, i = divmod(step, n // (WORLD_SIZE * accum * b))
        if step == first or i == 0:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(hash((args.seed, epoch))))
        for a in range(accum):
            positions = ((i * b + torch.arange(b)) * accum + a) * WORLD_SIZE + RANK           # in the epoch
            indices = order[positions // args.aug_repeats]
            yield [(j, hash((args.seed, epoch, p))) for j, p in zip(indices.tolist(), positions.tolist())]


def ignore_signals(worker):
    for number in (signal.SIGINT, signal.SIGTERM):                  # the process that trains ends those that read for it
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------- a batch, on the device
normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def mix(images, targets, args):
    """MixUp or CutMix of images (B, 3, H, W) and targets (B, classes): each with the one half a batch on.

    v2 mixes a batch with its roll by one, where repeated augmentation puts copies.  Its "batch" here has two halves.
    """
    mixing = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha > 0]
    if not mixing:
        return images, targets
    halves = images.view(2, -1, *images.shape[2:]), targets.view(2, -1)            # (2, B/2 * 3, H, W), (2, B/2 * classes)
    return [mixed.view_as(own) for mixed, own in zip(v2.RandomChoice(mixing)(*halves), (images, targets))]


def all_sum(*values):
    """Each value, summed over the processes."""
    values = torch.tensor(values, dtype=torch.float64, device=DEVICE)
    if WORLD_SIZE > 1:
        dist.all_reduce(values)
    return values.tolist()


@torch.no_grad()
def evaluate(model, loader, bf16, signals=()):
    """Top-1 and top-5 accuracy in percent, over all processes; None if a signal came."""
    model.eval()
    right1, right5 = 0, 0
    for images, _, labels, _ in loader:                             # (B, 3, size, size), ..., (B,)
        if signals:
            break
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            logits = model(normalize(images.to(DEVICE, non_blocking=True)))
        right = logits.topk(min(5, logits.shape[1])).indices == labels.to(DEVICE)[:, None]    # (B, 5)
        right1, right5 = right1 + right[:, 0].sum(), right5 + right.sum()
    *right, stop = all_sum(right1, right5, len(signals))
    return None if stop else [100 * count / len(loader.dataset) for count in right]


def learning_rate(step, last, warmup, peak):
    """Linearly up from 1e-6, then a cosine down to 1e-5."""
    low, end = min(1e-6, peak), min(1e-5, peak)
    if step < warmup:
        return low + (peak - low) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / max(last - warmup, 1))) / 2


# ---------------------------------------------------------------------------- checkpoints
def write_whole(path, write):
    """A kill at any moment leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load_checkpoint(path):
    """A checkpoint of this program or a published one, or a mere state dict -> "model", "config", "settings" and more."""
    with torch.serialization.safe_globals([argparse.Namespace]):    # published files hold their arguments
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    weights = checkpoint.get("model", checkpoint)
    if "patch_embeds.0.proj.weight" in weights:
        checkpoint = {"config": scalablevit.official_kwargs(weights)}
        weights = scalablevit.convert_official(weights)
    classes = len(weights["head.bias" if "head.bias" in weights else "head.3.bias"])
    return {"settings": {}, **checkpoint, "model": weights, "config": {"num_classes": classes, **checkpoint.get("config", {})}}


# ---------------------------------------------------------------------------- the run
def main():
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")                          # the first process speaks
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)         # for names that it cannot encode
    parser = make_parser()
    args = parser.parse_args()
    output = args.output or pathlib.Path("runs", args.model or "tiny")
    last_pt, best_pt = output / "last.pt", output / "best.pt"
    if args.resume and (args.eval or args.init or not last_pt.exists()):
        fail(f"--resume goes on with {last_pt}, which must be there, and goes with neither --eval nor --init")
    if CUDA:
        torch.cuda.set_device(DEVICE)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if CUDA else "gloo")
    if RANK == 0 and not args.eval:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)        # not inherited by the processes that read images
        except BlockingIOError:
            fail(f"another process is writing to {output}")
    all_sum(0)                                                      # the others wait for the lock

    # Settings: the flags; else, with --resume and --eval, those of the checkpoint; else the defaults
    going_on = last_pt.exists() and not args.eval
    start = last_pt if going_on else args.init or (best_pt if args.eval else None)
    try:
        checkpoint = load_checkpoint(start) if start else {"settings": {}}
        saved = checkpoint["settings"]
        kept = saved if args.resume or args.eval else {}
        model_name = args.model or saved.get("model", "tiny")
        if saved.get("model", model_name) != model_name:
            raise ValueError(f"it is of {saved['model']!r}, not of --model {model_name}")
    except Exception as error:
        fail(f"cannot load {start}: {' '.join(str(error).split())[:200]}")
    parser.set_defaults(model=model_name, drop_path_rate=0.2 if model_name == "s" else 0.5)
    if model_name == "tiny":
        parser.set_defaults(**TINY if args.data or kept.get("data") else TINY_ON_SHAPES)
    parser.set_defaults(**kept)
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("data", "model", "init", "bf16", *SETTINGS)}
    if going_on and not args.resume and settings != saved:
        fail(f"{output} holds a run with other settings: --resume goes on with it, or choose another --output")

    # Data
    data = pathlib.Path(args.data or output / "shapes")
    if RANK == 0 and not args.data and not data.exists():
        print(f"drawing {data}")
        draw_data_set(data)
    all_sum(0)
    val_set = ImageFolder(data / "val", args, train=False)
    train_set = val_set if args.eval else ImageFolder(data / "train", args, train=True)
    classes, batch = train_set.classes, WORLD_SIZE * args.accum * args.batch_size             # images of a step
    steps, extent = len(train_set) // batch, [len(train_set), batch]                          # steps of an epoch
    if classes != val_set.classes:
        fail(f"{data} has different classes in train and val")
    if steps == 0 and not args.eval:
        fail(f"a step takes {batch} images, and there are {len(train_set)}: lower --batch-size or --accum")
    loading = dict(num_workers=args.workers, pin_memory=CUDA, worker_init_fn=ignore_signals)
    val_loader = DataLoader(val_set, args.batch_size, sampler=range(RANK, len(val_set), WORLD_SIZE), **loading)

    # Model and optimizer, and what a checkpoint says of them
    torch.manual_seed(args.seed)
    step, loss_sum, log, unreadable = 0, 0.0, [], []                # loss_sum: of this epoch; log: one entry per epoch
    try:
        config = {"num_classes": len(classes), **checkpoint.get("config", {}), "drop_path_rate": args.drop_path_rate}
        model = getattr(scalablevit, f"scalablevit_{args.model}")(**config)
        if start:
            model.load_state_dict(checkpoint["model"])
        if checkpoint.get("classes", classes) != classes or model.num_classes != len(classes):
            if going_on or args.eval:
                raise ValueError(f"its classes are not those of {data}")
            print(f"{start} is of other classes: training a fresh head")
            model.reset_classifier(len(classes))
        if args.fuse:
            from scalablevit_kernels import fuse
            model = fuse(model)
        model, exempt = model.to(DEVICE), model.no_weight_decay()
        groups = [{"params": [p for name, p in model.named_parameters() if name not in exempt]},
                  {"params": [p for name, p in model.named_parameters() if name in exempt], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
        if going_on:
            step, loss_sum, log, unreadable = (checkpoint[name] for name in ("step", "loss_sum", "log", "unreadable"))
            if checkpoint["extent"] != extent:
                raise ValueError("it has {} images, {} in a step, not {} and {}".format(*checkpoint["extent"], *extent))
            for i, p in enumerate(p for group in groups for p in group["params"]):
                moments = checkpoint["optimizer"]["state"][i]       # the settings stay those given
                moments = {name: torch.zeros_like(p).copy_(moments[name].view(p.shape)) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.tensor(float(step), device=DEVICE), **moments}
    except Exception as error:
        fail(f"{start or args.model} does not fit: {' '.join(str(error).split())[:200]}")
    bf16 = CUDA if args.bf16 is None else args.bf16
    if args.eval:
        print("top-1 {:.2f} %, top-5 {:.2f} % of {} images".format(*evaluate(model, val_loader, bf16), len(val_set)))
        return

    net = DistributedDataParallel(model) if WORLD_SIZE > 1 else model

    def save(best):
        if RANK == 0:                   # last.pt comes last: a run that goes on writes the others again from what it says
            state = {"model": model.state_dict(), "config": model.config, "settings": settings, "classes": classes, "log": log}
            if best:
                write_whole(best_pt, lambda file: torch.save(state, file))
            lines = "".join(json.dumps(entry) + "\n" for entry in log)
            write_whole(output / "log.jsonl", lambda file: file.write(lines.encode()))
            state |= dict(optimizer=optimizer.state_dict(), step=step, loss_sum=loss_sum, unreadable=unreadable, extent=extent)
            write_whole(last_pt, lambda file: torch.save(state, file))

    signals, last, peak = [], args.epochs * steps, args.lr * batch / 1024
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    batches = iter(DataLoader(train_set, batch_sampler=training_batches(len(train_set), args, step, last), **loading))
    print(f"scalablevit_{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters; {len(train_set)} images of "
          f"{len(classes)} classes; {WORLD_SIZE} x {args.accum} x {args.batch_size} images a step on {DEVICE.type}; {output}")
    first, began, printed, stop = step, time.time(), 0.0, 0
    while True:
        if step // steps > len(log):                                # an epoch is complete, and last.pt holds it
            accuracy = evaluate(model, val_loader, bf16, signals)
            if accuracy is None:
                stop = 1
            else:
                log.append({"epoch": len(log) + 1, "loss": loss_sum / steps, "top1": accuracy[0], "top5": accuracy[1],
                            "lr": optimizer.param_groups[0]["lr"], "unreadable": len(unreadable)})
                print("epoch {epoch}  loss {loss:.3f}  top-1 {top1:.2f} %  top-5 {top5:.2f} %".format(**log[-1]))
                loss_sum = 0.0
                save(best=max(log, key=lambda entry: entry["top1"]) is log[-1])
        if stop or step >= last:
            break
        net.train()
        loss, found = 0.0, set()
        for a in range(args.accum):
            images, masks, labels, errors = next(batches)           # (B, 3, size, size), (B, 1, size, size), (B,)
            found.update(error for error in errors if error and error not in unreadable)
            images, masks, labels = (t.to(DEVICE, non_blocking=True) for t in (images, masks, labels))
            torch.manual_seed(hash((args.seed, -1, step)))          # only now: without workers, this process draws images
            images, targets = normalize(images), F.one_hot(labels, len(classes)).float()
            if args.reprob > 0:
                images = torch.where(masks > 0, images, torch.randn(images.shape[1:], device=DEVICE))
            images, targets = mix(images, targets, args)
            torch.manual_seed(hash((args.seed, -2, step, a, RANK)))                # stochastic depth: each process its own
            net.require_backward_grad_sync = a + 1 == args.accum    # DDP exchanges gradients in the last backward pass
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                micro = F.cross_entropy(net(images), targets, label_smoothing=args.label_smoothing) / args.accum
            micro.backward()
            loss += micro.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, last, args.warmup_epochs * steps, peak)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        loss, norm, stop, new = all_sum(loss / WORLD_SIZE, norm / WORLD_SIZE, len(signals), len(found))
        if not math.isfinite(loss + norm):
            fail(f"the loss is {loss} and its gradient's norm {norm} in step {step}: a lower --lr may help; {last_pt} is as before")
        loss_sum += loss
        if new:
            everyone = [found] * WORLD_SIZE
            if WORLD_SIZE > 1:
                dist.all_gather_object(everyone, found)
            for error in sorted(set().union(*everyone)):
                print(f"cannot read {error}: another image takes its place")
                unreadable.append(error)
        if time.time() - printed > 10 or step % steps == 0:
            printed, rate = time.time(), (step - first) / (time.time() - began)
            print(f"step {step}/{last}  loss {loss:.3f}  {batch * rate:.0f} images/s  {(last - step) / rate / 60:.1f} min left")
        if stop or step % args.save_every == 0 or step % steps == 0:
            save(best=False)
    if stop:
        print(f"stopped by a signal after step {step} of {last}, which is saved: the same command goes on from there")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])            # it may have come to another process
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:                                        # from a process that reads images: its last line
        fail(str(error).splitlines()[-1])
