"""Semantic FPN on ScalableViT: the backbone's four maps in, a class for every pixel out (Table 4 of the paper).

    python docs/semantic_fpn.py                    trains it on drawn shapes, beside a per-pixel classifier

After Panoptic Feature Pyramid Networks (Kirillov et al., 2019), in Table 4's sizes: 256 channels in the pyramid, 128 in
the head, the 150 classes of ADE20K.
"""
import pathlib
import sys

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))           # the file beside, not an installed copy
from scalablevit import scalablevit_tiny  # noqa: E402


class SemanticFPN(nn.Module):
    """Images (B, in_chans, H, W) of any size -> logits (B, num_classes, H, W).

    The backbone is a `ScalableViT` with num_classes=0; only its `forward_features` and its widths are used.
    """

    def __init__(self, backbone, num_classes=150, width=256, head=128):
        super().__init__()
        self.backbone = backbone
        dims = [stage.embed.conv.out_channels for stage in backbone.stages]             # C_i, at strides 4, 8, 16, 32
        self.lateral = nn.ModuleList(nn.Conv2d(C, width, 1) for C in dims)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in dims)
        self.scale = nn.ModuleList(                                # level i is doubled i times, and convolved each time
            nn.ModuleList(nn.Sequential(nn.Conv2d(head if j else width, head, 3, padding=1, bias=False),
                                        nn.BatchNorm2d(head), nn.ReLU()) for j in range(max(i, 1)))
            for i in range(len(dims)))
        self.classify = nn.Conv2d(head, num_classes, 1)

    def forward(self, images):
        maps = self.backbone.forward_features(images)                                   # (B, C_i, ⌈H/s⌉, ⌈W/s⌉)
        sizes = [m.shape[2:] for m in maps]
        pyramid = [lateral(m) for lateral, m in zip(self.lateral, maps)]                # (B, 256, ⌈H/s⌉, ⌈W/s⌉)
        for i in range(len(maps) - 1, 0, -1):                                           # top-down
            pyramid[i - 1] = pyramid[i - 1] + F.interpolate(pyramid[i], size=sizes[i - 1])
        total = 0
        for i, (x, smooth, layers) in enumerate(zip(pyramid, self.smooth, self.scale)):
            x = smooth(x)
            for j, layer in enumerate(layers):
                x = layer(x)
                if i > 0:
                    x = F.interpolate(x, size=sizes[i - 1 - j], mode="bilinear")
            total = total + x                                                           # (B, 128, ⌈H/4⌉, ⌈W/4⌉)
        return F.interpolate(self.classify(total), size=images.shape[2:], mode="bilinear")


def draw(n, size=64):
    """n images (n, 3, size, size) and labels (n, size, size): 0 background, 1 lying ellipses, 2 discs, 3 standing.

    Background and shapes draw their colours alike, so a pixel's colour says nothing about its class; the outline does.
    """
    images, labels = torch.randn(n, 3, 1, 1).repeat(1, 1, size, size), torch.zeros(n, size, size, dtype=torch.long)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for _ in range(4):                                                                  # later ones cover earlier ones
        kind, (y, x) = torch.randint(3, (n, 1, 1)), torch.rand(2, n, 1, 1) * size
        dy, dx, r = row - y, column - x, size * (0.1 + 0.1 * torch.rand(n, 1, 1))
        stretch = torch.tensor([2.0, 1.0, 0.5])[kind].sqrt()                            # equal areas
        inside = (dy * stretch).hypot(dx / stretch) < r
        labels = torch.where(inside, kind + 1, labels)
        images = torch.where(inside[:, None], torch.randn(n, 3, 1, 1), images)
    return images + 0.1 * torch.randn(images.shape), labels


def train(model, steps, batch=16, lr=1e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)            # Table 8
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)       # Appendix C
    for _ in range(steps):
        images, labels = draw(batch)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def mean_iou(model, batches=8):
    """Mean over the classes of (pixels in both prediction and label) / (pixels in either), on shapes drawn anew."""
    model.eval()
    pairs = [(labels, model(images).argmax(1)) for images, labels in (draw(32) for _ in range(batches))]
    counts = sum(torch.bincount((4 * a + b).flatten(), minlength=16).view(4, 4) for a, b in pairs)
    return (counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())).mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    by_pixel = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1))       # all that a colour tells
    for name, model in {"per-pixel classifier": by_pixel,
                        "Semantic FPN, tiny": SemanticFPN(scalablevit_tiny(num_classes=0), 4, 64, 32)}.items():
        print(f"{name:<22}mean IoU {100 * mean_iou(train(model, steps=500)):.1f} %", flush=True)
