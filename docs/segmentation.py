"""Semantic FPN and UperNet on ScalableViT (Table 4): from four maps to a class for every pixel.

    python docs/segmentation.py                     Semantic FPN on mosaics of digits
    python docs/segmentation.py --data DIR          on mosaics of images of DIR/{train,val}/CLASS/*
    torchrun --nproc_per_node=8 docs/segmentation.py --data ADE20K --framework upernet \\
        --model s --init published.pth
    python docs/segmentation.py --predict photo.jpg     writes photo.segmentation.png

ADE20K is a folder with {images,annotations}/{training,validation}/ and objectInfo150.txt, a line
per class.  A label is a PNG of 8 bits with one channel: 0 and 255 are none, then come the classes.
The third line is the paper's run, 8 x 2 images; one GPU takes 8 x 2, one after the other, by
default.  Appendix C does not mention the horizontal flip.  In Python:

    model, classes = segmentation.load_model("runs/semantic_fpn/best.pt")
    image = segmentation.open_image("photo.jpg")
    segmentation.draw(image, segmentation.find(model, image), classes).save("found.png")
"""
import functools
import math
import pathlib
import sys

import dense
import torch
import torch.nn.functional as F
from dense_data import ADE20K, NONE, labels_of
from dense import DEVICE, WORLD_SIZE, UserError, open_image  # noqa: F401
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import default_collate as collate  # noqa: F401
from torchvision import utils
from torchvision.transforms.v2.functional import resize as resize_image
from train_minimal import normalize

CHOICES = {"framework": ["semantic_fpn", "upernet"], "model": ["tiny", "s", "b", "l"]}
SETTINGS = dict(             # Appendix C, Semantic FPN
    steps=80_000,
    power=0.9,               # of the polynomial decay of the learning rate
    batch_size=2,            # images per process and backward pass
    accum=max(1, 8 // WORLD_SIZE),   # backward passes per step: 16 images
    lr=1e-4,                 # Table 8's, for 16 images per step; scaled linearly with their number
    weight_decay=1e-4,       # Table 8
    size=512,                # of crops, and of the shorter side; the longer is at most 4 times it
    width=256,               # channels of the pyramid
    mosaics=1600,            # in each epoch, always fresh ones
    seed=0,
)
UPERNET = dict(SETTINGS, steps=160_000, power=1.0, lr=6e-5, weight_decay=1e-2, width=512)
MOSAIC = dict(steps=450, batch_size=16, accum=1, lr=2e-3, size=80, width=64)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)                          # for MS in Table 4 (4.3)
FOLDER = "images/training"


def recipe(known):
    """The settings for a framework and a kind of data."""
    chosen = UPERNET if known["framework"] == "upernet" else SETTINGS
    return dict(chosen, **MOSAIC) if dense.is_mosaic(known["data"]) else chosen


def schedule(args):
    """Steps in all, and between evaluations."""
    return args.steps, math.ceil(args.steps / 10)


def learning_rate(step, args):
    peak = args.lr * args.step_size / 16
    return peak * (1 - step / args.total) ** args.power


def load_data(args, split):
    if args.batch_size < 2:
        raise UserError("batch normalization needs two images or more: --batch-size 2")
    if not dense.is_mosaic(args.data):
        folder = {"train": "training", "val": "validation"}[split]
        return ADE20K(pathlib.Path(args.data), folder, args.size)
    mosaics = dense.mosaics(args, split, labels_of)
    mosaics.classes = ["background", *mosaics.classes]
    return mosaics


