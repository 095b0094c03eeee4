"""docs/dense_data.py: mosaics, and real data with all that real data holds: right, or refused in one line."""
import argparse
import json
import pathlib
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image, ImageDraw

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs"))

import dense  # noqa: F401  (puts this repository's files on the path)
from dense_data import ADE20K, Coco, Mosaics, NONE, is_mask, labels_of, objects_of
from train_minimal import UserError

H, W = 48, 60
IMAGES = {(H, W): [(4, 6, 30, 12), (40, 2, 10, 40)], (70, 50): [(5, 20, 40, 10)], (40, 40): []}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 48\nshowpage\n"


def refused(call, *args):
    """The one line of a UserError."""
    with pytest.raises(UserError) as error:
        call(*args)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def rotated(path):
    """Save a file that is to be turned by 90 degrees: as it was when upright."""
    upright = Image.open(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.ROTATE_90).save(path, exif=exif)


# ---------------------------------------------------------------------------- COCO
@pytest.fixture
def content(tmp_path):
    """The JSON of a COCO folder: bright rectangles, categories 3 and 7, a crowd, an image without objects."""
    coco = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "high"}, {"id": 3, "name": "wide"}]}
    for folder in ("train2017", "val2017", "annotations"):
        (tmp_path / folder).mkdir()
    for i, ((height, width), boxes) in enumerate(IMAGES.items()):
        image = Image.new("RGB", (width, height))
        for x, y, w, h in boxes:
            ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill="white")
            coco["annotations"].append({
                "id": len(coco["annotations"]) + 1, "image_id": 10 + i, "iscrowd": 0, "category_id": 3 if w > h else 7,
                "bbox": [x, y, w, h], "area": w * h, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        for split in ("train", "val"):
            image.save(tmp_path / f"{split}2017" / f"{i}.png")
        coco["images"].append({"id": 10 + i, "file_name": f"{i}.png", "height": height, "width": width})
    coco["annotations"].append({"id": 99, "image_id": 11, "category_id": 3, "iscrowd": 1, "bbox": [0, 0, 5, 5],
                                "area": 25, "segmentation": {"size": [70, 50], "counts": [0, 5, 3495]}})
    return coco


@pytest.fixture
def open_coco(tmp_path, content):
    """open_coco(split, framework): the folder, with what `content` holds by then."""
    def opened(split="val", framework="mask_rcnn"):
        for name in ("train", "val"):
            (tmp_path / "annotations" / f"instances_{name}2017.json").write_text(json.dumps(content))
        return Coco(tmp_path, split, argparse.Namespace(framework=framework))
    return opened


def test_training_skips_crowds_and_images_without_objects(open_coco):
    assert len(open_coco("train")) == 2
    assert len(open_coco("val")) == 3
    assert open_coco("train")[1, 0][1]["iscrowd"].tolist() == [0]
    assert open_coco("val")[1, 0][1]["iscrowd"].tolist() == [0, 1]


def test_flips_apply_to_images_boxes_and_masks_alike(open_coco):
    training = open_coco("train")
    left = set()
    for seed in range(20):
        image, target = training[seed % 2, seed]
        assert torch.equal(target["masks"].bool().any(0), image[0] > 127)
        for mask, box, label in zip(target["masks"], target["boxes"].int().tolist(), target["labels"].tolist()):
            x0, y0, x1, y1 = box
            assert mask[y0:y1, x0:x1].all()
            assert mask.sum() == (x1 - x0) * (y1 - y0)
            assert label == (1 if x1 - x0 > y1 - y0 else 2)
        left.add(target["boxes"][0, 0].item())
        assert torch.equal(training[seed % 2, seed][0], image)      # the same for a run that goes on
    assert left == {4.0, W - 34.0, 5.0}                             # the second image's box is in the middle


@pytest.mark.parametrize("ids", [(0, 5), (90, 13)])
def test_category_ids_become_1_to_n_and_names_stay(ids, open_coco, content):
    """Id 0 would be the background."""
    content["categories"] = [{"id": ids[0], "name": "wide"}, {"id": ids[1], "name": "high"}]
    for entry in content["annotations"]:
        entry["category_id"] = ids[0] if entry["category_id"] == 3 else ids[1]
    dataset = open_coco()
    labels = dataset[0, 0][1]["labels"].tolist()
    assert [dataset.classes[label] for label in labels] == ["wide", "high"]
    assert sorted(labels) == [1, 2]


@pytest.mark.parametrize("mask", ["missing", None, [], [[1, 2, 3, 4]], [[]], {"size": [1, 2], "counts": [1, 1]}])
def test_boxes_suffice_without_masks_and_with_them_an_image_that_lacks_one_is_counted(
        mask, open_coco, content, capsys):
    content["annotations"][0]["segmentation"] = mask
    if mask == "missing":
        del content["annotations"][0]["segmentation"]
    boxes = open_coco("val", "retinanet")
    assert len(boxes) == 3
    assert len(boxes[0, 0][1]["boxes"]) == 2
    assert "masks" not in boxes[0, 0][1]
    assert capsys.readouterr().out == ""
    assert len(open_coco("val")) == 2
    assert "1 images with an object without mask left out" in capsys.readouterr().out


@pytest.mark.parametrize("by", [0.005, 0.9])
def test_a_box_over_the_border_is_clamped_and_one_outside_is_left_out_and_counted(by, open_coco, content, capsys):
    content["annotations"][0]["bbox"] = [-by, 20, W + 2 * by, H - 20 + by]
    content["annotations"][1]["bbox"] = [W + by, 3, 5, 5]
    target = open_coco("train")[0, 1][1]
    assert target["boxes"].tolist() == [[0, 20, W, H]]
    assert target["labels"].tolist() == [1]
    assert "1 boxes outside of their image left out" in capsys.readouterr().out


def test_iscrowd_is_0_and_area_computed_where_they_are_missing(open_coco, content):
    for entry in content["annotations"]:
        del entry["iscrowd"]
        del entry["area"]
    content["annotations"][1]["segmentation"] = None
    target = open_coco("val", "retinanet")[0, 0][1]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["area"].tolist() == [360, 400]                    # of its mask; of its box


def test_rotated_photos_are_upright_if_the_json_has_their_upright_size_else_refused(open_coco, content, tmp_path):
    rotated(tmp_path / "val2017" / "0.png")
    image, target = open_coco()[0, 0]
    assert torch.equal(target["masks"].bool().any(0), image[0] > 127)
    content["images"][0].update(height=W, width=H)
    message = refused(open_coco)
    for words in ("0.png", "(48, 60)", "(60, 48)"):
        assert words in message


def without_masks(coco):
    for entry in coco["annotations"]:
        entry["segmentation"] = []


@pytest.mark.parametrize("change, names", [
    (lambda coco: coco.pop("annotations"), "annotations"),
    (lambda coco: coco.update(annotations=[]), "no objects"),
    (without_masks, "--framework retinanet"),
    (lambda coco: coco["annotations"][0].pop("bbox"), "bbox"),
    (lambda coco: coco["annotations"][0].update(bbox=[1, 2, float("nan"), 3]), "not finite"),
    (lambda coco: coco["annotations"][0].update(bbox="abc"), "ValueError"),
    (lambda coco: coco["annotations"][0].update(category_id=4), "KeyError: '4'"),
    (lambda coco: coco["annotations"][0].update(image_id=5), "KeyError: '5'"),
    (lambda coco: coco["categories"][0].pop("name"), "name"),
    (lambda coco: coco["images"][0].update(file_name="../secret.png"), "outside"),
    (lambda coco: coco["images"][0].update(file_name="/etc/hostname"), "outside"),
    (lambda coco: coco["images"][0].update(file_name="none.png"), "none.png"),
    (lambda coco: coco["images"][0].pop("height"), "height"),
])
def test_what_is_wrong_in_the_json_is_named(change, names, open_coco, content):
    change(content)
    message = refused(open_coco)
    assert names in message
    assert "instances_val2017.json" in message or "none.png" in message


@pytest.mark.parametrize("name, text", [("annotations/instances_val2017.json", b"{"), ("val2017/0.png", EPS)])
def test_a_file_that_is_no_json_or_no_picture_is_named(name, text, open_coco, tmp_path):
    """An EPS may call itself a PNG."""
    dataset = open_coco()
    (tmp_path / name).write_bytes(text)
    assert pathlib.Path(name).name in refused(Coco, tmp_path, "val", argparse.Namespace(framework="retinanet"))
    assert len(dataset) == 3


@given(st.recursive(st.none() | st.floats() | st.integers(0, 50), lambda part: st.lists(part, max_size=7)))
def test_any_segmentation_is_a_mask_or_an_error_that_names_it(segmentation):
    try:
        assert is_mask(segmentation, H, W) in (True, False)
    except (KeyError, TypeError, ValueError):
        pass                                                        # Coco names the annotation


# ---------------------------------------------------------------------------- ADE20K
@pytest.fixture
def ade20k(tmp_path):
    """Wide images, the second training image very wide; labels are 0 (none), 1, 2 and 150."""
    names = [f"{i}\t0.1\t1\t1\tname {i}" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *names]))
    for split, heights in (("training", (40, 10)), ("validation", (40,))):
        for folder in ("images", "annotations"):
            (tmp_path / folder / split).mkdir(parents=True)
        for i, height in enumerate(heights):
            labels = np.tile(np.repeat(np.array([0, 1, 2, 150], np.uint8), 20), (height, 1))
            Image.fromarray(labels).save(tmp_path / "annotations" / split / f"{i}.png")
            Image.fromarray(labels).convert("RGB").save(tmp_path / "images" / split / f"{i}.jpg", quality=95)
    return tmp_path


