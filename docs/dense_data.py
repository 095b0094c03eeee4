"""Data sets of detection.py and segmentation.py: mosaics, COCO and ADE20K.

What cannot be used is refused or counted when a data set is made, before training: only pixels are
read later.  An item is asked for by (index, seed), as in train_minimal.py.
"""
import contextlib
import io
import json
import math

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import ops, tv_tensors
from torchvision.transforms import v2
from train_minimal import Images, UserError, load_image, say

NONE = 255                                                          # label of unlabeled pixels


class Mosaics(Dataset):
    """n pictures of side x side Voronoi cells, filled from images of root/CLASS/*, or one color.

    Only an item's seed counts.  It is view(image, labels, cells): (3, size, size) uint8, and
    (size, size) each, 0 for background, else the class or the number of the cell, from 1.
    """

    def __init__(self, root, n, size, view, side=2):
        self.images = Images(root, transform=None)
        self.classes = ["background", *self.images.classes]
        self.n, self.size, self.view, self.side = n, size, view, side

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        rng = np.random.default_rng(key[1] % 2 ** 63)
        squares = np.indices((self.side, self.side)).reshape(2, -1).T               # (cells, 2)
        centers = (squares + rng.uniform(0.25, 0.75, squares.shape)) * self.size / self.side
        pixels = np.indices((self.size, self.size)).reshape(2, -1, 1)               # (2, size², 1)
        distances = np.linalg.norm(pixels - centers.T[:, None], axis=0)
        nearest = distances.argmin(1).reshape(self.size, self.size)
        image = np.zeros((self.size, self.size, 3), np.uint8)
        labels = np.zeros((self.size, self.size), np.int64)
        cells = np.zeros_like(labels)
        for cell in np.unique(nearest):
            inside = nearest == cell
            rows, columns = inside.nonzero()
            box = np.s_[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
            inside = inside[box]                                    # (height, width) of the cell
            patch, label = self.fill(inside.shape[::-1], rng)
            image[box][inside] = patch[inside]
            labels[box][inside] = label
            cells[box][inside] = (cell + 1) * (label > 0)
        image = torch.from_numpy(image).permute(2, 0, 1)
        return self.view(image, torch.from_numpy(labels), torch.from_numpy(cells))

    def fill(self, size, rng):
        """Pixels and label of a cell: an image's (height, width, 3), or a color and 0."""
        if rng.random() < 0.3:
            color = tuple(rng.integers(0, 256, 3).tolist())
            return np.asarray(Image.new("RGB", size, color)), 0
        image, label = self.images[rng.integers(len(self.images)), 0]
        return np.asarray(image.resize(size)), label + 1


def upright_size(path):
    """(height, width) of an image as its EXIF data rotates it; its pixels are not read."""
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return image.size if turned else image.size[::-1]
    except Exception as error:                                      # decoders raise almost anything
        raise UserError(f"cannot read {str(path)!a}: {str(error)!a}")


def check_size(path, size, source):
    if upright_size(path) != size:
        raise UserError(f"{str(path)!a} is {upright_size(path)} pixels high and wide (upright), "
                        f"but {size} in {str(source)!a}")


# ---------------------------------------------------------------------------- COCO
def is_mask(mask, H, W):
    """Whether a COCO segmentation is one of H x W pixels: polygons, or run lengths."""
    if isinstance(mask, dict):
        counts = mask["counts"]
        whole = not isinstance(counts, list) or sum(counts) == H * W
        return list(mask["size"]) == [H, W] and whole
    for polygon in mask or [[]]:
        near = all(abs(number) <= 2 * (H + W) for number in polygon)        # not NaN
        if len(polygon) < 6 or len(polygon) % 2 or not near:
            return False
    return True


class Coco(Dataset):
    """A split of a COCO folder: (index, seed) -> image (3, H, W) uint8 and its objects.

    Labels are 1 ... n in the order of the categories' ids.  Left out and counted: boxes outside the
    image, and for Mask R-CNN images with an object without mask; in training also what is a crowd,
    and images without objects.
    """

    def __init__(self, root, split, args):
        self.file = root / "annotations" / f"instances_{split}2017.json"
        self.folder, self.training = root / f"{split}2017", split == "train"
        self.masks = args.framework == "mask_rcnn"
        self.entry, self.classes = None, ["background"]             # what is being read; names
        try:
            self.read(json.loads(self.file.read_text()))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            where = f", in {self.entry!a:.200}" if self.entry else ""
            raise UserError(f"{str(self.file)!a}{where}: {type(error).__name__}: {str(error)!a}")
        if not any(self.coco.imgToAnns[image["id"]] for image in self.images):
            hint = "; --framework retinanet needs no masks" if self.masks else ""
            raise UserError(f"{str(self.file)!a} has no objects left{hint}")

    def read(self, content):
        from pycocotools import mask as rle
        from pycocotools.coco import COCO                           # segmentation.py needs neither
        for name in ("images", "annotations", "categories"):
            if not isinstance(content.get(name), list):
                raise ValueError(f"there is no list called {name}")
        numbers, images, objects, outside, maskless = {}, {}, [], 0, set()
        for self.entry in sorted(content["categories"], key=lambda category: category["id"]):
            if self.entry["id"] in numbers:
                raise ValueError("the id occurs twice")
            numbers[self.entry["id"]] = len(self.classes)
            self.classes.append(str(self.entry["name"]))
        for self.entry in content["images"]:
            if self.entry["id"] in images:
                raise ValueError("the id occurs twice")
            self.check_image(**self.entry)
            images[self.entry["id"]] = self.entry
        for i, self.entry in enumerate(content["annotations"], 1):
            found = self.complete(self.entry, images[self.entry["image_id"]])
            if min(found["bbox"][2:]) < 1e-3:                      # float32 would have 0
                outside += 1
            elif not (self.training and found["iscrowd"]):
                objects.append(dict(found, id=i, label=numbers[self.entry["category_id"]]))
                if self.masks and not found["segmentation"]:
                    maskless.add(found["image_id"])
        self.coco = COCO()
        self.coco.dataset = dict(images=content["images"], annotations=objects)
        with contextlib.redirect_stdout(io.StringIO()):             # it prints
            self.coco.createIndex()
        for entry in objects:
            if entry["area"] is None and entry["segmentation"]:
                entry["area"] = int(rle.area(self.coco.annToRLE(entry)))
            elif entry["area"] is None:
                entry["area"] = entry["bbox"][2] * entry["bbox"][3]
        useful = images if not self.training else self.coco.imgToAnns
        self.images = [images[key] for key in images if key in useful and key not in maskless]
        for count, what in ((outside, "boxes outside of their image"),
                            (len(maskless), "images with an object without mask")):
            if count:
                say(f"{str(self.file)!a}: {count} {what} left out")

    def check_image(self, id, file_name, height, width, **_):
        path = self.folder / file_name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError("file_name is outside of the folder")
        check_size(path, (height, width), self.file)

    def complete(self, entry, image):
        """An annotation whose box is clamped to its image, and that lacks nothing."""
        H, W = image["height"], image["width"]
        x, y, w, h = map(float, entry["bbox"])
        if not math.isfinite(x + y + w + h):
            raise ValueError("bbox is not finite")
        left, top = max(x, 0), max(y, 0)
        mask = entry.get("segmentation")
        right, bottom = min(x + w, W), min(y + h, H)
        if not is_mask(mask, H, W):
            mask = None
        return dict(
            image_id=image["id"],
            bbox=[left, top, right - left, bottom - top],
            segmentation=mask,
            area=None if entry.get("area") is None else float(entry["area"]),
            iscrowd=int(entry.get("iscrowd", 0)))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, seed = key
        torch.default_generator.manual_seed(seed)                   # wherever it is loaded
        image = self.images[index]
        H, W = image["height"], image["width"]
        pixels = v2.functional.to_image(load_image(self.folder / image["file_name"]))
        objects = self.coco.imgToAnns[image["id"]]
        boxes = torch.tensor([entry["bbox"] for entry in objects])
        boxes = ops.box_convert(boxes.view(-1, 4), "xywh", "xyxy")
        target = dict(
            boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(H, W)),
            labels=torch.tensor([entry["label"] for entry in objects], dtype=torch.long),
            iscrowd=torch.tensor([entry["iscrowd"] for entry in objects]),
            area=torch.tensor([entry["area"] for entry in objects]))
        if self.masks:
            masks = [self.coco.annToMask(entry) for entry in objects]
            masks = np.stack(masks) if masks else np.zeros((0, H, W), np.uint8)
            target["masks"] = tv_tensors.Mask(masks)
        if self.training:
            return v2.RandomHorizontalFlip()(pixels, target)
        return pixels, target


