"""RetinaNet and Mask R-CNN on ScalableViT (Table 3 of the paper), from torchvision.  Needs pip install '.[detection]'

    python docs/detection.py                        draws scenes, trains a small Mask R-CNN on them, prints its AP
    python docs/detection.py --data DIR --model s --init published.pth          the paper's run, on one GPU

DIR is a COCO folder: train2017/, val2017/ and annotations/instances_{train,val}2017.json.  Optimizer and schedule are by
default those of Appendix C; new layers are initialised as torchvision does it.  What is left out: several GPUs.
"""
import argparse
import contextlib
import io
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision import datasets, models, tv_tensors, utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms import v2

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))           # the file beside, not an installed copy
import scalablevit  # noqa: E402

SCHEDULES = {"1x": (12, (8 / 12, 11 / 12), [800]),                   # epochs; when of these the rate falls; shorter sides
             "3x": (36, (27 / 36, 33 / 36), range(480, 801))}
TABLE_8 = {("retinanet", "1x"): (1e-4, 1e-4), ("retinanet", "3x"): (1e-4, 5e-2),        # learning rate, weight decay
           ("mask_rcnn", "1x"): (2e-4, 1e-4), ("mask_rcnn", "3x"): (1e-4, 5e-2)}


class Pyramid(nn.Module):
    """Images (B, 3, H, W) -> {"0": (B, width, ⌈H/s⌉, ⌈W/s⌉), ...}: a feature pyramid on the maps from `first` on."""

    def __init__(self, backbone, first, width, extra):
        super().__init__()
        self.backbone, self.first, self.out_channels = backbone, first, width
        channels = [stage.embed.conv.out_channels for stage in backbone.stages]         # C_i, at strides 4, 8, 16, 32
        self.fpn = FeaturePyramidNetwork(channels[first:], width, extra)

    def forward(self, images):
        maps = self.backbone.forward_features(images)[self.first:]
        return self.fpn({str(i): m for i, m in enumerate(maps)})


def retinanet(backbone, num_classes=81, width=256, anchor=32, **kwargs):
    """torchvision's RetinaNet on strides 8 to 128; as in Table 3, P6 comes from the backbone's last map, P7 from P6.

    num_classes counts the background, as torchvision does; `anchor` is the side of the smallest anchor in pixels.
    """
    sides = tuple(tuple(anchor * 2 ** (i + j / 3) for j in range(3)) for i in range(5))
    extra = LastLevelP6P7(backbone.num_features, width)
    return models.detection.RetinaNet(Pyramid(backbone, 1, width, extra), num_classes,
                                      anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 5), **kwargs)


def mask_rcnn(backbone, num_classes=81, width=256, anchor=32, **kwargs):
    """torchvision's Mask R-CNN on strides 4 to 64.  Arguments as above; width 256 gives its usual heads."""
    sides = tuple((anchor * 2 ** i,) for i in range(5))
    return models.detection.MaskRCNN(
        Pyramid(backbone, 0, width, LastLevelMaxPool()),
        rpn_anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 5),
        box_head=TwoMLPHead(7 * 7 * width, 4 * width), box_predictor=FastRCNNPredictor(4 * width, num_classes),
        mask_head=MaskRCNNHeads(width, (width,) * 4, 1), mask_predictor=MaskRCNNPredictor(width, width, num_classes),
        **kwargs)


class Coco(datasets.CocoDetection):
    """(image, target) as torchvision's detectors take them; labels are 1, 2, ... in the order of COCO's category ids."""

    def __init__(self, root, split):
        with contextlib.redirect_stdout(io.StringIO()):             # pycocotools talks
            super().__init__(root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json")
        self.categories, self.training = sorted(self.coco.cats), split == "train"
        if self.training:
            self.ids = [i for i in self.ids if self.coco.getAnnIds(i, iscrowd=False)]

    def __getitem__(self, index):
        image, annotations = super().__getitem__(index)
        image = v2.functional.to_dtype(v2.functional.to_image(image), scale=True)       # (3, H, W) in [0, 1]
        objects = [a for a in annotations if not a["iscrowd"] and min(a["bbox"][2:]) > 0]
        boxes = torch.tensor([a["bbox"] for a in objects]).reshape(-1, 4)               # x, y, width, height
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=image.shape[1:])
        masks = np.array([self.coco.annToMask(a) for a in objects], np.uint8).reshape(-1, *image.shape[1:])
        target = {"boxes": v2.functional.convert_bounding_box_format(boxes, new_format="XYXY"),
                  "masks": tv_tensors.Mask(masks), "image_id": self.ids[index],
                  "labels": torch.tensor([self.categories.index(a["category_id"]) + 1 for a in objects])}
        return v2.RandomHorizontalFlip()(image, target) if self.training else (image, target)


