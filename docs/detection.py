"""RetinaNet and Mask R-CNN on ScalableViT (Table 3).  Needs pip install '.[detection]'

    python docs/detection.py                        a small Mask R-CNN on mosaics of digits
    python docs/detection.py --data DIR             on mosaics of images of DIR/{train,val}/CLASS/*
    torchrun --nproc_per_node=8 docs/detection.py --data COCO --model s --init published.pth
    python docs/detection.py --predict photo.jpg    writes photo.detection.png

COCO is a folder with {train,val}2017/ and annotations/instances_{train,val}2017.json.  The third
line is the paper's run, 8 x 2 images; one GPU takes 8 x 2 one after the other.  For the backward
pass S keeps 4.81 GiB per image of 800 x 1344 in float32, 0.23 GiB with --checkpointing.  New layers
have torchvision's initialization.  In Python:

    model, classes = detection.load_model("runs/mask_rcnn/best.pt")
    image = detection.open_image("photo.jpg")
    detection.draw(image, detection.find(model, image), classes).save("found.png")
"""
import contextlib
import functools
import io
import pathlib
import sys

import dense
import numpy as np
import torch
from dense_data import Coco, objects_of
from dense import DEVICE, RANK, WORLD_SIZE, open_image  # noqa: F401
from PIL import ImageDraw
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import ops, utils
from torchvision.models.detection import MaskRCNN, RetinaNet, faster_rcnn, mask_rcnn as heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

CHOICES = {"framework": ["mask_rcnn", "retinanet"], "schedule": ["1x", "3x"],
           "model": ["tiny", "s", "b", "l"]}
SETTINGS = dict(             # Appendix C, Mask R-CNN, 1x
    epochs=12,
    warmup_steps=500,
    batch_size=2,            # images per process and backward pass
    accum=max(1, 8 // WORLD_SIZE),   # backward passes per step: 16 images
    lr=2e-4,                 # Table 8's, for 16 images per step; scaled linearly with their number
    weight_decay=1e-4,       # Table 8
    size=800,                # shorter side of an image; the longer is at most 5/3 of it
    min_size=800,            # smallest shorter side in training
    width=256,               # channels of the pyramid and the heads
    anchor=32,               # side of the smallest anchor in pixels
    proposals=2000,          # of Mask R-CNN's first stage
    mosaics=800,             # in an epoch, always fresh ones
    seed=0,
)
MOSAIC = dict(epochs=8, warmup_steps=50, batch_size=8, accum=1, lr=2e-3, size=80, min_size=80,
              width=48, anchor=16, proposals=200, mosaics=320)
FALLS = {"1x": (8 / 12, 11 / 12), "3x": (27 / 36, 33 / 36)}         # when the rate drops to a tenth
FOLDER = "annotations"
SURE = 0.5                                                          # the lowest score that is shown


def recipe(known):
    """The settings for a framework, a schedule and a kind of data."""
    chosen = dict(SETTINGS)
    if known["framework"] == "retinanet":
        chosen.update(lr=1e-4)
    if known["schedule"] == "3x":
        chosen.update(epochs=36, lr=1e-4, weight_decay=5e-2, min_size=480)
    if dense.is_mosaic(known["data"]):
        chosen.update(MOSAIC)
    return chosen


def schedule(args):
    """Steps in all, and between evaluations."""
    return args.epochs * args.steps_per_epoch, args.steps_per_epoch


def learning_rate(step, args):
    """Linear warm-up, then a tenth of it after each fall."""
    peak = args.lr * args.step_size / 16
    falls = sum(step >= fall * args.total for fall in FALLS[args.schedule])
    return peak * min(1, (step + 1) / max(1, args.warmup_steps)) * 0.1 ** falls


def load_data(args, split):
    if dense.is_mosaic(args.data):
        return dense.mosaics(args, split, objects_of)
    return Coco(pathlib.Path(args.data), split, args.framework == "mask_rcnn")


# ---------------------------------------------------------------------------- networks
class Pyramid(torch.nn.Module):
    """Feature pyramid on the maps from index `first`: {"0": (B, width, ⌈H/s⌉, ⌈W/s⌉), ...}."""

    def __init__(self, backbone, first, width, extra):
        super().__init__()
        self.backbone, self.first, self.out_channels = backbone, first, width
        self.fpn = ops.FeaturePyramidNetwork(backbone.channels[first:], width, extra)

    def forward(self, images):
        maps = self.backbone.forward_features(images)[self.first:]
        return self.fpn({str(i): m for i, m in enumerate(maps)})


def retinanet(backbone, num_classes=81, width=256, anchor=32, **kwargs):
    """torchvision's RetinaNet on strides 8 to 128; as in Table 3, P6 comes from the last map.

    num_classes includes the background; `anchor` is the side of the smallest anchor in pixels.
    """
    sides = []
    for i in range(5):
        sides.append(tuple(anchor * 2 ** (i + j / 3) for j in range(3)))
    pyramid = Pyramid(backbone, 1, width, LastLevelP6P7(backbone.num_features, width))
    anchors = AnchorGenerator(tuple(sides), ((0.5, 1.0, 2.0),) * 5)
    return RetinaNet(pyramid, num_classes, anchor_generator=anchors, **kwargs)


def mask_rcnn(backbone, num_classes=81, width=256, anchor=32, **kwargs):
    """torchvision's Mask R-CNN on strides 4 to 64.  Width 256 gives the standard heads."""
    sides = tuple((anchor * 2 ** i,) for i in range(5))
    return MaskRCNN(
        Pyramid(backbone, 0, width, LastLevelMaxPool()),
        rpn_anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 5),
        box_head=faster_rcnn.TwoMLPHead(7 * 7 * width, 4 * width),
        box_predictor=faster_rcnn.FastRCNNPredictor(4 * width, num_classes),
        mask_head=heads.MaskRCNNHeads(width, (width,) * 4, 1),
        mask_predictor=heads.MaskRCNNPredictor(width, width, num_classes), **kwargs)