def open_ade20k(root, split="val", size=32):
    return ADE20K(root, split, argparse.Namespace(size=size))


def save_label(root, label, split="validation", **kwargs):
    label.save(root / "annotations" / split / "0.png", **kwargs)


def test_classes_1_to_150_become_0_to_149_and_0_becomes_none(ade20k):
    dataset = open_ade20k(ade20k)
    image, labels = dataset[0, 0]
    assert image.shape == (3, 32, 64)
    assert labels.shape == (40, 80)
    assert labels[0, ::20].tolist() == [NONE, 0, 1, 149]
    assert dataset.classes[149] == "name 150"


def test_training_crops_keep_images_and_labels_aligned(ade20k):
    dataset = open_ade20k(ade20k, "train")
    for seed in range(5):
        image, labels = dataset[0, seed]
        assert image.shape == (3, 32, 32)
        assert labels.shape == (32, 32)
        assert set(labels.unique().tolist()) <= {0, 1, 149, NONE}
        bright = image[0].float() > 75                              # class 150
        assert (bright == (labels == 149)).float().mean() > 0.9
    image, labels = dataset[1, 0]                                   # 16 x 128: half of the crop is padding
    padding = image[0] == 124
    assert padding.sum() >= 16 * 32
    assert (labels[padding] == NONE).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_labels_of_a_palette_are_its_indices(bits, ade20k):
    indices = np.tile(np.repeat(np.arange(4, dtype=np.uint8), 20), (40, 1))
    label = Image.fromarray(indices).convert("P")
    label.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    label.putdata(indices.flatten().tolist())
    save_label(ade20k, label, bits=bits)
    assert open_ade20k(ade20k)[0, 0][1][0, ::20].tolist() == [NONE, 0, 1, 2]


