"""docs/detection.py: a small COCO folder, the synthetic one, average precision, and the program itself."""
import json
import pathlib
import sys

import pytest
import torch
from PIL import Image, ImageDraw

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs"))

import dense
import detection
from scalablevit import scalablevit_tiny


@pytest.fixture
def folder(tmp_path):
    """A COCO folder: bright rectangles as polygons, categories 3 and 7, a crowd, and an image without objects."""
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        coco = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "wide"}, {"id": 7, "name": "high"}]}
        (tmp_path / f"{split}2017").mkdir()
        for i, boxes in enumerate([[(4, 6, 30, 12), (40, 2, 10, 40)], [(10, 20, 40, 10)], []]):
            image = Image.new("RGB", (60, 48))
            for x, y, w, h in boxes:
                ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill="white")
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                coco["annotations"].append({"id": len(coco["annotations"]) + 1, "image_id": 10 + i, "iscrowd": 0,
                                            "category_id": 3 if w > h else 7, "bbox": [x, y, w, h], "area": w * h,
                                            "segmentation": [corners]})
            image.save(tmp_path / f"{split}2017" / f"{i}.png")
            coco["images"].append({"id": 10 + i, "file_name": f"{i}.png", "height": 48, "width": 60})
        coco["annotations"].append({"id": 99, "image_id": 11, "category_id": 3, "iscrowd": 1, "bbox": [0, 0, 5, 5],
                                    "area": 25, "segmentation": {"size": [48, 60], "counts": [0, 5, 48 * 60 - 5]}})
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco))
    return tmp_path


def check(image, target):
    """Boxes and masks match the white regions of the image, and labels match the boxes' shapes."""
    masks = target["masks"].bool()
    assert torch.equal(masks.any(dim=0), image[0] > 0.5)
    boxes, labels = target["boxes"].int().tolist(), target["labels"].tolist()
    for mask, (x0, y0, x1, y1), label in zip(masks, boxes, labels, strict=True):
        assert mask[y0:y1, x0:x1].all() and mask.sum() == (x1 - x0) * (y1 - y0)
        assert label == (3 if x1 - x0 > y1 - y0 else 7)


def test_a_coco_folder(folder):
    """Training skips crowds and images without objects; flips apply to images, boxes and masks alike."""
    training = dense.coco(folder, "train")
    assert len(training) == 2 and len(dense.coco(folder, "val")) == 3
    left = set()
    for image, target in (training[i % 2] for i in range(20)):
        check(image, target)
        left.add(target["boxes"][0, 0].item())
    assert left == {4.0, 60 - 34.0, 10.0}                           # the second image's box is in the middle


class Oracle(torch.nn.Module):
    """A model that returns the ground truth, shifted by some pixels."""

    def __init__(self, dataset, by=0):
        super().__init__()
        self.answers, self.by = iter([target for _, target in dataset]), by

    def forward(self, images):
        target = next(self.answers)
        boxes, labels = target.get("boxes", torch.zeros(0, 4)), target.get("labels", torch.zeros(0, dtype=torch.long))
        masks = target.get("masks", torch.zeros(0, *images[0].shape[1:]))[:, None].float()
        return [{"boxes": boxes + self.by, "labels": labels, "scores": torch.ones(len(labels)),
                 "masks": masks.roll((self.by, self.by), (2, 3))}]


def test_average_precision(folder):
    """100 for exact detections, 0 for wrong ones, and in between for boxes with a known IoU."""
    dataset = dense.coco(folder, "val")
    assert detection.evaluate(Oracle(dataset), dataset) == {"bbox": pytest.approx((100, 100)),
                                                            "segm": pytest.approx((100, 100))}
    assert detection.evaluate(Oracle(dataset, by=24), dataset)["bbox"] == pytest.approx((0, 0))
    # Moved by 2: overlaps of 28·10 / 440, 8·38 / 496 and 38·8 / 496, IoU 0.64 and 0.61 twice: above 0.5, 0.55 and 0.6.
    assert detection.evaluate(Oracle(dataset, by=2), dataset)["bbox"] == pytest.approx((30, 100))


def test_no_detections_give_an_average_precision_of_zero(folder):
    dataset = dense.coco(folder, "val")
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0),
               "masks": torch.zeros(0, 1, 48, 60)}
    model = torch.nn.Identity()
    model.forward = lambda images: [nothing]
    assert detection.evaluate(model, dataset) == {"bbox": (0, 0), "segm": (0, 0)}


def test_the_synthetic_annotations_match_the_visible_shapes(tmp_path):
    """Masks of an image do not overlap, boxes are tight, and all three classes occur."""
    dense.draw_coco(tmp_path, "val", 20, 48)
    seen = set()
    for image, target in dense.coco(tmp_path, "val"):
        masks = target["masks"]
        assert image.shape == (3, 48, 48) and masks.sum(dim=0).max() == 1
        for mask, box, label in zip(masks, target["boxes"].tolist(), target["labels"].tolist()):
            row, column = mask.nonzero(as_tuple=True)
            assert box == [column.min(), row.min(), column.max() + 1, row.max() + 1]
            seen.add(label)
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("epochs, falls", [(12, (8, 11)), (36, (27, 33))])
def test_the_schedules_follow_appendix_c(epochs, falls):
    """500 warm-up steps; a tenth of the learning rate after each epoch that the appendix names."""
    per_epoch = 7330                                                # of COCO's 117266 images with objects, 16 a step
    _, parts, sides = detection.SCHEDULES["1x" if epochs == 12 else "3x"]
    rate = dense.multi_step(epochs * per_epoch, parts)
    assert [rate(n) for n in (0, 249, 499, 500)] == pytest.approx([1 / 500, 0.5, 1, 1])
    for i, fall in enumerate(falls):
        assert [rate(fall * per_epoch + n) for n in (-1, 1)] == pytest.approx([0.1 ** i, 0.1 ** (i + 1)])
    assert (min(sides), max(sides)) == ((800, 800) if epochs == 12 else (480, 800))


@pytest.mark.parametrize("framework", ["mask_rcnn", "retinanet"])
def test_every_parameter_gets_a_gradient(framework, folder):
    """With two images; except for the backbone's last norm, which only the classifier uses."""
    images, targets = zip(*(dense.coco(folder, "train")[i] for i in (0, 1)))
    model = getattr(detection, framework)(scalablevit_tiny(num_classes=0), 8, 16, 8, min_size=48, max_size=80)
    detection.loss(model, images, targets).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} \
        == {"backbone.backbone.norm.weight", "backbone.backbone.norm.bias"}


@pytest.mark.parametrize("framework", ["mask_rcnn", "retinanet"])
def test_the_program_trains_on_a_coco_folder(folder, tmp_path, monkeypatch, capsys, framework):
    command = f"--data {folder} --framework {framework} --epochs 1 --batch-size 2 --size 48 --output {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", ["detection.py", *command.split()])
    detection.main()
    printed = capsys.readouterr().out
    assert "step 1 of 1" in printed and printed.count("AP50") == 2
    model = getattr(detection, framework)(dense.pretrained("tiny"), 8)
    model.load_state_dict(torch.load(tmp_path / "out" / f"{framework}.pt", weights_only=True))
    assert Image.open(tmp_path / "out" / f"{framework}.png").size[1] == 256
