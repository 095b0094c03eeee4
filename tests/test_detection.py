"""docs/detection.py: schedules, losses, average precision, and pictures.  The loop is in test_dense_runs.py."""
import argparse
import pathlib
import sys

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs"))

import dense
import detection
from dense_data import Mosaics, objects_of
from scalablevit import scalablevit_tiny

ARGS = argparse.Namespace(framework="mask_rcnn", workers=0)
BOXES = argparse.Namespace(framework="retinanet", workers=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four mosaics of two classes."""
    root = tmp_path_factory.mktemp("classes")
    for name, color in (("green", (0, 250, 0)), ("red", (250, 0, 0))):
        (root / name).mkdir()
        Image.new("RGB", (20, 30), color).save(root / name / "0.png")
    return Mosaics(root, 4, 48, objects_of)


# ---------------------------------------------------------------------------- Appendix C
@pytest.mark.parametrize("name, epochs, falls", [("1x", 12, (8, 11)), ("3x", 36, (27, 33))])
def test_the_schedules_follow_appendix_c(name, epochs, falls):
    """500 warm-up steps; a tenth of the learning rate after each epoch that the appendix names."""
    per_epoch = 7330                                                # of COCO's 117266 images with objects, 16 a step
    args = argparse.Namespace(schedule=name, lr=1.0, step_size=16, total=epochs * per_epoch, warmup_steps=500)
    for step, rate in ((0, 1 / 500), (249, 0.5), (499, 1), (500, 1)):
        assert detection.learning_rate(step, args) == pytest.approx(rate)
    for i, fall in enumerate(falls):
        assert detection.learning_rate(fall * per_epoch - 1, args) == pytest.approx(0.1 ** i)
        assert detection.learning_rate(fall * per_epoch + 1, args) == pytest.approx(0.1 ** (i + 1))


@pytest.mark.parametrize("framework, schedule, lr, weight_decay, epochs, sides", [
    ("retinanet", "1x", 1e-4, 1e-4, 12, (800, 800)), ("retinanet", "3x", 1e-4, 5e-2, 36, (480, 800)),
    ("mask_rcnn", "1x", 2e-4, 1e-4, 12, (800, 800)), ("mask_rcnn", "3x", 1e-4, 5e-2, 36, (480, 800))])
def test_the_settings_are_table_8s(framework, schedule, lr, weight_decay, epochs, sides, tmp_path):
    command = ["--framework", framework, "--schedule", schedule, "--data", "coco", "--output", str(tmp_path)]
    args, _ = dense.parse_args(detection, command)
    assert (args.lr, args.weight_decay, args.epochs) == (lr, weight_decay, epochs)
    assert args.step_size == 16
    with torch.device("meta"):
        model = detection.build(scalablevit_tiny(num_classes=0), 80, args)
    assert (min(model.transform.min_size), max(model.transform.min_size)) == sides
    assert model.transform.min_size[-1] == 800                      # the last one is for evaluation
    assert model.transform.max_size == 1333


@pytest.mark.parametrize("framework", ["mask_rcnn", "retinanet"])
def test_every_trained_parameter_gets_a_gradient(framework, dataset):
    """So that DistributedDataParallel finds each; the backbone's last norm, which only a classifier uses, is frozen."""
    images, targets = detection.collate([dataset[0, 0], dataset[1, 1]])
    args, _ = dense.parse_args(detection, ["--framework", framework, "--output", "none", "--no-fuse"])
    model = dense.build_model(detection, args, {}, ["a", "b"])
    detection.loss(model, images, targets).backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()


# ---------------------------------------------------------------------------- average precision
class Oracle(torch.nn.Module):
    """A model that returns the truth, shifted by some pixels."""

    def __init__(self, dataset, by=0, masks=True):
        super().__init__()
        self.answers = iter([dataset[i, i][1] for i in range(len(dataset))])
        self.by, self.masks = by, masks

    def forward(self, images):
        target = next(self.answers)
        found = {"boxes": target["boxes"] + self.by, "labels": target["labels"],
                 "scores": torch.ones(len(target["labels"]))}
        if self.masks:
            found["masks"] = target["masks"][:, None].float().roll((self.by, self.by), (2, 3))
        return [found]


def test_the_truth_has_an_average_precision_of_100(dataset):
    score, text = detection.evaluate(Oracle(dataset), dataset, ARGS)
    assert score == pytest.approx(100)
    assert text == "bbox AP 100.0 %, AP50 100.0 %; segm AP 100.0 %, AP50 100.0 %"


def test_wrong_detections_have_an_average_precision_of_0(dataset):
    assert detection.evaluate(Oracle(dataset, by=40), dataset, ARGS)[0] == pytest.approx(0, abs=0.1)


def test_no_detections_have_an_average_precision_of_0(dataset):
    model = torch.nn.Identity()
    model.forward = lambda images: [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long),
                                     "scores": torch.zeros(0), "masks": torch.zeros(0, 1, 48, 48)}]
    assert detection.evaluate(model, dataset, ARGS)[0] == 0


