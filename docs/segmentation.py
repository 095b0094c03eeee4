"""Semantic FPN and UperNet on ScalableViT (Table 4): from four maps to a class for every pixel.

    python docs/segmentation.py                     Semantic FPN on mosaics of digits
    python docs/segmentation.py --data DIR          on mosaics of images of DIR/{train,val}/CLASS/*
    torchrun --nproc_per_node=8 docs/segmentation.py --data ADE20K --model s --init published.pth
    python docs/segmentation.py --predict photo.jpg     writes photo.segmentation.png

ADE20K is a folder with {images,annotations}/{training,validation}/ and objectInfo150.txt, a header
and a line per class.  A label is a PNG of 8 bits with one channel: 0 and 255 are none, then come the
classes.  A step takes 16 images, 8 x 2 or on one GPU one after the other (the paper: 4 x 4).
"""
import sys

import dense
import torch
import torch.nn.functional as F
from dense_data import ADE20K as Data, NONE, labels_of as view  # noqa: F401
from dense import DEVICE, WORLD_SIZE, Pyramid, UserError, open_image  # noqa: F401
from torch import nn
from torchvision.ops import Conv2dNormActivation as conv            # convolution, BatchNorm, ReLU
from train_minimal import normalize

RECIPES = {"framework": {    # Appendix C and Table 8
    "semantic_fpn": {},
    "upernet": dict(steps=160_000, power=1.0, lr=6e-5, weight_decay=1e-2, width=512)}}
SETTINGS = dict(steps=80_000, power=0.9, size=512)  # of crops, and of the shorter side of images
MOSAIC = dict(steps=1000, warmup_steps=50, batch_size=16, accum=1, lr=2e-3, size=80, width=64)


