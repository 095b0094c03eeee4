"""RetinaNet and Mask R-CNN on ScalableViT (Table 3).  Needs pip install '.[detection]'

    python docs/detection.py                        a small RetinaNet on mosaics of digits
    python docs/detection.py --data DIR             on mosaics of images of DIR/{train,val}/CLASS/*
    torchrun --nproc_per_node=8 docs/detection.py --data COCO --model s --init published.pth
    python docs/detection.py --predict photo.jpg    writes photo.detection.png

COCO is a folder with {train,val}2017/ and annotations/instances_{train,val}2017.json.  The third
line is the paper's run, 8 x 2 images; one GPU takes 8 x 2 one after the other.  For the backward
pass S keeps 4.81 GiB per image of 800 x 1344 in float32, 0.23 GiB with --checkpointing.
"""
import contextlib
import functools
import io
import sys

import dense
import numpy as np
import torch
from dense_data import Coco as Data, objects_of as view  # noqa: F401
from dense import DEVICE, RANK, WORLD_SIZE, Pyramid, open_image  # noqa: F401
from pycocotools import coco, cocoeval
from pycocotools import mask as rle
from torchvision import ops
from torchvision.models.detection import MaskRCNN, RetinaNet, faster_rcnn, mask_rcnn as heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

RECIPES = {                  # Appendix C and Table 8
    "framework": {"retinanet": {}, "mask_rcnn": dict(lr=2e-4)},
    "schedule": {
        "1x": dict(epochs=12, fall=8 / 12),
        "3x": dict(epochs=36, fall=27 / 36, lr=1e-4, weight_decay=5e-2, min_size=480)}}
# Shorter sides are `size`, in training from `min_size`, longer ones at most 5/3 of that.  `anchor`
# is the smallest anchor's; `groups` are GroupNorm's in RetinaNet, `regions` those of an R-CNN step.
SETTINGS = dict(warmup_steps=500, size=800, min_size=800, anchor=32, groups=0, regions=512)
MOSAIC = dict(
    epochs=8, warmup_steps=50, batch_size=16, accum=1, lr=1e-3, power=0.9, fall=1.0, mosaics=1280,
    size=80, width=48, anchor=24, groups=8, regions=16, segment=600)
RATIOS = ((0.5, 1.0, 2.0),) * 5                                     # of anchors, for five maps


def retinanet(backbone, num_classes=81, width=256, anchor=32, groups=0, **kwargs):
    """torchvision's, on strides 8 to 128; P6 comes from the last map.  Classes with background."""
    sides = anchor * 2 ** (np.arange(15).reshape(5, 3) / 3)
    norm = functools.partial(torch.nn.GroupNorm, groups) if groups else None
    return RetinaNet(
        Pyramid(backbone, width, 1, LastLevelP6P7(backbone.num_features, width)),
        num_classes,
        anchor_generator=AnchorGenerator(sides.tolist(), RATIOS),
        head=RetinaNetHead(width, 9, num_classes, norm),
        **kwargs)


def mask_rcnn(backbone, num_classes=81, width=256, anchor=32, **kwargs):
    """torchvision's, on strides 4 to 64.  Width 256 gives the standard heads."""
    sides = tuple((anchor * 2 ** i,) for i in range(5))
    return MaskRCNN(
        Pyramid(backbone, width, 0, LastLevelMaxPool()),
        rpn_anchor_generator=AnchorGenerator(sides, RATIOS),
        box_head=faster_rcnn.TwoMLPHead(7 * 7 * width, 4 * width),
        box_predictor=faster_rcnn.FastRCNNPredictor(4 * width, num_classes),
        mask_head=heads.MaskRCNNHeads(width, (width,) * 4, 1),
        mask_predictor=heads.MaskRCNNPredictor(width, width, num_classes),
        **kwargs)


