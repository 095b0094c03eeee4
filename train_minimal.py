"""Train ScalableViT on a folder of images: one program for a laptop, a machine full of GPUs, and several of them.

    python train_minimal.py                                    draws a small data set, trains `tiny` on it in minutes
    python train_minimal.py --data DIR                         DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg
    torchrun --nproc_per_node=8 train_minimal.py --data DIR --model s          the paper's run: 8 x 128 images a step
    python train_minimal.py --data DIR --model s --accum 8     its steps on one GPU: 1 x 8 x 128 images each
    python train_minimal.py --output runs/1 --resume           go on with a run; --eval evaluates its best.pt

A run writes into --output: last.pt every --save-every steps, and with each epoch log.jsonl (a line each) and best.pt.
"""
import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pathlib
import random
import shlex
import shutil
import signal
import socket
import sys
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn        # by DDP it is imported too late: its defaults then hold the group, threads and all
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import scalablevit

# What a run is trained with; each is a flag.  S, B and L: the paper's Appendix C and DeiT's settings, which it follows.
SETTINGS = {  # for s, b and l; for tiny; for tiny on the data set drawn here; smallest, largest
    "size": (224, 112, 56, 1, 4096, "side of the square images, in pixels"),
    "epochs": (300, 100, 10, 1, 10 ** 6, "times through as many images as there are"),
    "warmup_epochs": (5.0, 5.0, 1.0, 0, 10 ** 6, "in which the learning rate rises"),
    "batch_size": (128, 64, 64, 1, 10 ** 6, "images at a time in one process"),
    "accum": (1, 1, 1, 1, 10 ** 6, "batches in each process whose gradients make one step"),
    "lr": (1e-3, 32e-3, 32e-3, 1e-12, 1e6, "peak learning rate for 1024 images a step, scaled linearly with them"),
    "weight_decay": (0.05, 0.05, 0.05, 0, 10, "of AdamW; none on biases, norms and the PEG"),
    "clip_grad": (5.0, 5.0, 5.0, 1e-6, 1e6, "largest norm of the gradient"),
    "drop_path_rate": (0.2, 0.0, 0.0, 0, 0.99, "stochastic depth of the last block; of b and l 0.5"),
    "label_smoothing": (0.1, 0.1, 0.1, 0, 0.99, "share of a label that is spread over all classes"),
    "mixup": (0.8, 0.0, 0.0, 0, 100, "alpha of mixup, 0 for none"),
    "cutmix": (1.0, 0.0, 0.0, 0, 100, "alpha of CutMix, 0 for none; with both, a coin chooses for each step"),
    "reprob": (0.25, 0.0, 0.0, 0, 1, "share of images that lose a rectangle to random erasing"),
    "randaugment": (2, 0, 0, 0, 100, "operations that RandAugment draws for an image"),
    "min_scale": (0.08, 0.25, 0.5, 1e-4, 1, "smallest share of an image's area that a training crop takes"),
    "aug_repeats": (3, 1, 1, 1, 100, "repeated augmentation: how often an epoch takes each of its images"),
    "save_every": (1000, 1000, 1000, 1, 10 ** 9, "steps between two saves of last.pt; each epoch ends with one"),
    "seed": (0, 0, 0, 0, 2 ** 31, "of the initialisation and of all that is drawn at random"),
}
MODELS = {"tiny": {}, "s": {}, "b": {"drop_path_rate": 0.5}, "l": {"drop_path_rate": 0.5}}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)              # of ImageNet, RGB in [0, 1]
WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))              # set by torchrun
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
warnings.simplefilter("error", Image.DecompressionBombWarning)        # Pillow refuses only twice its limit by itself


class Mistake(Exception):
    """What a person can mend: told in one sentence, exit status 2."""


def draws(*place):
    """Random numbers for one place in a run, such as (seed, epoch, position): the same whatever was drawn elsewhere."""
    return random.Random(repr(place))


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


# ---------------------------------------------------------------------------- one image
UPRIGHT = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
           6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}      # by EXIF's orientation