# ---------------------------------------------------------------------------- networks
def conv(C_in, C_out, kernel_size=3):
    """Convolution, batch norm, ReLU; keeps the size."""
    return nn.Sequential(
        nn.Conv2d(C_in, C_out, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(C_out), nn.ReLU())


def resize(x, like):
    """Resize x (B, C, h, w) to the size of `like` (..., H, W)."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear")


class SemanticFPN(nn.Module):
    """Panoptic FPN (Kirillov et al., 2019): images (B, 3, H, W) -> logits (B, classes, H, W)."""

    def __init__(self, backbone, num_classes=150, width=256):
        super().__init__()
        self.backbone = backbone
        head = width // 2
        self.lateral = nn.ModuleList()
        self.smooth = nn.ModuleList()
        self.scale = nn.ModuleList()
        for i, C in enumerate(backbone.channels):
            self.lateral.append(nn.Conv2d(C, width, 1))
            self.smooth.append(nn.Conv2d(width, width, 3, padding=1))
            layers = [conv(width, head)]
            for _ in range(1, i):                                   # i times conv and 2x up
                layers.append(conv(head, head))
            self.scale.append(nn.ModuleList(layers))
        self.classify = nn.Conv2d(head, num_classes, 1)

    def forward(self, images):
        maps = self.backbone.forward_features(images)
        pyramid = [lateral(m) for lateral, m in zip(self.lateral, maps)]
        for i in reversed(range(1, len(pyramid))):                  # (B, width, ⌈H/s⌉, ⌈W/s⌉) each
            above = F.interpolate(pyramid[i], size=pyramid[i - 1].shape[2:])
            pyramid[i - 1] = pyramid[i - 1] + above
        total = 0
        for i, layers in enumerate(self.scale):
            x = self.smooth[i](pyramid[i])
            for j, layer in enumerate(layers):
                x = layer(x)
                if i > 0:
                    x = resize(x, pyramid[i - 1 - j])
            total = total + x                                       # (B, width / 2, ⌈H/4⌉, ⌈W/4⌉)
        return resize(self.classify(total), images)


class UperNet(nn.Module):
    """Unified Perceptual Parsing (Xiao et al., 2018), as in MMSegmentation: images -> logits.

    A feature pyramid on pyramid pooling (1, 2, 3 and 6 bins a side) of the last map; its levels are
    fused.  In training it also returns the logits of an auxiliary head on the third map.
    """

    def __init__(self, backbone, num_classes=150, width=512, bins=(1, 2, 3, 6)):
        super().__init__()
        self.backbone = backbone
        channels = backbone.channels
        head, last = width // 2, channels[-1]
        self.pool = nn.ModuleList()
        for n in bins:
            pool = nn.AdaptiveAvgPool2d(n)
            self.pool.append(nn.Sequential(pool, conv(last, width, 1)))
        self.bottleneck = conv(last + len(bins) * width, width)
        self.lateral = nn.ModuleList(conv(C, width, 1) for C in channels[:-1])
        self.smooth = nn.ModuleList(conv(width, width) for _ in channels[:-1])
        self.join = conv(len(channels) * width, width)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, num_classes, 1))
        self.auxiliary = nn.Sequential(
            conv(channels[-2], head), nn.Dropout2d(0.1), nn.Conv2d(head, num_classes, 1))

    def forward(self, images):
        maps = self.backbone.forward_features(images)               # (B, C_i, ⌈H/s⌉, ⌈W/s⌉) each
        last = maps[-1]
        pooled = [resize(pool(last), last) for pool in self.pool]
        pyramid = [lateral(m) for lateral, m in zip(self.lateral, maps)]
        together = torch.cat([last, *pooled], dim=1)
        pyramid.append(self.bottleneck(together))
        for i in reversed(range(1, len(pyramid))):                  # (B, width, ⌈H/s⌉, ⌈W/s⌉) each
            above = resize(pyramid[i], pyramid[i - 1])
            pyramid[i - 1] = pyramid[i - 1] + above
        levels = [smooth(level) for smooth, level in zip(self.smooth, pyramid)]
        levels.append(pyramid[-1])
        same = [resize(level, levels[0]) for level in levels]
        joined = self.join(torch.cat(same, dim=1))                  # (B, width, ⌈H/4⌉, ⌈W/4⌉)
        logits = resize(self.classify(joined), images)
        if not self.training:
            return logits
        return logits, resize(self.auxiliary(maps[-2]), images)


def build(backbone, num_classes, args):
    framework = UperNet if args.framework == "upernet" else SemanticFPN
    return framework(backbone, num_classes, args.width)


def loss(net, images, labels):
    """Cross-entropy; auxiliary logits have weight 0.4."""
    labels = labels.to(DEVICE)
    outputs = net(normalize(images))
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    losses = [F.cross_entropy(logits, labels, ignore_index=NONE) for logits in outputs]
    return losses[0] + 0.4 * sum(losses[1:])


# ---------------------------------------------------------------------------- evaluation
@torch.no_grad()
def multi_scale(model, images, scales=SCALES):
    """MS: probabilities (B, classes, H, W), averaged over scales and horizontal flips."""
    total = 0
    for scale in scales:
        size = [max(1, round(n * scale)) for n in images.shape[2:]]
        scaled = F.interpolate(images, size=size, mode="bilinear")
        plain = model(scaled)
        flipped = model(scaled.flip(3)).flip(3)
        for logits in (plain, flipped):
            total = total + resize(logits, images).softmax(dim=1)
    return total / (2 * len(scales))


@torch.no_grad()
def mean_iou(predict, batches, classes):
    """Mean intersection over union of the classes that occur, and accuracy of the pixels, in %.

    predict maps images to logits or probabilities; batches are (images, labels), labels any
    integers, of which those outside 0 ... classes - 1 are ignored.
    """
    counts = torch.zeros(classes, classes, dtype=torch.long, device=DEVICE)
    for images, labels in batches:
        labels = labels.long().to(DEVICE)
        found = resize(predict(images), labels).argmax(1)
        known = (labels >= 0) & (labels < classes)
        pairs = (classes * labels + found)[known]
        counts += pairs.bincount(minlength=classes ** 2).view(classes, classes)
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(counts)
    right = counts.diag()
    union = counts.sum(0) + counts.sum(1) - right
    iou = (right / union).nanmean()
    pixels = right.sum() / counts.sum()
    return 100 * iou.item(), 100 * pixels.item()


def evaluate(model, dataset, args):
    """Mean IoU, and a line that says more; with --eval also for MS."""
    predictors = {"one scale": model}
    if args.eval:
        predictors["MS"] = lambda images: multi_scale(model, images)
    scores, parts = [], []
    for name, predict in predictors.items():
        items = dense.share(dataset, args)
        pairs = ((normalize(image[None]), labels[None]) for image, labels in items)
        iou, pixels = mean_iou(predict, pairs, len(dataset.classes))
        scores.append(iou)
        parts.append(f"{name}: mean IoU {iou:.1f} %, {pixels:.1f} % of pixels")
    return scores[0], "; ".join(parts)


# ---------------------------------------------------------------------------- pictures
@torch.no_grad()
def find(model, image):
    """Class of each pixel (H, W) of an image (3, H, W) uint8, on the CPU."""
    model.eval()
    logits = model(normalize(image[None]))                          # (1, classes, H, W)
    return logits.argmax(1)[0].cpu()


def draw(image, labels, classes):
    """Colors over an image (3, H, W) uint8, with a legend below; small ones enlarged."""
    found = [label for label in labels.unique().tolist() if label != NONE]
    image = resize_image(image, list(labels.shape))                 # that ADE20K's labels keep
    if found:
        masks = torch.stack([labels == label for label in found])
        paint = [dense.color(label) for label in found]
        image = utils.draw_segmentation_masks(image, masks, alpha=0.5, colors=paint)
    picture, _ = dense.enlarge(image)
    height = picture.height + 20 * len(found)
    sheet = Image.new("RGB", (picture.width, height), "white")
    sheet.paste(picture)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, label in enumerate(found):
        y = picture.height + 20 * i
        pen.rectangle((3, y + 3, 17, y + 17), paint[i])
        pen.text((24, y + 2), classes[label], "black", font)
    return sheet


def describe(labels, classes):
    """A line per class."""
    for label in labels.unique().tolist():
        part = (labels == label).float().mean().item()
        yield f"{classes[label]!a} {100 * part:.1f} % of pixels"


load_model = functools.partial(dense.load_model, sys.modules[__name__])
main = functools.partial(dense.main, sys.modules[__name__])

if __name__ == "__main__":
    dense.run_program(sys.modules[__name__])
