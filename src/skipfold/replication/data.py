"""Images as uint8 tensors: MNIST with its checksums, and scikit-learn's digits for runs without data."""

import gzip
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from skipfold.errors import ConfigError, DataError
from skipfold.replication.config import root

FOLDER_VARIABLE = "SKIPFOLD_MNIST"
"""Environment variable that names a folder with the four idx files, raw or gzipped."""

MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""MD5 of each decompressed idx file."""


@dataclass(frozen=True)
class Dataset:
    """Training and validation images on one device.

    Images are uint8 [N, 1, 28, 28] in 0..255, labels int64 [N] in 0..9; `md5` maps file names to checksums.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    val_images: torch.Tensor
    val_labels: torch.Tensor
    md5: dict[str, str]

    def to(self, device: torch.device | str) -> "Dataset":
        """The same images on another device."""
        moved = (x.to(device) for x in (self.train_images, self.train_labels, self.val_images, self.val_labels))
        return Dataset(self.name, *moved, self.md5)

    def first(self, train: int | None, val: int | None) -> "Dataset":
        """The first `train` training and `val` validation images; None takes all.

        Raises ConfigError where fewer are there.
        """
        for split, wanted, held in (
            ("training", train, len(self.train_images)),
            ("validation", val, len(self.val_images)),
        ):
            if wanted is not None and not 1 <= wanted <= held:
                raise ConfigError(
                    f"{self.name}: {wanted} {split} images asked for; allowed are 1 to {held}, or null for all"
                )
        return Dataset(
            self.name,
            self.train_images[:train],
            self.train_labels[:train],
            self.val_images[:val],
            self.val_labels[:val],
            self.md5,
        )


def to_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 1, 28, 28] to float32 in [0, 1]; no further normalization (inferred from the published curves)."""
    return images.float().div_(255)


def load(name: str, folder: str | Path | None = None) -> Dataset:
    """`mnist` or `digits`, on the CPU.

    MNIST is taken from `folder`, else from the folder that $SKIPFOLD_MNIST names, else from the repository's .data/,
    where torchvision downloads it. Raises DataError where a file is missing or its MD5 is wrong.
    """
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist(folder or os.environ.get(FOLDER_VARIABLE))
    raise ConfigError(f"data: unknown data set {name!r}; allowed are mnist and digits")


def _mnist(folder: str | Path | None) -> Dataset:
    if folder is None:
        folder = _download(root() / ".data")
    tensors = [_idx(_locate(Path(folder), name), name) for name in MNIST_MD5]
    train_images, train_labels, val_images, val_labels = tensors
    return Dataset("mnist", train_images, train_labels, val_images, val_labels, dict(MNIST_MD5))


def _download(place: Path) -> Path:
    from torchvision.datasets import MNIST  # takes a second to import

    raw = place / "MNIST" / "raw"
    try:
        MNIST(place, download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"MNIST is not in {raw} and cannot be downloaded ({str(error).strip().splitlines()[-1]}); "
            f"put the four idx files in a folder and name it with data_folder or ${FOLDER_VARIABLE}"
        ) from error
    return raw


def _locate(folder: Path, name: str) -> Path:
    """The file `name`, raw or gzipped, in `folder` or in its MNIST/raw."""
    for place in (folder, folder / "MNIST" / "raw"):
        for suffix in ("", ".gz"):
            if (path := place / (name + suffix)).is_file():
                return path
    raise DataError(
        f"{folder}: {name} (or {name}.gz) is missing; the folder must hold the four MNIST idx files: "
        + ", ".join(MNIST_MD5)
    )


def _idx(path: Path, name: str) -> torch.Tensor:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch this MNIST file again") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != MNIST_MD5[name]:
        raise DataError(
            f"{path}: md5 of the decompressed file is {found}, must be {MNIST_MD5[name]}; "
            "the file is truncated or altered, fetch it again"
        )
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if "labels" in name:
        return flat[8:].long()
    return flat[16:].reshape(-1, 1, 28, 28)


def _digits() -> Dataset:
    """scikit-learn's 1797 digits of 8x8 in 0..16, enlarged to 28x28; every sixth is for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    images = images.round().clamp(0, 255).to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    held_out = torch.arange(len(images)) % 6 == 0
    md5 = {"digits": hashlib.md5(digits.images.tobytes(), usedforsecurity=False).hexdigest()}
    return Dataset("digits", images[~held_out], labels[~held_out], images[held_out], labels[held_out], md5)