def objects_of(image, labels, cells):
    """View of a mosaic as COCO's: an image and its objects."""
    numbers = cells[cells > 0].unique()
    masks = cells == numbers[:, None, None]                         # (n, size, size)
    boxes = ops.masks_to_boxes(masks)
    boxes[:, 2:] += 1                                               # to the pixels' outer edges
    first = masks.flatten(1).byte().argmax(1)                       # a pixel of each
    return image, dict(
        boxes=boxes, labels=labels.flatten()[first], masks=masks.byte(),
        iscrowd=torch.zeros(len(boxes), dtype=torch.long), area=masks.sum((1, 2)))


# ---------------------------------------------------------------------------- ADE20K
def open_label(path):
    """A PNG of one channel of 8 bits, or of a palette's indices; its pixels are not read yet."""
    try:
        label = Image.open(path, formats=["PNG"])
        raw = label.tile[0][3]
    except Exception as error:                                      # decoders raise almost anything
        raise UserError(f"cannot read {str(path)!a}: {str(error)!a}")
    if raw not in ("L", "P", "P;4", "P;2", "P;1"):                  # L;4 would be scaled
        raise UserError(f"{str(path)!a} must have one channel of 8 bits, not {raw!a}")
    return label


class ADE20K(Dataset):
    """A split of an ADE20K folder: (index, seed) -> image (3, H, W) uint8, labels (H, W).

    Labels 1 ... n of the file become 0 ... n - 1; 0 and 255, which is none.  The shorter side of an
    image becomes args.size, the longer at most 4 times it.  Training takes random square crops;
    validation labels keep their size.
    """

    def __init__(self, root, split, args):
        lines = (root / "objectInfo150.txt").read_text().strip().splitlines()
        self.classes = [line.split("\t")[-1].strip() for line in lines[1:]]
        self.training = split == "train"
        part = "training" if self.training else "validation"
        files = sorted((root / "images" / part).glob("*"))
        self.images = [file for file in files if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
        self.labels = [root / "annotations" / part / f"{file.stem}.png" for file in self.images]
        if not self.images:
            raise UserError(f"there is no *.jpg or *.png in {str(root / 'images' / part)!a}")
        for image, label in zip(self.images, self.labels):
            check_size(image, open_label(label).size[::-1], label)
        self.resize = v2.Resize(args.size, max_size=4 * args.size)
        fill = {tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: NONE}
        crop = v2.RandomCrop(args.size, pad_if_needed=True, fill=fill)
        self.cut = v2.Compose([self.resize, crop, v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, seed = key
        torch.default_generator.manual_seed(seed)                   # wherever it is loaded
        image = v2.functional.to_image(load_image(self.images[index]))
        try:
            label = np.array(open_label(self.labels[index]))
        except Exception as error:
            raise UserError(f"cannot read {str(self.labels[index])!a}: {str(error)!a}")
        labels = torch.from_numpy(label)[None]                      # (1, H, W) uint8
        labels[labels == NONE] = 0
        if labels.max() > len(self.classes):
            raise UserError(f"{str(self.labels[index])!a} has label {labels.max()}, but "
                            f"objectInfo150.txt has {len(self.classes)} classes")
        labels = tv_tensors.Mask(labels - 1)                        # uint8: 0 wraps to 255
        if self.training:
            image, labels = self.cut(image, labels)
        else:
            image = self.resize(image)
        return image, torch.as_tensor(labels[0], dtype=torch.long)


def labels_of(image, labels, cells):
    """View of a mosaic as ADE20K's, but its class 0 is the background."""
    return image, labels