@pytest.mark.parametrize("split, folder", [("train", "training"), ("val", "validation")])
def test_255_is_none_and_a_label_above_the_number_of_classes_names_the_file(split, folder, ade20k):
    save_label(ade20k, Image.new("L", (80, 40), 255), folder)
    assert open_ade20k(ade20k, split)[0, 0][1].unique().tolist() == [NONE]
    save_label(ade20k, Image.new("L", (80, 40), 151), folder)
    message = refused(open_ade20k(ade20k, split).__getitem__, (0, 0))
    for words in (f"annotations/{folder}/0.png", "151", "150 classes"):
        assert words in message
    save_label(ade20k, Image.new("L", (80, 41)), folder)            # higher than the image
    assert f"images/{folder}/0.jpg" in refused(open_ade20k, ade20k, split)


def test_a_rotated_photo_is_upright_if_its_label_is(ade20k):
    rotated(ade20k / "images" / "validation" / "0.jpg")
    image, labels = open_ade20k(ade20k, size=40)[0, 0]
    assert image.shape[1:] == labels.shape
    assert image[0, :, -10:].float().mean() > 140                   # class 150 is the bright one


def compress(root):
    """With losses, whatever the name says."""
    file = root / "annotations" / "validation" / "0.png"
    Image.open(file).save(file, format="JPEG")