def build(backbone, num_classes, args):
    """The framework; images have min_size, ..., size rows or columns in training, size later."""
    sides = tuple(range(min(args.min_size, args.size), args.size + 1))
    kwargs = dict(
        width=args.width, anchor=args.anchor, min_size=sides, max_size=args.size * 1333 // 800)
    if args.framework == "retinanet":
        return retinanet(backbone, num_classes, groups=args.groups, **kwargs)
    return mask_rcnn(backbone, num_classes, box_batch_size_per_image=args.regions, **kwargs)


def loss(net, images, targets):
    """Sum of the losses that torchvision computes."""
    for target in targets:
        for name in target:
            target[name] = target[name].to(DEVICE)
    return sum(net([image.to(DEVICE) / 255 for image in images], targets).values())


@torch.no_grad()
def find(model, image, least=0.3, overlap=0.5):
    """Boxes, labels, scores and perhaps masks in an image (3, H, W) uint8; best first."""
    found = model.eval()([image.to(DEVICE) / 255])[0]                  # torchvision normalizes
    if "masks" in found:
        found["masks"] = found["masks"][:, 0] > 0.5                 # (n, H, W)
    kept = ops.nms(found["boxes"], found["scores"], overlap)        # of any classes
    kept = kept[found["scores"][kept] > least]
    return {name: value[kept].cpu() for name, value in found.items()}


def entries(number, objects):
    """Objects of an image as COCO's annotations."""
    columns = dict(
        category_id=objects["labels"].tolist(),
        bbox=ops.box_convert(objects["boxes"], "xyxy", "xywh").tolist(),
        score=objects.get("scores", objects["labels"]).tolist())
    for name in ("iscrowd", "area"):                                # of the truth
        if name in objects:
            columns[name] = objects[name].tolist()
    if "masks" in objects:
        masks = np.asarray(objects["masks"], np.uint8)
        columns["segmentation"] = [rle.encode(np.asfortranarray(mask)) for mask in masks]
    return [dict(zip(columns, row), image_id=number, id=10 ** 6 * number + i)
            for i, row in enumerate(zip(*columns.values()))]


def average_precision(truth, found, kind):
    """AP and AP50 in %, from pycocotools; `kind` is "bbox" or "segm"."""
    if not found:
        return 0.0, 0.0
    true = coco.COCO()
    true.dataset = truth
    with contextlib.redirect_stdout(io.StringIO()):                 # it prints
        true.createIndex()
        score = cocoeval.COCOeval(true, true.loadRes(found), kind)
        score.evaluate()
        score.accumulate()
        score.summarize()
    return (100 * score.stats[:2]).tolist()


def evaluate(model, items, args):
    """AP of boxes or, if there are any, masks; and a line that says more."""
    mine = []                                                       # (image, truth, found)
    for i, (image, target) in enumerate(items):
        number = RANK + i * WORLD_SIZE + 1
        _, H, W = image.shape
        size = dict(id=number, height=H, width=W)
        found = entries(number, find(model, image, 0, 1))
        mine.append((size, entries(number, target), found))
    everyone = [mine] * WORLD_SIZE
    if WORLD_SIZE > 1:
        torch.distributed.all_gather_object(everyone, mine)
    images, objects, found = zip(*sum(everyone, []))
    categories = [dict(id=label) for label in range(1, len(items.dataset.classes))]
    truth = dict(
        info={}, images=images, annotations=sum(objects, []), categories=categories)
    parts = []
    for kind in ("bbox", "segm") if args.framework == "mask_rcnn" else ("bbox",):
        ap, ap50 = average_precision(truth, sum(found, []), kind)
        parts.append(f"{kind} AP {ap:.1f} %, AP50 {ap50:.1f} %")
    return ap, "; ".join(parts)


def describe(objects, classes):
    """Label, text, mask and box of each object."""
    texts = [classes[label] for label in objects["labels"]]
    if "scores" in objects:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, objects["scores"])]
    return objects["labels"].tolist(), texts, objects.get("masks", ()), objects["boxes"]


main, load_model, draw = dense.publish(sys.modules[__name__])

if __name__ == "__main__":
    dense.run_program(main)