def train(model, dataset, epochs, drops, batch_size, lr, weight_decay, warmup, workers=0):
    """AdamW; the rate rises over `warmup` steps and falls to a tenth at each of `drops`, parts of the whole (Appendix C)."""
    loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, num_workers=workers,
                                         collate_fn=lambda batch: tuple(zip(*batch)))
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    starts = [round(drop * epochs) * len(loader) for drop in drops]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * 0.1 ** sum(step >= start for start in starts))
    device = next(model.parameters()).device
    for epoch in range(1, epochs + 1):
        model.train()
        total, began = 0, time.time()
        for images, targets in loader:
            targets = [{k: v.to(device) for k, v in target.items() if k != "image_id"} for target in targets]
            loss = sum(model([image.to(device) for image in images], targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / len(loader)
        print(f"epoch {epoch} of {epochs}: loss {total:.3f}, {time.time() - began:.0f} s", flush=True)
        yield epoch


@torch.no_grad()
def evaluate(model, dataset):
    """{"bbox": (AP, AP50), "segm": (AP, AP50)} in %, by pycocotools; a model without masks has no "segm"."""
    model.eval()
    device, results = next(model.parameters()).device, {"bbox": []}
    for image, target in dataset:
        found = {k: v.cpu() for k, v in model([image.to(device)])[0].items()}
        for i, (x0, y0, x1, y1) in enumerate(found["boxes"].tolist()):
            result = {"image_id": target["image_id"], "score": found["scores"][i].item(),
                      "category_id": dataset.categories[found["labels"][i] - 1]}
            results["bbox"].append(result | {"bbox": [x0, y0, x1 - x0, y1 - y0]})
            if "masks" in found:
                mask = np.asfortranarray(found["masks"][i, 0] > 0.5, np.uint8)          # (H, W)
                results.setdefault("segm", []).append(result | {"segmentation": rle.encode(mask)})
    with contextlib.redirect_stdout(io.StringIO()):
        for kind, found in results.items():
            scores = COCOeval(dataset.coco, dataset.coco.loadRes(found), kind) if found else None
            if scores:
                scores.evaluate(), scores.accumulate(), scores.summarize()
            results[kind] = tuple(100 * scores.stats[:2]) if scores else (0.0, 0.0)
    return results


@torch.no_grad()
def picture(model, dataset, file, n=6):
    """Boxes and masks that score above 0.5 on the first n images, side by side (Figure 5); a colour is a class."""
    rows, colours = [], ["red", "lime", "cyan", "yellow", "magenta", "orange"]
    for image, _ in (dataset[i] for i in range(min(n, len(dataset)))):
        found = model.eval()([image.to(next(model.parameters()).device)])[0]
        sure = (found["scores"] > 0.5).cpu()
        boxes, labels = found["boxes"].cpu()[sure], found["labels"].cpu()[sure]
        paint = [colours[label % len(colours)] for label in labels]
        if len(boxes) and "masks" in found:
            image = utils.draw_segmentation_masks(image, found["masks"].cpu()[sure, 0] > 0.5, 0.6, paint)
        if len(boxes):
            image = utils.draw_bounding_boxes(image, boxes, colors=paint)
        rows.append(v2.functional.resize(image, [256]))
    utils.save_image(torch.cat(rows, dim=2), file)


def draw(root, split, n, seed, size=128):
    """n scenes of discs, squares and triangles as a COCO folder: up to five in each, the later in front of the earlier."""
    random, row, column = np.random.default_rng(seed), *np.mgrid[:size, :size]
    coco = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in
                                                            enumerate(("disc", "square", "triangle"), 1)]}
    folder = root / f"{split}2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for image_id in range(n):
        image, objects = np.broadcast_to(random.uniform(size=3), (size, size, 3)), []
        for _ in range(random.integers(1, 6)):
            kind, r = random.integers(3), size * random.uniform(0.08, 0.2)
            y, x = row - random.uniform(r, size - r), column - random.uniform(r, size - r)
            inside = (np.hypot(y, x) < r, np.maximum(abs(y), abs(x)) < 0.85 * r,
                      (abs(y) < r) & (abs(x) < (y + r) / 2))[kind]
            image = np.where(inside[:, :, None], random.uniform(size=3), image)
            objects = [(k, mask & ~inside) for k, mask in objects] + [(kind, inside)]
        noisy = (image + random.normal(scale=0.1, size=image.shape)).clip(0, 1)
        Image.fromarray((255 * noisy).astype(np.uint8)).save(folder / f"{image_id}.png")
        coco["images"].append({"id": image_id, "file_name": f"{image_id}.png", "height": size, "width": size})
        for kind, mask in objects:
            segmentation = rle.encode(np.asfortranarray(mask, np.uint8))
            if mask.sum() >= 30:                                    # the others are hidden
                coco["annotations"].append({
                    "id": len(coco["annotations"]) + 1, "image_id": image_id, "category_id": int(kind) + 1, "iscrowd": 0,
                    "bbox": rle.toBbox(segmentation).tolist(), "area": int(mask.sum()),
                    "segmentation": {"size": [size, size], "counts": segmentation["counts"].decode()}})
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco))