@pytest.mark.parametrize("change, words", [
    *[(lambda root, mode=mode: save_label(root, Image.new(mode, (80, 40))), "0.png' must have one channel of 8 bits")
      for mode in ("RGB", "RGBA", "LA", "I;16", "1")],
    (compress, "annotations/validation/0.png"),
    (lambda root: (root / "annotations/validation/0.png").write_bytes(EPS), "annotations/validation/0.png"),
    (lambda root: (root / "annotations/validation/0.png").unlink(), "annotations/validation/0.png"),
    (lambda root: (root / "images/validation/0.jpg").write_bytes(EPS), "images/validation/0.jpg"),
    (lambda root: (root / "images/validation/0.jpg").unlink(), "images/validation"),
])
def test_what_is_wrong_in_a_folder_is_refused_before_training(change, words, ade20k):
    change(ade20k)
    assert words in refused(open_ade20k, ade20k)


# ---------------------------------------------------------------------------- mosaics
@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder of two classes: red and green images."""
    root = tmp_path_factory.mktemp("classes")
    for name, color in (("green", (0, 250, 0)), ("red", (250, 0, 0))):
        (root / name).mkdir()
        Image.new("RGB", (20, 30), color).save(root / name / "0.png")
    return root


@given(seed=st.integers(-2 ** 62, 2 ** 62), size=st.integers(8, 60))
def test_labels_and_objects_of_a_mosaic_are_those_of_its_cells(classes, seed, size):
    image, labels, cells = Mosaics(classes, 3, size, lambda *parts: parts)[0, seed]
    assert image.shape == (3, size, size)
    assert torch.equal(labels > 0, cells > 0)
    assert (image[1][labels == 1] == 250).all()
    assert (image[0][labels == 2] == 250).all()
    _, target = objects_of(image, labels, cells)
    assert torch.equal(target["masks"].sum(0), (labels > 0).long())                     # they do not overlap
    for mask, box, label in zip(target["masks"], target["boxes"].tolist(), target["labels"].tolist()):
        row, column = mask.nonzero(as_tuple=True)
        assert box == [column.min(), row.min(), column.max() + 1, row.max() + 1]
        assert (labels[mask.bool()] == label).all()
        assert len(cells[mask.bool()].unique()) == 1


def test_a_mosaic_depends_on_its_seed_alone_and_some_of_it_is_background(classes):
    mosaics = Mosaics(classes, 3, 40, labels_of)
    first, same, other = (mosaics[key] for key in ((0, 5), (2, 5), (0, 6)))
    assert torch.equal(first[0], same[0])
    assert torch.equal(first[1], same[1])
    assert not torch.equal(first[0], other[0])
    labels = torch.stack([mosaics[0, seed][1] for seed in range(40)])
    parts = labels.flatten().bincount() / labels.numel()
    assert mosaics.classes == ["background", "green", "red"]
    assert len(parts) == 3
    assert 0.2 < parts[0] < 0.4