def resize(x, like):
    """Resize x (B, C, h, w) to the size of `like` (..., H, W)."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear")


class SemanticFPN(nn.Module):
    """Panoptic FPN (Kirillov et al., 2019): images (B, 3, H, W) -> logits (B, classes, H, W)."""

    def __init__(self, backbone, num_classes=150, width=256):
        super().__init__()
        self.backbone = Pyramid(backbone, width)
        head = width // 2
        self.scale = nn.ModuleList()
        for i in range(len(backbone.channels)):
            layers = [conv(width, head)]
            for _ in range(1, i):                                   # i times conv and 2x up
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
                layers.append(conv(head, head))
            self.scale.append(nn.Sequential(*layers))
        self.classify = nn.Conv2d(head, num_classes, 1)

    def forward(self, images):
        levels = list(self.backbone(images).values())               # (B, width, ⌈H/s⌉, ⌈W/s⌉) each
        total = 0
        for level, layers in zip(levels, self.scale):
            total += resize(layers(level), levels[0])               # (B, width / 2, ⌈H/4⌉, ⌈W/4⌉)
        return resize(self.classify(total), images)


class UperNet(nn.Module):
    """Unified Perceptual Parsing (Xiao et al., 2018): images -> logits, in training two of them."""

    def __init__(self, backbone, num_classes=150, width=512):
        super().__init__()
        self.backbone = backbone
        *channels, last = backbone.channels
        self.bins = (1, 2, 3, 6)                                    # a side
        self.pool = nn.ModuleList(conv(last, width, 1) for _ in self.bins)
        self.bottleneck = conv(last + 4 * width, width)
        self.lateral = nn.ModuleList(conv(C, width, 1) for C in channels)
        self.smooth = nn.ModuleList(conv(width, width) for _ in channels)
        self.join = conv(len(backbone.channels) * width, width)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, num_classes, 1))
        self.auxiliary = nn.Sequential(
            conv(channels[-1], width // 2),
            nn.Dropout2d(0.1),
            nn.Conv2d(width // 2, num_classes, 1))

    def forward(self, images):
        *maps, last = self.backbone.forward_features(images)        # (B, C_i, ⌈H/s⌉, ⌈W/s⌉) each
        together = [last]
        for n, layer in zip(self.bins, self.pool):
            pooled = layer(F.adaptive_avg_pool2d(last, n))          # (B, width, n, n)
            together.append(resize(pooled, last))
        above = self.bottleneck(torch.cat(together, 1))         # (B, width, ⌈H/32⌉, ⌈W/32⌉)
        levels = [resize(above, maps[0])]
        for i in reversed(range(len(maps))):
            above = self.lateral[i](maps[i]) + resize(above, maps[i])
            levels.append(resize(self.smooth[i](above), maps[0]))
        joined = self.join(torch.cat(levels[::-1], 1))          # (B, width, ⌈H/4⌉, ⌈W/4⌉)
        logits = resize(self.classify(joined), images)
        if not self.training:
            return logits
        return logits, resize(self.auxiliary(maps[-1]), images)


def build(backbone, num_classes, args):
    if args.batch_size < 2:
        raise UserError("batch normalization needs two images or more: --batch-size 2")
    framework = UperNet if args.framework == "upernet" else SemanticFPN
    return framework(backbone, num_classes, args.width)


def loss(net, images, labels):
    """Cross-entropy; auxiliary logits have weight 0.4."""
    labels = torch.stack(labels).to(DEVICE)
    outputs = net(normalize(torch.stack(images)))
    if torch.is_tensor(outputs):
        outputs = [outputs]
    losses = [F.cross_entropy(logits, labels, ignore_index=NONE) for logits in outputs]
    return losses[0] + 0.4 * sum(losses[1:])


@torch.no_grad()
def multi_scale(model, images, scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)):
    """For MS in Table 4: probabilities (B, classes, H, W), averaged over scales and flips."""
    total = 0
    for scale in scales:
        scaled = F.interpolate(images, scale_factor=scale, mode="bilinear")
        total += resize(model(scaled), images).softmax(1)
        total += resize(model(scaled.flip(3)), images).softmax(1).flip(3)
    return total / (2 * len(scales))


@torch.no_grad()
def mean_iou(predict, batches, classes):
    """Mean intersection over union of the classes that occur, and accuracy of the pixels, in %.

    Labels may be any integers; those outside of 0 ... classes - 1 are ignored.
    """
    counts = torch.zeros(classes, classes, device=DEVICE).long()
    for images, labels in batches:
        labels = labels.long().to(DEVICE)
        found = resize(predict(images), labels).argmax(1)
        known = (labels >= 0) & (labels < classes)
        pairs = (classes * labels + found)[known]
        counts += pairs.bincount(minlength=classes ** 2).view(classes, classes)
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(counts)
    right = counts.diag()
    iou = right / (counts.sum(0) + counts.sum(1) - right)
    pixels = right.sum() / counts.sum()
    return 100 * iou.nanmean().item(), 100 * pixels.item()


def evaluate(model, items, args):
    """Mean IoU, and a line that says more."""
    pairs = ((normalize(image[None]), labels[None]) for image, labels in items)
    iou, pixels = mean_iou(model, pairs, len(items.dataset.classes))
    return iou, f"mean IoU {iou:.1f} %, {pixels:.1f} % of pixels"


@torch.no_grad()
def find(model, image):
    """Class of each pixel (H, W) of an image (3, H, W) uint8, on the CPU."""
    logits = model.eval()(normalize(image[None]))                   # (1, classes, H, W)
    return logits.argmax(1)[0].cpu()


def describe(labels, classes):
    """Label, text and mask of each class that occurs, and no boxes."""
    found = labels[labels != NONE].unique()
    masks = labels == found[:, None, None]                          # (n, H, W)
    texts = [classes[label] for label in found]
    return found.tolist(), texts, masks, ()


main, load_model, draw = dense.publish(sys.modules[__name__])

if __name__ == "__main__":
    dense.run_program(main)