def truth_of(*boxes, iscrowd=None):
    n = len(boxes)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    return {"boxes": boxes, "labels": torch.ones(n, dtype=torch.long), "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
            "iscrowd": torch.tensor(iscrowd or [0] * n)}


class Listed(list):
    """A data set of (image, target), asked for by (index, seed) as all here."""

    def __getitem__(self, key):
        return super().__getitem__(key[0])


def test_average_precision_with_a_known_overlap():
    """Moved by 2: 28·10 / (2·30·12 - 280) = 0.64 and 8·38 / (2·10·40 - 304) = 0.61: above 0.5, 0.55 and 0.6."""
    image = torch.zeros(3, 48, 60, dtype=torch.uint8)
    data = Listed([(image, truth_of([4, 6, 34, 18], [40, 2, 50, 42]))])
    score, text = detection.evaluate(Oracle(data, by=2, masks=False), data, BOXES)
    assert score == pytest.approx(30)
    assert text == "bbox AP 30.0 %, AP50 100.0 %"


def test_a_crowd_excuses_detections_in_it():
    """Two objects are found, and five more in a crowd: they are no mistakes; without the crowd they are."""
    image = torch.zeros(3, 48, 60, dtype=torch.uint8)
    objects = [[4, 6, 34, 18], [40, 2, 50, 42]]
    crowd = [0, 20, 30, 48]
    found = truth_of([1, 22, 9, 30], [11, 22, 19, 30], [21, 22, 29, 30], *objects)
    scores = {}
    for iscrowd in (0, 1):
        data = Listed([(image, truth_of(*objects, crowd, iscrowd=[0, 0, iscrowd]))])
        model = Oracle(Listed([(image, found)]), masks=False)
        scores[iscrowd], _ = detection.evaluate(model, data, BOXES)
    assert scores[1] == pytest.approx(100)
    assert scores[0] < 50


# ---------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("H, W", [(40, 90), (90, 40), (700, 500)])
def test_an_image_of_any_shape_is_drawn_with_its_boxes(H, W):
    image = torch.full((3, H, W), 255, dtype=torch.uint8)
    objects = {"boxes": torch.tensor([[5.0, 6, 35, 36], [0, 0, 9, 9]]), "labels": torch.tensor([1, 2]),
               "scores": torch.tensor([0.9, 0.4]), "masks": torch.zeros(2, H, W, dtype=torch.bool)}
    picture = detection.draw(image, objects, ["cat", "dog"])
    zoom = picture.width / W
    assert picture.height == zoom * H
    assert min(picture.size) >= 160
    drawn = (255 - v2.functional.pil_to_tensor(picture).int()).sum(0).nonzero()
    assert drawn[:, 1].min() == pytest.approx(5 * zoom, abs=2)      # the second box is below the lowest score
    assert drawn[:, 0].max() == pytest.approx(36 * zoom, abs=2)


def test_objects_are_described_line_by_line_with_their_names_escaped():
    objects = {"boxes": torch.tensor([[5.4, 6, 35, 36], [0, 0, 9, 9]]), "labels": torch.tensor([2, 1]),
               "scores": torch.tensor([0.934, 0.4])}
    lines = list(detection.describe(objects, ["cat", "k\u00f6nig\n"]))
    assert lines == ["'k\\xf6nig\\n' 0.93, box [5, 6, 35, 36]"]
