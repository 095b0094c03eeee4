"""Semantic FPN and UperNet on ScalableViT (Table 4 of the paper): from four feature maps to a class for every pixel.

    python docs/segmentation.py                     train both on synthetic shapes, print their mean IoU
    python docs/segmentation.py --data DIR --framework upernet --model s --init published.pth       the paper's run

DIR is an ADE20K folder: images/{training,validation}/*.jpg and annotations/{training,validation}/*.png, where 0 is
unlabeled and 1 to 150 are the classes.  By default, optimizer, schedule, sizes and random crop are Appendix C's, which
does not mention the horizontal flip.
"""
import itertools
import time

import torch
import torch.nn.functional as F
from torch import nn

import dense

TABLE_8 = {"semantic_fpn": (80_000, 0.9, 1e-4, 1e-4),               # steps, power of the schedule, learning rate,
           "upernet": (160_000, 1.0, 6e-5, 1e-2)}                   # weight decay; the first two from Appendix C
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)                           # for MS in Table 4 (Section 4.3)


def conv(C_in, C_out, kernel_size=3):
    """Convolution, batch norm, ReLU; keeps the size."""
    return nn.Sequential(nn.Conv2d(C_in, C_out, kernel_size, padding=kernel_size // 2, bias=False),
                         nn.BatchNorm2d(C_out), nn.ReLU())


def resize(x, like):
    """Resize x (B, C, h, w) to the size of `like` (…, H, W)."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear")


class SemanticFPN(nn.Module):
    """Panoptic Feature Pyramid Networks (Kirillov et al., 2019): images (B, 3, H, W) -> logits (B, classes, H, W).

    The backbone is a `ScalableViT` with num_classes=0; only `forward_features` and the stages' widths are used.
    """

    def __init__(self, backbone, num_classes=150, width=256, head=128):
        super().__init__()
        self.backbone = backbone
        channels = backbone.channels
        self.lateral = nn.ModuleList(nn.Conv2d(C, width, 1) for C in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.scale = nn.ModuleList(                                # level i: i times convolution and 2x upsampling
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
    """Unified Perceptual Parsing (Xiao et al., 2018) as in MMSegmentation: images -> logits (B, classes, H, W).

    A feature pyramid on top of pyramid pooling (1, 2, 3 and 6 bins per side) of the last map; its levels are fused.  In
    training it also returns the logits of an auxiliary FCN head on the second-to-last map, weighted 0.4 in the loss.
    """

    def __init__(self, backbone, num_classes=150, width=512, head=256, bins=(1, 2, 3, 6)):
        super().__init__()
        self.backbone = backbone
        channels = backbone.channels
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
    """Multi-scale testing (MS): probabilities (B, classes, H, W), averaged over scales and horizontal flips."""
    total = 0
    for scale in scales:
        scaled = F.interpolate(images, size=[max(1, round(n * scale)) for n in images.shape[2:]], mode="bilinear")
        total = total + resize(model(scaled), images).softmax(dim=1)
        total = total + resize(model(scaled.flip(3)).flip(3), images).softmax(dim=1)
    return total / (2 * len(scales))


def drawn(n=16):
    """Endless batches (images, labels) of synthetic shapes."""
    while True:
        yield dense.draw(n)[:2]


def loss(model, images, labels):
    """Cross-entropy; auxiliary logits have weight 0.4."""
    outputs = model(images.to(dense.DEVICE))
    losses = [F.cross_entropy(logits, labels.to(dense.DEVICE), ignore_index=255)
              for logits in (outputs if isinstance(outputs, tuple) else (outputs,))]
    return losses[0] + 0.4 * sum(losses[1:])


def train(model, steps, batches=None, power=0.9, lr=1e-3, weight_decay=1e-4, report=None):
    """Train with polynomial learning rate decay (Appendix C), on synthetic shapes if no batches are given."""
    return dense.train(model, loss, batches or drawn(), steps, dense.polynomial(steps, power), lr, weight_decay,
                       report)


@torch.no_grad()
def mean_iou(predict, batches, classes=4):
    """Mean intersection over union of the classes, in %.

    predict maps images to logits or probabilities; batches are (images, labels), where labels of 255 are ignored.
    """
    counts = torch.zeros(classes, classes, dtype=torch.long)
    for images, labels in batches:
        found = resize(predict(images), labels).argmax(1).cpu()
        pairs = (classes * labels + found)[labels < classes]
        counts += torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)
    return 100 * (counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())).nanmean().item()


FRAMEWORKS = {"semantic_fpn": SemanticFPN, "upernet": UperNet}


def train_on_drawn(args):
    """Train small versions of both frameworks; print their mean IoU on held-out shapes before and after."""
    held_out = list(itertools.islice(drawn(32), 8))
    for make in FRAMEWORKS.values():
        model = make(dense.pretrained(args.model, args.init), 4, width=64, head=32).to(dense.DEVICE).eval()
        untrained, start = mean_iou(model, held_out), time.time()
        train(model, args.steps or 800)
        seconds, trained = time.time() - start, mean_iou(model, held_out)
        print(f"{make.__name__}: mean IoU {untrained:.1f} % untrained, {trained:.1f} % trained ({seconds:.0f} s), "
              f"{mean_iou(lambda images: multi_scale(model, images), held_out):.1f} % MS", flush=True)


def train_on_ade20k(args):
    steps, power, lr, weight_decay = TABLE_8[args.framework]
    training, validation = (dense.ADE20K(args.data, split, args.size) for split in ("training", "validation"))
    model = FRAMEWORKS[args.framework](dense.pretrained(args.model, args.init)).to(dense.DEVICE)
    batches = dense.batches(training, args.batch_size, args.workers)
    train(model, args.steps or steps, batches, power, args.lr or lr, weight_decay,
          lambda: dense.save(model, args.output / f"{args.framework}.pt"))
    held_out = torch.utils.data.DataLoader(validation, num_workers=args.workers)
    for name, predict in {"one scale": model, "MS": lambda images: multi_scale(model, images)}.items():
        print(f"mean IoU, {name}: {mean_iou(lambda images: predict(images.to(dense.DEVICE)), held_out, 150):.1f} %")


def main():
    parser = dense.arguments("Semantic FPN and UperNet on ScalableViT.", [*FRAMEWORKS], "an ADE20K folder")
    parser.add_argument("--steps", type=int, help="training steps (default: Appendix C's)")
    parser.add_argument("--size", type=int, default=512, help="of crops, and of the shorter side in validation")
    args = parser.parse_args()
    torch.manual_seed(0)
    train_on_ade20k(args) if args.data else train_on_drawn(args)


if __name__ == "__main__":
    main()