def read(path, size, crop):
    """The part of an image that crop(W, H) -> (x, y, w, h) wants, resized (bicubic): upright, RGB, size x size.

    Raises whatever Pillow does for a file that is no whole image, or has more than Image.MAX_IMAGE_PIXELS.
    """
    with Image.open(path) as image:
        if image.format not in ("JPEG", "MPO"):
            image.load()                                              # a TIFF turns itself here
        orientation = image.getexif().get(0x0112)
        W, H = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        x, y, w, h = crop(W, H)
        # At 1/2, 1/4 or 1/8 a JPEG is decoded much faster: taken where the crop keeps twice the pixels wanted.
        spare = max(min(w, h) / (2 * size), 1)
        image.draft(None, [math.ceil(side / spare) for side in image.size])
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of no known range")
        if image.mode.startswith("I"):                                # 16 bits of grey, which convert would clip
            grey = np.asarray(image)
            if grey.min() < 0 or grey.max() > 65535:
                raise ValueError("its grey values are not within 16 bits")
            image = Image.fromarray((grey // 256).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image.load()
    if image.mode != "RGB":
        image = image.convert("RGB")
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    fx, fy = image.width / W, image.height / H                        # what draft has left
    return image.resize((size, size), Image.BICUBIC, box=(x * fx, y * fy, (x + w) * fx, (y + h) * fy))


def random_crop(W, H, min_scale, rng):
    """Training: a share min_scale to 1 of the area, ratio 3/4 to 4/3, anywhere in the image."""
    area, ratio = W * H * rng.uniform(min_scale, 1), (4 / 3) ** rng.uniform(-1, 1)
    w, h = min(W, math.sqrt(area * ratio)), min(H, math.sqrt(area / ratio))
    return rng.random() * (W - w), rng.random() * (H - h), w, h


def center_crop(W, H, size):
    """Evaluation, as in the paper: the shorter side resized to 256/224 of size, then the central size x size."""
    scale = round(size * 256 / 224) / min(W, H)
    resized = round(W * scale), round(H * scale)
    fx, fy = W / resized[0], H / resized[1]                           # only the pixels of the crop are ever resized
    return (resized[0] - size) // 2 * fx, (resized[1] - size) // 2 * fy, size * fx, size * fy


def affine(image, *coefficients):
    """Bilinear where DeiT is bicubic, which takes three times as long; a shift by whole pixels needs neither."""
    method = Image.NEAREST if coefficients[1] == coefficients[3] == 0 else Image.BILINEAR
    return image.transform(image.size, Image.AFFINE, coefficients, method, fillcolor=GREY)


GREY = tuple(round(255 * mean) for mean in MEAN)
RANDAUGMENT = [  # DeiT's operations, magnitude m in [0, 1], sign s; where there are degrees, a larger m does more
    lambda image, m, s: ImageOps.autocontrast(image),
    lambda image, m, s: ImageOps.equalize(image),
    lambda image, m, s: ImageOps.invert(image),
    lambda image, m, s: image.rotate(30 * m * s, Image.BILINEAR, fillcolor=GREY),
    lambda image, m, s: ImageOps.posterize(image, max(4 - int(4 * m), 1)),
    lambda image, m, s: ImageOps.solarize(image, 256 - int(256 * m)),
    lambda image, m, s: image.point([min(v + int(110 * m), 255) if v < 128 else v for v in range(256)] * 3),
    lambda image, m, s: ImageEnhance.Color(image).enhance(1 + 0.9 * m * s),
    lambda image, m, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * m * s),
    lambda image, m, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * m * s),
    lambda image, m, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * m * s),
    lambda image, m, s: affine(image, 1, 0.3 * m * s, 0, 0, 1, 0),
    lambda image, m, s: affine(image, 1, 0, 0, 0.3 * m * s, 1, 0),
    lambda image, m, s: affine(image, 1, 0, round(0.45 * m * s * image.width), 0, 1, 0),
    lambda image, m, s: affine(image, 1, 0, 0, 0, 1, round(0.45 * m * s * image.height)),
]


def randaugment(image, n, rng):
    """n operations, each done half the time, with magnitude 9 of 10 (standard deviation 0.5)."""
    for operation in rng.choices(RANDAUGMENT, k=n):
        if rng.random() < 0.5:
            image = operation(image, min(max(rng.gauss(9, 0.5), 0), 10) / 10, rng.choice((-1, 1)))
    return image


def erasing_box(size, reprob, rng):
    """(y, x, h, w) of random erasing: in a share reprob of the images 0.02 to 1/3 of the area, ratio 0.3 to 1/0.3."""
    for _ in range(10 if rng.random() < reprob else 0):               # until a rectangle fits
        area, ratio = size * size * rng.uniform(0.02, 1 / 3), 0.3 ** rng.uniform(-1, 1)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h <= size and w <= size:
            return rng.randint(0, size - h), rng.randint(0, size - w), h, w
    return 0, 0, 0, 0


