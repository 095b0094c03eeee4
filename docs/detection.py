"""RetinaNet and Mask R-CNN on ScalableViT (Table 3 of the paper), from torchvision.  Needs pip install '.[detection]'

    python docs/detection.py                        train a small Mask R-CNN on synthetic scenes, print its AP
    python docs/detection.py --data DIR --model s --init published.pth          the paper's run, on one GPU

DIR is a COCO folder: train2017/, val2017/ and annotations/instances_{train,val}2017.json.  Optimizer and schedule
default to Appendix C's; new layers have torchvision's initialization; torchvision normalizes the images.  A stopped run
cannot be resumed, and a run replaces the files of an earlier one in --output.
"""
import contextlib
import copy
import io
import pathlib
import tempfile

import numpy as np
import torch
from torchvision import ops, utils
from torchvision.models.detection import MaskRCNN, RetinaNet, faster_rcnn, mask_rcnn as heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms import v2

import dense

SCHEDULES = {"1x": (12, (8 / 12, 11 / 12), (800,)),                  # epochs; fractions of them after which the rate
             "3x": (36, (27 / 36, 33 / 36), tuple(range(480, 801)))}         # drops to a tenth; shorter sides of images
TABLE_8 = {("retinanet", "1x"): (1e-4, 1e-4), ("retinanet", "3x"): (1e-4, 5e-2),        # learning rate, weight decay
           ("mask_rcnn", "1x"): (2e-4, 1e-4), ("mask_rcnn", "3x"): (1e-4, 5e-2)}


class Pyramid(torch.nn.Module):
    """Feature pyramid on the backbone's maps from index `first`: images -> {"0": (B, width, ⌈H/s⌉, ⌈W/s⌉), ...}."""

    def __init__(self, backbone, first, width, extra):
        super().__init__()
        self.backbone, self.first, self.out_channels = backbone, first, width
        self.fpn = ops.FeaturePyramidNetwork(backbone.channels[first:], width, extra)

    def forward(self, images):
        maps = self.backbone.forward_features(images)[self.first:]
        return self.fpn({str(i): m for i, m in enumerate(maps)})


def retinanet(backbone, num_classes=81, width=256, anchor=32, **kwargs):
    """torchvision's RetinaNet on strides 8 to 128; as in Table 3, P6 comes from the backbone's last map, P7 from P6.

    num_classes includes the background, as in torchvision; `anchor` is the side of the smallest anchor in pixels.
    """
    sides = tuple(tuple(anchor * 2 ** (i + j / 3) for j in range(3)) for i in range(5))
    return RetinaNet(Pyramid(backbone, 1, width, LastLevelP6P7(backbone.num_features, width)), num_classes,
                     anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 5), **kwargs)