def build(backbone, num_classes, args):
    """The framework for num_classes classes besides the background."""
    kwargs = dict(width=args.width, anchor=args.anchor, max_size=args.size * 1333 // 800)
    kwargs["min_size"] = tuple(range(min(args.min_size, args.size), args.size + 1))
    if args.framework == "retinanet":
        return retinanet(backbone, num_classes + 1, **kwargs)
    in_test = max(1, args.proposals // 2)
    return mask_rcnn(
        backbone, num_classes + 1, **kwargs, box_batch_size_per_image=min(512, in_test),
        rpn_pre_nms_top_n_train=args.proposals, rpn_post_nms_top_n_train=args.proposals,
        rpn_pre_nms_top_n_test=in_test, rpn_post_nms_top_n_test=in_test)


def scaled(image):
    return image.to(DEVICE).float() / 255                           # torchvision normalizes


def collate(batch):
    return tuple(zip(*batch))


def loss(net, images, targets):
    """Sum of the losses that torchvision computes."""
    used = ("boxes", "labels", "masks")
    moved = []
    for target in targets:
        moved.append({name: target[name].to(DEVICE) for name in used if name in target})
    return sum(net([scaled(image) for image in images], moved).values())


# ---------------------------------------------------------------------------- evaluation
@torch.no_grad()
def find(model, image):
    """Objects in an image (3, H, W) uint8, on the CPU: boxes, labels, scores and perhaps masks."""
    found = model.eval()([scaled(image)])[0]
    found = {name: value.cpu() for name, value in found.items()}
    if "masks" in found:
        found["masks"] = found["masks"][:, 0] > 0.5                 # (n, H, W)
    return found


def entries(image_id, objects):
    """Objects as COCO's annotations."""
    listed = []
    boxes = ops.box_convert(torch.as_tensor(objects["boxes"]), "xyxy", "xywh")
    for i, box in enumerate(boxes.tolist()):
        entry = dict(image_id=image_id, category_id=objects["labels"][i].item(), bbox=box)
        for theirs, ours in (("score", "scores"), ("iscrowd", "iscrowd"), ("area", "area")):
            if ours in objects:
                entry[theirs] = objects[ours][i].item()
        if "masks" in objects:
            mask = np.asfortranarray(objects["masks"][i], np.uint8)
            entry["segmentation"] = rle.encode(mask)
        listed.append(entry)
    return listed


def average_precision(images, truth, found, kind):
    """AP and AP50 in %, from pycocotools; `kind` is "bbox" or "segm"."""
    if not found:
        return 0.0, 0.0
    labels = {entry["category_id"] for entry in truth}
    for i, entry in enumerate(truth, 1):
        entry["id"] = i
    coco = COCO()
    coco.dataset = dict(info={}, images=images, annotations=truth,
                        categories=[dict(id=label) for label in sorted(labels)])
    with contextlib.redirect_stdout(io.StringIO()):                 # it prints
        coco.createIndex()
        score = COCOeval(coco, coco.loadRes(found), kind)
        score.evaluate()
        score.accumulate()
        score.summarize()
    return tuple((100 * score.stats[:2]).tolist())


def evaluate(model, dataset, args):
    """AP of boxes or, if there are any, masks; and a line that says more."""
    mine = [[], [], []]                                             # images, truth, found
    for i, (image, target) in enumerate(dense.share(dataset, args)):
        number = RANK + i * WORLD_SIZE + 1
        mine[0].append(dict(id=number, height=image.shape[1], width=image.shape[2]))
        mine[1].extend(entries(number, target))
        mine[2].extend(entries(number, find(model, image)))
    everyone = [mine]
    if WORLD_SIZE > 1:
        everyone = [None] * WORLD_SIZE
        torch.distributed.all_gather_object(everyone, mine)
    joined = [sum(lists, []) for lists in zip(*everyone)]
    parts = []
    for kind in ("bbox", "segm") if args.framework == "mask_rcnn" else ("bbox",):
        ap, ap50 = average_precision(*joined, kind)
        parts.append(f"{kind} AP {ap:.1f} %, AP50 {ap50:.1f} %")
    return ap, "; ".join(parts)


# ---------------------------------------------------------------------------- pictures
def draw(image, objects, classes):
    """As in Figure 5: boxes, masks and names on an image (3, H, W) uint8; small ones enlarged."""
    sure = objects.get("scores", torch.ones(len(objects["labels"]))) > SURE
    labels = objects["labels"][sure].tolist()
    paint = [dense.color(label) for label in labels]
    if labels and "masks" in objects:
        masks = torch.as_tensor(objects["masks"][sure]).bool()
        image = utils.draw_segmentation_masks(image, masks, alpha=0.5, colors=paint)
    picture, zoom = dense.enlarge(image)
    for i, box in enumerate((zoom * objects["boxes"][sure]).tolist()):
        ImageDraw.Draw(picture).rectangle(box, outline=paint[i], width=2)
        text = classes[labels[i] - 1]
        if "scores" in objects:
            text += f" {objects['scores'][sure][i]:.2f}"
        dense.write(picture, (box[0] + 4, box[1] + 2), text)
    return picture


def describe(objects, classes):
    """A line per object."""
    for i in (objects["scores"] > SURE).nonzero()[:, 0].tolist():
        box = [round(n) for n in objects["boxes"][i].tolist()]
        name = classes[objects["labels"][i] - 1]
        yield f"{name!a} {objects['scores'][i]:.2f}, box {box}"


load_model = functools.partial(dense.load_model, sys.modules[__name__])
main = functools.partial(dense.main, sys.modules[__name__])

if __name__ == "__main__":
    dense.run_program(sys.modules[__name__])
