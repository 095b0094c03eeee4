"""Data and training loop of detection.py and segmentation.py, for a CPU or one GPU.  Needs torchvision."""
import argparse
import contextlib
import io
import json
import pathlib
import sys
import time

import numpy as np
import torch
from PIL import Image
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2
from torchvision.utils import save_image

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))           # this repository's file, not an installed copy
import scalablevit  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------------------- Synthetic data
def draw(n, size=64):
    """n images (n, 3, size, size) with labels (n, size, size): 0 background, 1 wide ellipses, 2 discs, 3 tall ellipses.

    Returns images, labels and instance numbers (shaped like the labels, from 1).  Colors of background and shapes come
    from the same distribution, so a pixel's color says nothing about its class; only the outline does.
    """
    images, labels = torch.randn(n, 3, 1, 1).repeat(1, 1, size, size), torch.zeros(n, size, size, dtype=torch.long)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    numbers = labels
    for i in range(1, 5):                                                               # later ones cover earlier ones
        kind, (y, x) = torch.randint(3, (n, 1, 1)), torch.rand(2, n, 1, 1) * size
        dy, dx, r = row - y, column - x, size * (0.1 + 0.1 * torch.rand(n, 1, 1))
        stretch = torch.tensor([2.0, 1.0, 0.5])[kind].sqrt()                            # equal areas
        inside = (dy * stretch).hypot(dx / stretch) < r
        labels, numbers = torch.where(inside, kind + 1, labels), torch.where(inside, i, numbers)
        images = torch.where(inside[:, None], torch.randn(n, 3, 1, 1), images)
    return images + 0.1 * torch.randn(images.shape), labels, numbers


def draw_coco(root, split, n, size):
    """Write n images of random shapes as one split of a COCO folder."""
    from pycocotools import mask as rle
    coco = {"images": [], "annotations": [], "categories": [{"id": i, "name": f"kind {i}"} for i in (1, 2, 3)]}
    for folder in (root / f"{split}2017", root / "annotations"):
        folder.mkdir(exist_ok=True)
    for i, (image, labels, numbers) in enumerate(zip(*draw(n, size))):
        save_image(image / 6 + 0.5, root / f"{split}2017" / f"{i}.png")
        coco["images"].append({"id": i, "file_name": f"{i}.png", "height": size, "width": size})
        for mask in (numbers == k for k in range(1, 5)):            # (size, size): the visible part of a shape
            if mask.sum() >= 20:
                code = rle.encode(np.asfortranarray(mask, np.uint8))
                coco["annotations"].append({
                    "id": len(coco["annotations"]) + 1, "image_id": i, "category_id": labels[mask][0].item(),
                    "iscrowd": 0, "area": mask.sum().item(), "bbox": rle.toBbox(code).tolist(),
                    "segmentation": {"size": [size, size], "counts": code["counts"].decode()}})
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco))


# ---------------------------------------------------------------------------- COCO and ADE20K
def coco(root, split):
    """One split ("train" or "val") of a COCO folder in torchvision's detection format; labels are category ids."""
    transforms = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]                  # (3, H, W) in [0, 1]
    if split == "train":
        transforms += [v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes()]
    with contextlib.redirect_stdout(io.StringIO()):                 # pycocotools prints
        dataset = datasets.CocoDetection(root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json",
                                         transforms=v2.Compose(transforms))
    if split == "train":                                            # skip crowds, and images without objects
        objects = dataset.coco.imgToAnns
        objects.update({i: [a for a in of_image if not a["iscrowd"]] for i, of_image in objects.items()})
        dataset.ids = [i for i in dataset.ids if objects[i]]
    return datasets.wrap_dataset_for_transforms_v2(dataset, ["image_id", "boxes", "labels", "masks"])


