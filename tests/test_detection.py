"""docs/detection.py: average precision and pictures.  Settings and the training loop are in test_dense_runs.py."""
import argparse
import pathlib
import sys

import pytest
import torch
from torchvision.transforms import v2

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs"))

import dense
import detection

OBJECTS = [[4, 6, 34, 18], [40, 2, 50, 42]]


class Listed(list):
    """A data set of (image, target), asked for by (index, seed) as all here."""
    classes = ["background", "thing"]

    def __getitem__(self, key):
        return super().__getitem__(key[0])


def one_image(*boxes, iscrowd=0):
    """A data set of one image with these objects, the last one perhaps a crowd."""
    masks = torch.zeros(len(boxes), 48, 60, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[top:bottom, left:right] = 1
    return Listed([(torch.zeros(3, 48, 60, dtype=torch.uint8), {
        "boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.ones(len(boxes), dtype=torch.long),
        "iscrowd": torch.tensor([0] * (len(boxes) - 1) + [iscrowd]), "area": masks.sum((1, 2)), "masks": masks})])


class Oracle(torch.nn.Module):
    """A model that returns the truth, shifted by some pixels."""

    def __init__(self, dataset, by=0):
        super().__init__()
        self.answers = iter([dataset[i, i][1] for i in range(len(dataset))])
        self.by = by

    def forward(self, images):
        target = next(self.answers)
        return [{"boxes": target["boxes"] + self.by, "labels": target["labels"],
                 "scores": torch.ones(len(target["labels"])),
                 "masks": target["masks"][:, None].float().roll((self.by, self.by), (2, 3))}]


def evaluate(model, dataset, framework="retinanet"):
    args = argparse.Namespace(framework=framework, workers=0, bf16=False)
    return dense.evaluate(detection, model, dataset, args)


def test_average_precision_is_100_for_the_truth_and_0_for_wrong_or_no_detections():
    data = one_image(*OBJECTS)
    score, text = evaluate(Oracle(data), data, "mask_rcnn")
    assert score == pytest.approx(100)
    assert text == "bbox AP 100.0 %, AP50 100.0 %; segm AP 100.0 %, AP50 100.0 %"
    assert evaluate(Oracle(data, by=40), data, "mask_rcnn")[0] == pytest.approx(0, abs=0.1)
    model = torch.nn.Identity()
    model.forward = lambda images: [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long),
                                     "scores": torch.zeros(0), "masks": torch.zeros(0, 1, 48, 60)}]
    assert evaluate(model, data, "mask_rcnn")[0] == 0


def test_average_precision_with_a_known_overlap():
    """Moved by 2: 28·10 / (2·30·12 - 280) = 0.64 and 8·38 / (2·10·40 - 304) = 0.61: above 0.5, 0.55 and 0.6."""
    data = one_image(*OBJECTS)
    score, text = evaluate(Oracle(data, by=2), data)
    assert score == pytest.approx(30)
    assert text == "bbox AP 30.0 %, AP50 100.0 %"


@pytest.mark.parametrize("iscrowd", [0, 1])
def test_a_crowd_excuses_detections_in_it(iscrowd):
    """Two objects are found, and three more in a crowd: they are no mistakes; without the crowd they are."""
    data = one_image(*OBJECTS, [0, 20, 30, 48], iscrowd=iscrowd)
    found = one_image([1, 22, 9, 30], [11, 22, 19, 30], [21, 22, 29, 30], *OBJECTS)
    score, _ = evaluate(Oracle(found), data)
    assert (score == pytest.approx(100)) == bool(iscrowd)


@pytest.mark.parametrize("H, W", [(40, 90), (90, 40), (700, 500)])
def test_an_image_of_any_shape_is_drawn_with_its_boxes_and_names(H, W):
    image = torch.full((3, H, W), 255, dtype=torch.uint8)
    objects = {"boxes": torch.tensor([[5.0, 6, 35, 36]]), "labels": torch.tensor([1]),
               "scores": torch.tensor([0.934]), "masks": torch.zeros(1, H, W, dtype=torch.bool)}
    picture = detection.draw(image, objects, ["background", "cat"])
    zoom = picture.width / W
    assert picture.height == zoom * H
    assert min(picture.size) >= 160
    drawn = (255 - v2.functional.pil_to_tensor(picture).int()).sum(0).nonzero()
    assert drawn[:, 1].min() == pytest.approx(5 * zoom, abs=2)
    assert drawn[:, 0].max() == pytest.approx(36 * zoom, abs=2)
    assert detection.describe(objects, ["background", "cat"])[1] == ["cat 0.93"]


def test_only_sure_objects_are_found():
    data = one_image(*OBJECTS)
    model = Oracle(data)
    model.forward = lambda images: [{"boxes": data[0, 0][1]["boxes"], "scores": torch.tensor([0.9, 0.2])}]
    assert detection.find(model, data[0, 0][0])["boxes"].tolist() == [OBJECTS[0]]