def mask_rcnn(backbone, num_classes=81, width=256, anchor=32, **kwargs):
    """torchvision's Mask R-CNN on strides 4 to 64.  Arguments as above; width 256 gives the standard heads."""
    anchors = AnchorGenerator(tuple((anchor * 2 ** i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
    return MaskRCNN(Pyramid(backbone, 0, width, LastLevelMaxPool()), rpn_anchor_generator=anchors,
                    box_head=faster_rcnn.TwoMLPHead(7 * 7 * width, 4 * width),
                    box_predictor=faster_rcnn.FastRCNNPredictor(4 * width, num_classes),
                    mask_head=heads.MaskRCNNHeads(width, (width,) * 4, 1),
                    mask_predictor=heads.MaskRCNNPredictor(width, width, num_classes), **kwargs)


def loss(model, images, targets):
    """Sum of the losses that torchvision computes."""
    targets = [{k: v.to(dense.DEVICE) for k, v in target.items() if k != "image_id"} for target in targets]
    return sum(model([image.to(dense.DEVICE) for image in images], targets).values())


@torch.no_grad()
def detect(model, image):
    """Detections in one image (3, H, W), on the CPU: boxes, labels, scores and, for Mask R-CNN, masks."""
    return {name: found.cpu() for name, found in model.eval()([image.to(dense.DEVICE)])[0].items()}


def evaluate(model, dataset):
    """AP and AP50 in %, rounded to one decimal, from pycocotools: {"bbox": (AP, AP50)}, and "segm" for masks."""
    from pycocotools import cocoeval, mask
    results = []
    for image, target in dataset:
        found = detect(model, image)
        for i, box in enumerate(ops.box_convert(found["boxes"], "xyxy", "xywh").tolist()):
            results.append({"image_id": target["image_id"], "category_id": found["labels"][i].item(), "bbox": box,
                            "score": found["scores"][i].item()})
            if "masks" in found:
                results[-1]["segmentation"] = mask.encode(np.asfortranarray(found["masks"][i, 0] > 0.5, np.uint8))
    kinds = ("bbox", "segm") if "masks" in found else ("bbox",)
    if not results:
        return {kind: (0.0, 0.0) for kind in kinds}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = copy.deepcopy(dataset.coco)                         # pycocotools modifies its masks
        scores = [cocoeval.COCOeval(truth, truth.loadRes(results), kind) for kind in kinds]
        for score in scores:
            score.evaluate(), score.accumulate(), score.summarize()
    return {kind: tuple((100 * score.stats[:2]).round(1).tolist()) for kind, score in zip(kinds, scores)}


def picture(model, dataset, file, n=6):
    """As in Figure 5: the first n images with boxes and masks of scores above 0.5, colored by class."""
    shown, colors = [], ("red", "lime", "cyan", "yellow", "magenta", "orange")
    for i in range(min(n, len(dataset))):
        image, found = dataset[i][0], detect(model, dataset[i][0])
        sure = found["scores"] > 0.5
        paint = [colors[label % len(colors)] for label in found["labels"][sure].tolist()]
        if paint and "masks" in found:
            image = utils.draw_segmentation_masks(image, found["masks"][sure, 0] > 0.5, alpha=0.5, colors=paint)
        if paint:
            image = utils.draw_bounding_boxes(image, found["boxes"][sure], colors=paint)
        shown.append(v2.functional.resize(image, [256]))            # (3, 256, W)
    utils.save_image(torch.cat(shown, dim=2), file)


def run(args, **kwargs):
    """Train on args.data, evaluate before and after, and save a picture; kwargs go to the framework."""
    epochs, falls, sides = SCHEDULES[args.schedule]
    epochs, sides = args.epochs or epochs, (args.size,) if args.size else sides
    lr, weight_decay = TABLE_8[args.framework, args.schedule]
    training, held_out = dense.coco(args.data, "train"), dense.coco(args.data, "val")
    steps = epochs * max(1, len(training) // args.batch_size)
    make = {"mask_rcnn": mask_rcnn, "retinanet": retinanet}[args.framework]
    model = make(dense.pretrained(args.model, args.init), max(training.coco.cats) + 1, min_size=sides,
                 max_size=sides[-1] * 1333 // 800, **kwargs).to(dense.DEVICE)
    print("AP and AP50, untrained:", evaluate(model, held_out), flush=True)
    batches = dense.batches(training, args.batch_size, args.workers, lambda batch: tuple(zip(*batch)))
    dense.train(model, loss, batches, steps, dense.multi_step(steps, falls), args.lr or lr, weight_decay,
                lambda: dense.save(model, args.output / f"{args.framework}.pt"))
    print("AP and AP50, trained:", evaluate(model, held_out), flush=True)
    picture(model, held_out, args.output / f"{args.framework}.png")


def main():
    parser = dense.arguments("RetinaNet and Mask R-CNN on ScalableViT.", ["mask_rcnn", "retinanet"], "a COCO folder")
    parser.add_argument("--schedule", choices=SCHEDULES, default="1x")
    parser.add_argument("--epochs", type=int, help="number of epochs (default: the schedule's)")
    parser.add_argument("--size", type=int, help="shorter side of all images (default: the schedule's)")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.data:
        return run(args)
    with tempfile.TemporaryDirectory() as folder:
        args.data, args.epochs, args.size, args.batch_size, args.lr = pathlib.Path(folder), 6, 96, 8, 1e-3
        dense.draw_coco(args.data, "train", 800, args.size)
        dense.draw_coco(args.data, "val", 100, args.size)
        run(args, width=48, anchor=16, box_batch_size_per_image=64, rpn_pre_nms_top_n_train=300,
            rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100)


if __name__ == "__main__":
    main()