# ---------------------------------------------------------------------------- a folder of them
def class_names(root):
    """The sorted names of root's folders."""
    names = sorted(d.name for d in root.iterdir() if d.is_dir() and d.name[0] != ".") if root.is_dir() else []
    if not names:
        raise Mistake(f"{root} must be a folder with one folder of images per class")
    return names


def too_many(unreadable, images):
    return len(unreadable) > 0.01 * len(images)


class ImageFolder(Dataset):
    """The images in root/CLASS/; the key of one is (index, place), what its random numbers belong to (see `draws`).

    With None for a place it is read for evaluation; else one that cannot be read has another in its place.
    """

    def __init__(self, root, classes, settings):
        own, expected = set(class_names(root)), set(classes)
        if differences := ([f"{name!r} is missing" for name in sorted(expected - own)[:1]] +
                           [f"{name!r} is one too many" for name in sorted(own - expected)[:1]]):
            raise Mistake(f"{root} has other classes than the {len(classes)} expected: {', '.join(differences)}")
        extensions, paths, self.labels = Image.registered_extensions(), [], []
        for label, name in enumerate(classes):
            for folder, folders, files in os.walk(root / name, followlinks=True):
                here = os.path.join(os.path.realpath(folder), "")     # a link to a folder above would go round
                folders[:] = sorted(d for d in folders if d[0] != "." and not here.startswith(
                    os.path.join(os.path.realpath(os.path.join(folder, d)), "")))
                paths += [os.fsencode(os.path.join(folder, file)) for file in sorted(files)
                          if file[0] != "." and os.path.splitext(file)[1].lower() in extensions]
            if len(paths) == len(self.labels):
                raise Mistake(f"{root / name} has no images")
            self.labels += [label] * (len(paths) - len(self.labels))
        self.settings, self.paths = settings, np.array(paths)         # one array, whose memory all workers share

    def __len__(self):
        return len(self.paths)

    def __getitems__(self, keys):
        """A batch: images (B, 3, size, size) uint8, channels last in memory; labels (B,); boxes (B, 4); {path: why} of
        what could not be read."""
        images, size = [], self.settings.size
        pixels = np.empty((len(keys), size, size, 3), np.uint8)
        for i, key in enumerate(keys):
            image, *rest = self[key]
            pixels[i] = np.asarray(image)                             # at once: to keep them for later would cost more
            images.append(rest)
        labels, boxes, unreadable = zip(*images)
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(labels), torch.tensor(boxes),
                {path: why for found in unreadable for path, why in found.items()})

    def __getitem__(self, key):
        """-> image (Pillow), label, box, {path: why}"""
        index, place = key
        s, rng, box, unreadable = self.settings, draws(place), (0, 0, 0, 0), {}
        crop = (functools.partial(random_crop, min_scale=s.min_scale, rng=rng) if place else
                functools.partial(center_crop, size=s.size))
        while True:
            path = os.fsdecode(self.paths[index])
            try:
                image = read(path, s.size, crop)
                break
            except Exception as error:                                # Pillow's decoders raise almost anything
                unreadable[path] = str(error).replace(f" {path!r}", "").rstrip(":") or type(error).__name__
                if not place or too_many(unreadable, self):           # this ends the run, whatever the picture
                    image = Image.new("RGB", (s.size, s.size))
                    break
                index = rng.randrange(len(self))
        if place:
            image = image.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
            image = randaugment(image, s.randaugment, rng)
            box = erasing_box(s.size, s.reprob, rng)
        return image, self.labels[index], box, unreadable


