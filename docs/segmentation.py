"""Semantic FPN and UperNet on ScalableViT (Table 4 of the paper): four maps in, a class for every pixel out.

    python docs/segmentation.py                     trains both on drawn shapes, and prints their mean IoU
    python docs/segmentation.py --data DIR --framework upernet --model s --init published.pth       the paper's run

DIR is an ADE20K folder: images/{training,validation}/*.jpg and annotations/{training,validation}/*.png, where 0 is no
class and 1 to 150 are classes.  Optimizer, schedule and sizes are by default those of Appendix C; of augmentations it
names the random crop, and beside it there is a horizontal flip.  What is left out: several GPUs.
"""
import argparse
import pathlib
import sys
import time

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))           # the file beside, not an installed copy
import scalablevit  # noqa: E402

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)                           # of Table 4's MS (Section 4.3)


def conv(C_in, C_out, kernel_size=3):
    """Convolution, batch norm, ReLU; same size out."""
    return nn.Sequential(nn.Conv2d(C_in, C_out, kernel_size, padding=kernel_size // 2, bias=False),
                         nn.BatchNorm2d(C_out), nn.ReLU())


def resize(x, like):
    """x (B, C, h, w) at the size of `like` (…, H, W)."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear")


class SemanticFPN(nn.Module):
    """Panoptic Feature Pyramid Networks (Kirillov et al., 2019): images (B, in_chans, H, W) -> logits (B, classes, H, W).

    The backbone is a `ScalableViT` with num_classes=0; only its `forward_features` and its widths are used.
    """

    def __init__(self, backbone, num_classes=150, width=256, head=128):
        super().__init__()
        self.backbone = backbone
        channels = [stage.embed.conv.out_channels for stage in backbone.stages]         # C_i, at strides 4, 8, 16, 32
        self.lateral = nn.ModuleList(nn.Conv2d(C, width, 1) for C in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.scale = nn.ModuleList(                                # level i is doubled i times, and convolved each time
            nn.ModuleList(conv(head if j else width, head) for j in range(max(i, 1))) for i in range(len(channels)))
        self.classify = nn.Conv2d(head, num_classes, 1)

    def forward(self, images):
        pyramid = [lateral(m) for lateral, m in zip(self.lateral, self.backbone.forward_features(images))]
        for i in range(len(pyramid) - 1, 0, -1):                                        # (B, 256, ⌈H/s⌉, ⌈W/s⌉) each
            pyramid[i - 1] = pyramid[i - 1] + F.interpolate(pyramid[i], size=pyramid[i - 1].shape[2:])
        total = 0
        for i, (smooth, layers) in enumerate(zip(self.smooth, self.scale)):
            x = smooth(pyramid[i])
            for j, layer in enumerate(layers):
                x = layer(x)
                if i > 0:
                    x = resize(x, pyramid[i - 1 - j])
            total = total + x                                                           # (B, 128, ⌈H/4⌉, ⌈W/4⌉)
        return resize(self.classify(total), images)


class UperNet(nn.Module):
    """Unified Perceptual Parsing (Xiao et al., 2018) as MMSegmentation builds it: images -> logits (B, classes, H, W).

    A pyramid that begins with the last map pooled to 1, 2, 3 and 6 cells a side, and all of its levels joined.  In
    training there are two logits; the other ones, of an FCN head on the last but one map, weigh 0.4 in the loss.
    """

    def __init__(self, backbone, num_classes=150, width=512, head=256, bins=(1, 2, 3, 6)):
        super().__init__()
        self.backbone = backbone
        channels = [stage.embed.conv.out_channels for stage in backbone.stages]         # C_i, at strides 4, 8, 16, 32
        self.pool = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(channels[-1], width, 1)) for n in bins)
        self.bottleneck = conv(channels[-1] + len(bins) * width, width)
        self.lateral = nn.ModuleList(conv(C, width, 1) for C in channels[:-1])
        self.smooth = nn.ModuleList(conv(width, width) for _ in channels[:-1])
        self.join = conv(len(channels) * width, width)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, num_classes, 1))
        self.auxiliary = nn.Sequential(conv(channels[-2], head), nn.Dropout2d(0.1), nn.Conv2d(head, num_classes, 1))

    def forward(self, images):
        maps = self.backbone.forward_features(images)                                   # (B, C_i, ⌈H/s⌉, ⌈W/s⌉)
        pooled = [resize(pool(maps[-1]), maps[-1]) for pool in self.pool]               # (B, 512, ⌈H/32⌉, ⌈W/32⌉) each
        pyramid = [lateral(m) for lateral, m in zip(self.lateral, maps)]
        pyramid.append(self.bottleneck(torch.cat([maps[-1], *pooled], dim=1)))
        for i in range(len(pyramid) - 1, 0, -1):                                        # (B, 512, ⌈H/s⌉, ⌈W/s⌉) each
            pyramid[i - 1] = pyramid[i - 1] + resize(pyramid[i], pyramid[i - 1])
        levels = [smooth(level) for smooth, level in zip(self.smooth, pyramid)] + pyramid[-1:]
        joined = self.join(torch.cat([resize(level, levels[0]) for level in levels], dim=1))
        logits = resize(self.classify(joined), images)
        return (logits, resize(self.auxiliary(maps[-2]), images)) if self.training else logits


@torch.no_grad()
def multi_scale(model, images, scales=SCALES):
    """Probabilities (B, classes, H, W): the mean over the scales, and over the images and their mirror images (MS)."""
    total = 0
    for scale in scales:
        scaled = F.interpolate(images, size=[max(1, round(n * scale)) for n in images.shape[2:]], mode="bilinear")
        total = total + resize(model(scaled), images).softmax(dim=1)
        total = total + resize(model(scaled.flip(3)).flip(3), images).softmax(dim=1)
    return total / (2 * len(scales))


# ---------------------------------------------------------------------------- Data
def draw(n, size=64):
    """n images (n, 3, size, size) and labels (n, size, size): 0 background, 1 lying ellipses, 2 discs, 3 standing.

    A third tensor, like the labels, numbers the shapes from 1 on.  Background and shapes draw their colours alike, so a
    pixel's colour says nothing about its class; the outline does.
    """
    images, labels = torch.randn(n, 3, 1, 1).repeat(1, 1, size, size), torch.zeros(n, size, size, dtype=torch.long)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    numbers = labels
    for i in range(1, 5):                                                               # later ones cover earlier ones
        kind, (y, x) = torch.randint(3, (n, 1, 1)), torch.rand(2, n, 1, 1) * size
        dy, dx, r = row - y, column - x, size * (0.1 + 0.1 * torch.rand(n, 1, 1))
        stretch = torch.tensor([2.0, 1.0, 0.5])[kind].sqrt()                            # equal areas
        inside = (dy * stretch).hypot(dx / stretch) < r
        labels, numbers = torch.where(inside, kind + 1, labels), torch.where(inside, i, numbers)
        images = torch.where(inside[:, None], torch.randn(n, 3, 1, 1), images)
    return images + 0.1 * torch.randn(images.shape), labels, numbers


class ADE20K(torch.utils.data.Dataset):
    """(image (3, H, W), labels (H, W): 0 to 149, and 255 for none) of one split, "training" or "validation".

    The image's shorter side becomes `size`, its longer one at most 4 · size; for training, size x size of it are cut out.
    Labels for validation keep their own size.
    """

    def __init__(self, root, split, size=512):
        self.images = sorted((root / "images" / split).glob("*.jpg"))
        if not self.images:
            raise FileNotFoundError(f"no images in {root / 'images' / split}/*.jpg")
        self.annotations, self.training = root / "annotations" / split, split == "training"
        self.resize = v2.Resize(size, max_size=4 * size)
        self.cut = v2.Compose([v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}),
                               v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        file = self.images[index]
        image = v2.functional.to_image(Image.open(file).convert("RGB"))
        labels = tv_tensors.Mask(Image.open(self.annotations / f"{file.stem}.png")) - 1  # of 8 bits: 0 becomes 255
        image = self.resize(v2.functional.to_dtype(image, scale=True))
        image = v2.functional.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        if self.training:
            image, labels = self.cut(image, self.resize(tv_tensors.Mask(labels)))
        return image, labels[0].long()


# ---------------------------------------------------------------------------- Training
def pretrained(name, file=None):
    """The backbone scalablevit_NAME without a head; with the weights of a file, a published one or train_minimal.py's."""
    backbone = getattr(scalablevit, f"scalablevit_{name}")(num_classes=0)
    if file:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        weights = weights.get("model", weights)
        if "patch_embeds.0.proj.weight" in weights:
            weights = scalablevit.convert_official(weights)
        backbone.load_state_dict({key: w for key, w in weights.items() if not key.startswith("head.")})
    return backbone


def train(model, steps, batches=None, lr=1e-3, weight_decay=1e-4, power=0.9):
    """On batches (images, labels), or on drawn ones; AdamW, and a rate that falls to 0 by this power (Appendix C)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power)
    device = next(model.parameters()).device
    model.train()
    for step in range(1, steps + 1):
        images, labels = (t.to(device) for t in (next(batches) if batches else draw(16)[:2]))
        logits, *auxiliary = outputs if isinstance(outputs := model(images), tuple) else (outputs,)
        losses = [F.cross_entropy(out, labels, ignore_index=255) for out in (logits, *auxiliary)]
        optimizer.zero_grad()
        (losses[0] + 0.4 * sum(losses[1:])).backward()
        optimizer.step()
        schedule.step()
        if batches and step % 50 == 0:
            print(f"step {step} of {steps}: loss {losses[0].item():.3f}", flush=True)
    return model


@torch.no_grad()
def mean_iou(predict, batches, classes=4):
    """Mean over the classes of (pixels in both prediction and label) / (pixels in either), in %.

    predict gives logits or probabilities for images; of batches (images, labels), labels of 255 do not count.
    """
    counts = torch.zeros(classes, classes)
    for images, labels in batches:
        found = resize(predict(images), labels).argmax(1)
        pairs = (classes * labels + found.cpu())[labels < classes]
        counts += torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)
    return 100 * (counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())).nanmean().item()