class ADE20K(torch.utils.data.Dataset):
    """Pairs of image (3, H, W) and labels (H, W) (0 to 149, 255 for none); split is "training" or "validation".

    Images are resized so that the shorter side is `size` and the longer at most 4 · size.  Training takes random crops
    of size x size; validation labels keep their original size.
    """

    def __init__(self, root, split, size=512):
        self.images = sorted((root / "images" / split).glob("*.jpg"))
        if not self.images:
            raise FileNotFoundError(f"no images in {root / 'images' / split}/*.jpg")
        self.annotations, self.training = root / "annotations" / split, split == "training"
        self.resize = v2.Resize(size, max_size=4 * size)
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: 255}
        self.cut = v2.Compose([v2.RandomCrop(size, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        file = self.images[index]
        image = v2.functional.to_image(Image.open(file).convert("RGB"))
        labels = tv_tensors.Mask(Image.open(self.annotations / f"{file.stem}.png")) - 1  # uint8: 0 wraps to 255
        image = self.resize(v2.functional.to_dtype(image, scale=True))
        image = v2.functional.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        if self.training:
            image, labels = self.cut(image, self.resize(tv_tensors.Mask(labels)))
        return image, labels[0].long()


# ---------------------------------------------------------------------------- Training
def pretrained(name, file=None):
    """scalablevit_NAME without a head, with the weights in `file`, if given; SystemExit if they are of another size."""
    backbone = getattr(scalablevit, f"scalablevit_{name}")(num_classes=0)
    if file is None:
        return backbone
    try:
        loaded = scalablevit.load_model(file, num_classes=0)
    except ValueError as error:
        raise SystemExit(error)
    if loaded.channels != backbone.channels:
        raise SystemExit(f"{file} is not a scalablevit_{name}: its channels are {loaded.channels}, not {backbone.channels}")
    return loaded.train()


def batches(dataset, batch_size, workers=0, collate=None):
    """Endless shuffled batches of a dataset; an incomplete last batch is dropped."""
    loader = torch.utils.data.DataLoader(dataset, min(batch_size, len(dataset)), shuffle=True, num_workers=workers,
                                         collate_fn=collate, drop_last=True)
    while True:
        yield from loader


def multi_step(steps, falls, warmup=500):
    """Appendix C's detection schedule: linear warm-up, then x 0.1 at each of `falls`, given as fractions of all steps.

    Runs of fewer than 5000 steps warm up over a tenth of them.  Returns step -> factor of the learning rate.
    """
    warmup = min(warmup, steps / 10)
    return lambda step: min(1, (step + 1) / warmup) * 0.1 ** sum(step >= fall * steps for fall in falls)


def polynomial(steps, power):
    """Appendix C's segmentation schedule: polynomial decay to 0.  Returns step -> factor of the learning rate."""
    return lambda step: (1 - step / steps) ** power


def train(model, loss, batches, steps, rate, lr, weight_decay, report=None):
    """Train with AdamW on loss(model, *batch), learning rate lr · rate(step); prints and calls report() 20 times."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses, start = [], time.time()
    for step in range(1, steps + 1):
        model.train()
        value = loss(model, *next(batches))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        if report and step % max(1, steps // 20) == 0:
            mean, seconds = sum(losses) / len(losses), time.time() - start
            print(f"step {step} of {steps}: loss {mean:.3f}, {seconds:.0f} s", flush=True)
            report()
            losses = []
    return model.eval()


def save(model, file):
    """Save the model's weights atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    torch.save(model.state_dict(), part)
    part.replace(file)


def arguments(description, frameworks, folder):
    """Command line options common to both programs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help=f"{folder} (default: synthetic images)")
    parser.add_argument("--framework", choices=frameworks, default=frameworks[0])
    parser.add_argument("--model", choices=("tiny", "s", "b", "l"), default="tiny", help="the backbone")
    parser.add_argument("--init", metavar="FILE", help="backbone weights: published, or from train_minimal.py")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, help="learning rate (default: Table 8's)")
    parser.add_argument("--workers", type=int, default=0, help="data loading processes")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/dense"), metavar="DIR")
    return parser