def training_keys(n, settings, first, last, world=WORLD, rank=RANK):
    """The keys of this process's images, batch by batch, from step `first` to `last` of the run.

    Repeated augmentation: an epoch shuffles the n images, puts each `aug_repeats` times in a row, and takes n of
    these.  Each step takes the next world x accum x batch_size of them and deals them out to the processes one by one,
    so that repeats of an image go to different processes, and to their batches one by one, so that two images half a
    batch apart (see `mix`) lie half a step apart, however many processes and batches share it.
    """
    b, accum, seed = settings.batch_size, settings.accum, settings.seed
    for step in range(first, last):
        epoch, i = divmod(step, n // (world * accum * b))
        if step == first or i == 0:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(draws(seed, epoch).getrandbits(63)))
        for a in range(accum):
            positions = ((i * b + torch.arange(b)) * accum + a) * world + rank
            images = order[positions // settings.aug_repeats]
            yield [(image, (seed, epoch, p)) for image, p in zip(images.tolist(), positions.tolist())]


# ---------------------------------------------------------------------------- a batch, on the device
@functools.cache
def mean_and_std():
    return [torch.tensor(values, device=DEVICE).view(3, 1, 1) for values in (MEAN, STD)]


def normalise(images):
    """uint8 images as the network takes them, on the device."""
    mean, std = mean_and_std()
    return (images.to(DEVICE, non_blocking=True) / 255 - mean) / std


def erase(images, boxes, noise):
    """The images (B, 3, H, W) with noise (3, H, W) in their boxes (B, 4), as `erasing_box` gives them."""
    y, x, h, w = boxes.view(-1, 4, 1, 1, 1).unbind(1)                                   # (B, 1, 1, 1) each
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
    rows = rows[:, None]
    return torch.where((rows >= y) & (rows < y + h) & (columns >= x) & (columns < x + w), noise, images)


def mix(images, targets, mixup, cutmix, rng):
    """mixup or CutMix of images (B, 3, H, W) and targets (B, classes): each with the one half a batch further on.

    An image keeps a share lambda of itself, drawn from Beta(alpha, alpha).  CutMix pastes a rectangle of the share
    1 - lambda around a random point; the border may cut it, and the targets take what is seen of it.
    """
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    if alpha == 0:
        return images, targets
    lam, (H, W) = rng.betavariate(alpha, alpha), images.shape[2:]
    other_images, other_targets = (t.roll(len(images) // 2, 0) for t in (images, targets))
    if cut:
        h, w, y, x = int(H * math.sqrt(1 - lam)), int(W * math.sqrt(1 - lam)), rng.randrange(H), rng.randrange(W)
        box = ..., slice(max(y - h // 2, 0), y + h // 2), slice(max(x - w // 2, 0), x + w // 2)
        lam = 1 - images[0, 0][box].numel() / (H * W)
        images = images.clone()
        images[box] = other_images[box]
    else:
        images = images.lerp(other_images, 1 - lam)
    return images, targets.lerp(other_targets, 1 - lam)


# ---------------------------------------------------------------------------- checkpoints
def write(path, content):
    """The bytes at path, whole or not at all: until they are on the disk, the old file stays."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Mistake(f"cannot write {path}: {error.strerror}; what was saved there before is untouched") from None


TO_GO_ON = "step", "epoch_loss", "log", "unreadable", "optimizer", "extent"       # in last.pt, besides what best.pt has


def packed(checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getbuffer()


def load(path):
    """A checkpoint of this program, a published one, or a mere state dict; its "model" comes out under our names."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files hold their arguments as well
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Mistake(f"cannot load {path}: {error.strerror}") from None
    except Exception:                                                 # whatever unpickling does with what is no pickle
        raise Mistake(f"cannot load {path}: it is no checkpoint, is damaged, or holds more than tensors and plain "
                      "values") from None
    if isinstance(checkpoint, dict) and "model" not in checkpoint:
        checkpoint = {"model": checkpoint}
    weights = isinstance(checkpoint, dict) and checkpoint["model"]
    settings = isinstance(checkpoint, dict) and checkpoint.get("settings", {})
    if not (isinstance(weights, dict) and weights and all(isinstance(w, torch.Tensor) for w in weights.values())
            and isinstance(settings, dict) and settings.get("model", "tiny") in MODELS):
        raise Mistake(f"cannot load {path}: it is neither a ScalableViT's state dict nor a dictionary with one as its "
                      "'model'")
    if "patch_embeds.0.proj.weight" in weights:
        try:
            checkpoint = {"model": scalablevit.convert_official(weights)}
        except ValueError as error:
            raise Mistake(f"cannot load {path}: {error}") from None
    return checkpoint


def load_weights(model, weights, name, whole):
    """Unless `whole`, a head that does not fit (one for other classes) is left as it was initialised."""
    own = model.state_dict()
    wrong = [key for key in {**own, **weights}
             if key not in own or key not in weights or own[key].shape != weights[key].shape]
    if wrong and (whole or not all(key.startswith("head.") for key in wrong)):
        raise Mistake(f"the weights do not fit scalablevit_{name} with {model.num_classes} classes (--model, --data): "
                      f"{len(wrong)} parameters differ, {wrong[0]!r} is one")
    if wrong:
        say("the weights have a head for other classes: training a fresh one")
    model.load_state_dict(own | {key: weights[key] for key in weights if key not in wrong})


# ---------------------------------------------------------------------------- processes
signals = []                                                          # SIGTERM or Ctrl-C came: stop after this step


def on_signal(number, frame):
    signals.append(number)
    if number == signal.SIGINT:                                       # a second Ctrl-C stops at once
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def ignore_signals(worker):
    """A process that reads images goes on until the one that trains is done with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def say(text, end="\n"):
    """Print, from one process only.  In a terminal, end="" makes a line that the next one replaces."""
    if RANK == 0:
        terminal = sys.stdout.isatty()
        text = text[:shutil.get_terminal_size().columns - 1] if terminal and end == "" else text
        with contextlib.suppress(OSError):                            # nobody listens any more: the run goes on
            print(f"\r\x1b[K{text}" if terminal else text, end=end if terminal else "\n", flush=True)


def store_of_this_start():
    """Where the processes meet.  torchrun's store keeps the addresses of processes that it has started again since; so
    they agree on a name for this start, made of one from each: the first waits for names that are being called out."""
    store, _, _ = next(dist.rendezvous("env://"))
    name, names = os.urandom(8).hex(), ""
    if RANK == 0:
        for rank in range(1, WORLD):
            store.delete_key(f"name {rank}")
        names = name + "".join(store.get(f"name {rank}").decode() for rank in range(1, WORLD))
        store.set("names", names)
    while name not in names:
        store.set(f"name {RANK}", name)
        time.sleep(0.1)
        names = store.get("names").decode() if store.check(["names"]) else ""
    return dist.PrefixStore(names, store)


def total(*values):
    """Each value, summed over all processes."""
    values = torch.tensor(values, dtype=torch.float64, device=DEVICE)
    if WORLD > 1:
        dist.all_reduce(values)
    return values.tolist()


def union(dictionary):
    """Of all processes' dictionaries."""
    dictionaries = [dictionary] * WORLD
    if WORLD > 1:
        dist.all_gather_object(dictionaries, dictionary)
    return {key: value for each in dictionaries for key, value in each.items()}


def launchers():
    """The torchrun agents of this run, by which a run that they restart is told from another one in the same folder."""
    return set(union({f"{socket.gethostname()} {os.getppid()}": None} if "TORCHELASTIC_RUN_ID" in os.environ else {}))


def claim(output):
    """The folder of a new run, made by the first process: `output`, or the first free one of runs/1, runs/2, ..."""
    if RANK == 0:
        folder = output or next(p for n in itertools.count(1) if not (p := pathlib.Path(f"runs/{n}")).exists())
        try:
            folder.mkdir(parents=True, exist_ok=bool(output))
        except OSError as error:
            raise Mistake(f"cannot make the folder {folder} (--output): {error.strerror}") from None
    return union({} if RANK else {"output": folder})["output"]


# ---------------------------------------------------------------------------- training
def learning_rate(step, steps, warmup_steps, peak):
    """Linearly up from 1e-6, then a cosine down to 1e-5."""
    low, end = min(1e-6, peak), min(1e-5, peak)
    if step < warmup_steps:
        return low + (peak - low) * step / warmup_steps
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1))) / 2


@torch.no_grad()
def evaluate(model, loader, bf16):
    """Top-1 and top-5 accuracy in percent, or None if a signal came.  The processes' images are counted together."""
    model.eval()
    right1, right5, n, unreadable = 0, 0, 0, {}
    for images, labels, _, unreadable in loader:
        if unreadable or signals:
            break
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            logits = model(normalise(images))
        right = logits.topk(min(5, logits.shape[1])).indices == labels.to(DEVICE)[:, None]          # (B, 5)
        right1, right5, n = right1 + right[:, 0].sum(), right5 + right.sum(), n + len(labels)
    right1, right5, n, bad, stop = total(right1, right5, n, len(unreadable), len(signals))
    if bad:
        path, why = min(union(unreadable).items())
        raise Mistake(f"cannot read {path} ({why}), and without it the accuracy would be another")
    return None if stop else (100 * right1 / n, 100 * right5 / n)


def backward(net, batches, step, settings, bf16, num_classes):
    """The gradient of one step, in the parameters -> this process's loss, and what it could not read.

    All that is drawn here depends on the seed and the step alone; stochastic depth also on the process.
    """
    torch.manual_seed(draws(settings.seed, "noise", step).getrandbits(63))
    noise = torch.randn(3, settings.size, settings.size, device=DEVICE)
    torch.manual_seed(draws(settings.seed, "depth", step, RANK).getrandbits(63))
    loss_sum, unreadable = 0, {}
    for a in range(settings.accum):
        images, labels, boxes, found = next(batches)
        images = erase(normalise(images), boxes.to(DEVICE, non_blocking=True), noise)
        targets = F.one_hot(labels.to(DEVICE, non_blocking=True), num_classes).float()
        images, targets = mix(images, targets, settings.mixup, settings.cutmix, draws(settings.seed, "mix", step))
        with net.no_sync() if WORLD > 1 and a + 1 < settings.accum else contextlib.nullcontext():
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(net(images), targets, label_smoothing=settings.label_smoothing) / settings.accum
            loss.backward()
        loss_sum, unreadable = loss_sum + loss.detach(), unreadable | found
    return loss_sum, unreadable


def parse_args():
    """-> what to do, the settings to do it with, and the checkpoint to start from (or {})."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--data DIR] [--model tiny|s|b|l] [options]", description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=118))
    add = parser.add_argument
    add("--data", type=os.path.abspath, metavar="DIR",                # a run that is resumed elsewhere still finds it
        help="with train/CLASS/ and val/CLASS/ (default: a data set drawn into --output)")
    add("--model", choices=MODELS, help="the size of the network (default: tiny)")
    add("--output", type=pathlib.Path, metavar="DIR", help="of the run (default: runs/1, or the next free number)")
    add("--init", type=pathlib.Path, metavar="FILE", help="weights to start from: of this program, or published ones")
    add("--resume", action="store_true", help="go on from last.pt in --output")
    add("--eval", action="store_true", help="evaluate --init, or else best.pt in --output, and stop")
    add("--workers", type=int, metavar="N", default=8 if CUDA else 0, help="processes that read images, for each that "
        "trains (default: %(default)s; without a GPU none, so that training has the cores)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="autocast to bfloat16 (default: on a GPU)")
    add = parser.add_argument_group("settings (default for s, b, l | for tiny | for tiny without --data)").add_argument
    for name, (*defaults, low, high, text) in SETTINGS.items():
        add(f"--{name.replace('_', '-')}", type=type(defaults[0]), metavar="N",
            help=f"{text} ({' | '.join(f'{value:g}' for value in defaults)})")
    args = parser.parse_args()
    args.launchers = launchers()

    exists = args.output is not None and (args.output / "last.pt").exists()
    if args.workers < 0:
        raise Mistake(f"--workers must be 0 or more, got {args.workers}")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if (args.resume or args.eval and not args.init or restarts) and not args.output:
        raise Mistake("--resume, --eval without --init, and torchrun's --max-restarts need --output, a run's folder")
    if args.resume and (args.eval or args.init):
        raise Mistake("--resume goes with neither --eval nor --init")
    if args.resume and not exists:
        raise Mistake(f"{args.output} has no last.pt, so nothing of that run was saved: start again without --resume")
    restarted = False
    if exists and not (args.resume or args.eval):
        restarted = not args.launchers.isdisjoint(load(args.output / "last.pt").get("launchers", []))
        if not restarted:
            raise Mistake(f"{args.output} holds a run: --resume goes on with it; or choose another --output")
    args.resume = args.resume or restarted
    start = args.output / "last.pt" if args.resume else args.init or args.eval and args.output / "best.pt"
    checkpoint = load(start) if start else {}
    if args.resume and not {*TO_GO_ON, "settings", "classes"} <= set(checkpoint):
        raise Mistake(f"{start} holds weights, but no run to go on with; --init takes it")

    # A flag, else what the checkpoint was trained with, else the default.  Mere starting weights tell their model only.
    saved = checkpoint.get("settings", {})
    kept = {} if restarted else saved if args.resume or args.eval else {"model": saved.get("model", "tiny")}
    given = {name: value for name in ("data", "model", "bf16", *SETTINGS) if (value := getattr(args, name)) is not None}
    known = {"data": None, "model": "tiny", "bf16": None, **kept, **given}
    column = 2 if known["data"] is None else 1 if known["model"] == "tiny" else 0
    defaults = {name: values[column] for name, values in SETTINGS.items()}
    settings = argparse.Namespace(**{**defaults, **(MODELS[known["model"]] if column == 0 else {}), **known})
    if restarted and vars(settings) != saved:
        raise Mistake(f"{args.output} holds a run with other settings: choose another --output")
    if args.eval and not (settings.data or args.output):
        raise Mistake("--eval --init FILE needs --data")
    for name, (*_, low, high, _) in SETTINGS.items():
        if not low <= getattr(settings, name) <= high:
            raise Mistake(f"--{name.replace('_', '-')} must be between {low} and {high}, got {getattr(settings, name)}")
    return args, settings, checkpoint


def main():
    signals.clear()
    if CUDA:
        torch.cuda.set_device(DEVICE)
    if WORLD > 1:
        dist.init_process_group("nccl" if CUDA else "gloo", store=store_of_this_start(), rank=RANK, world_size=WORLD)
    try:
        args, settings, checkpoint = parse_args()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:         # that is nohup
            signal.signal(signal.SIGHUP, on_signal)                   # the terminal was closed
        status = run(args, settings, checkpoint)
        if WORLD > 1:
            dist.destroy_process_group()
        if status:
            raise SystemExit(status)
        return
    except torch.OutOfMemoryError:
        b, accum = settings.batch_size, settings.accum
        mistake = (f"out of GPU memory with --batch-size {b} --accum {accum}; the same steps with half as many images "
                   f"at a time: --batch-size {max(b // 2, 1)} --accum {2 * accum}")
    except (Mistake, OSError) as error:
        mistake = error
    print(f"{pathlib.Path(sys.argv[0]).name}: {mistake}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def run(args, settings, checkpoint):
    """Train or evaluate; the exit status, where a signal ended it."""
    # Images
    output, new = args.output, not (args.resume or args.eval)
    if new and not settings.data:
        output = claim(output)
    data = pathlib.Path(settings.data or output / "shapes")
    if new and not settings.data:
        if RANK == 0 and not data.exists():
            say(f"drawing a data set of {len(SHAPES)} classes into {data}")
            draw_data_set(data)
        total(0)                                                      # the others wait for it
    bf16 = CUDA if settings.bf16 is None else settings.bf16
    classes = not new and checkpoint.get("classes") or class_names(data / ("val" if args.eval else "train"))
    train_set = None if args.eval else ImageFolder(data / "train", classes, settings)
    val_set = ImageFolder(data / "val", classes, settings)
    load_data = functools.partial(DataLoader, num_workers=args.workers, pin_memory=CUDA, collate_fn=tuple,
                                  worker_init_fn=ignore_signals)
    val_loader = load_data(val_set, batch_size=settings.batch_size,
                           sampler=[(i, None) for i in range(RANK, len(val_set), WORLD)])

    # Model
    torch.manual_seed(settings.seed)
    weights = checkpoint.get("model", {})
    plain_head = {"head_hidden": None} if "head.weight" in weights else {}      # the published models come with either
    model = getattr(scalablevit, f"scalablevit_{settings.model}")(
        num_classes=len(classes), drop_path_rate=settings.drop_path_rate, **plain_head)
    if checkpoint:
        load_weights(model, weights, settings.model, whole=not new)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    if args.eval:
        if accuracy := evaluate(model, val_loader, bf16):
            say("val top-1 {:.2f} %, top-5 {:.2f} % of {} images".format(*accuracy, len(val_set)))
        return

    # The run: `epochs` times `steps` steps of `images` images
    images = WORLD * settings.accum * settings.batch_size
    terms = f"{images} = {WORLD} x {settings.accum} x {settings.batch_size}"    # processes, batches, images in a batch
    extent, steps = [len(train_set), images], len(train_set) // images
    if steps == 0:
        raise Mistake(f"the {len(train_set)} training images are fewer than the {terms} of one step: "
                      f"lower --batch-size{' or --accum' if settings.accum > 1 else ''}")
    if args.resume and checkpoint["extent"] != extent:
        raise Mistake("this run is over {} images in steps of {}, and cannot go on with {} in steps of {}: keep the "
                      "data, and the product of processes, --accum and --batch-size".format(
                          *checkpoint["extent"], *extent))
    last = settings.epochs * steps
    exempt = model.no_weight_decay()
    groups = [{"params": [p for name, p in model.named_parameters() if name not in exempt]},
              {"params": [p for name, p in model.named_parameters() if name in exempt], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=settings.weight_decay, fused=True)
    peak = settings.lr * images / 1024
    step, epoch_loss, log, unreadable = 0, 0.0, [], {}                # log: one dictionary per epoch
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, epoch_loss, log, unreadable = (checkpoint[name] for name in TO_GO_ON[:4])
    net = DistributedDataParallel(model) if WORLD > 1 else model
    batches = iter(load_data(train_set, batch_sampler=training_keys(len(train_set), settings, step, last)))
    output = output if args.resume else claim(output)

    def save(best=False):
        """last.pt comes last: until it is there, a resumed run does once more what the other two tell of."""
        failure = {}
        if RANK == 0:
            checkpoint = {"model": model.state_dict(), "settings": vars(settings), "classes": classes, "log": log}
            try:
                write(output / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log).encode())
                if best:
                    write(output / "best.pt", packed(checkpoint))
                write(output / "last.pt", packed({**checkpoint, "optimizer": optimizer.state_dict(), "step": step,
                                                  "epoch_loss": epoch_loss, "unreadable": unreadable, "extent": extent,
                                                  "launchers": sorted(args.launchers)}))
            except Mistake as error:
                failure = {"error": str(error)}
        if total(len(failure))[0]:
            raise Mistake(union(failure)["error"])

    say(f"scalablevit_{settings.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {len(classes)} "
        f"classes, {len(train_set)} training and {len(val_set)} validation images at {settings.size}x{settings.size}\n"
        f"{WORLD} process(es) on {DEVICE.type}, {'bfloat16 autocast' if bf16 else 'float32'}, {steps} steps per epoch "
        f"of {terms} images, peak learning rate {peak:.2g}, writing to {output}")
    if step >= last and len(log) >= settings.epochs:
        say(f"all {settings.epochs} epochs are done: --epochs takes a larger number")
    first, began, printed, stop = step, time.time(), 0.0, 0
    while True:
        epoch, done = divmod(step, steps)
        best, over = False, epoch > len(log)                          # was the last step an epoch's last?
        if over:
            try:
                accuracy = evaluate(model, val_loader, bf16)
            except Mistake:
                save()                                                # a resumed run evaluates first
                raise
            stop = accuracy is None
            if not stop:
                log.append({"epoch": epoch, "loss": epoch_loss / steps, "top1": accuracy[0], "top5": accuracy[1],
                            "lr": optimizer.param_groups[0]["lr"], "unreadable": len(unreadable)})
                top1 = [entry["top1"] for entry in log]
                epoch_loss, best = 0.0, top1.index(max(top1)) == epoch - 1                  # the earliest of equals
                say(f"epoch {epoch}/{settings.epochs}  val top-1 {accuracy[0]:.2f} %, top-5 {accuracy[1]:.2f} %  "
                    f"(best top-1 {max(top1):.2f} %)")
        if stop or over or step > first and step % settings.save_every == 0:
            save(best)
        if stop:
            number = signals[0] if signals else signal.SIGTERM        # it may have come to another process
            start = "python" if WORLD == 1 else f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
            say(f"{signal.Signals(number).name} came: stopped and saved after step {done} of epoch {epoch + 1}; "
                f"go on with: {start} {shlex.quote(sys.argv[0])} --output {shlex.quote(str(output))} --resume")
            return 128 + number
        if step >= last:
            return

        net.train()
        loss, found = backward(net, batches, step, settings, bf16, len(classes))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, last, settings.warmup_epochs * steps, peak)
        optimizer.step()
        optimizer.zero_grad()
        step, done = step + 1, done + 1

        # What the processes must agree on, in one exchange
        found = {path: why for path, why in found.items() if path not in unreadable}
        loss, norm, stop, bad = total(loss.item() / WORLD, norm.item() / WORLD, len(signals), len(found))
        if not math.isfinite(loss + norm):
            saved = (output / "last.pt").exists()
            raise Mistake(f"the loss is {loss:g} and its gradient's norm {norm:g} at step {done} of epoch {epoch + 1}; "
                          + ("last.pt is untouched, and --resume with a lower --lr may get past this" if saved else
                             "nothing was saved yet: start again with a lower --lr, or other weights"))
        if bad:
            found = union(found)
            unreadable.update(found)
            for path, why in found.items():
                say(f"cannot read {path} ({why}): another image takes its place")
            if too_many(unreadable, train_set):
                raise Mistake(f"{len(unreadable)} of {len(train_set)} training images cannot be read, more than 1 %")
        epoch_loss += loss
        now, every = time.time(), 0.2 if sys.stdout.isatty() else 30
        if now - printed > every or done == steps:
            printed, seconds = now, (now - began) / (step - first)    # per step
            minutes, left = divmod(round(seconds * (last - step)), 60)
            say(f"epoch {epoch + 1}/{settings.epochs}  step {done}/{steps}  loss {epoch_loss / done:.3f}  "
                f"{images / seconds:.0f} img/s  {minutes // 60}:{minutes % 60:02}:{left:02} left", end="")


if __name__ == "__main__":
    main()
