"""MNIST read from idx files with their checksums, and the bundled digits; small made-up files stand for MNIST."""

import gzip
import hashlib
import os

import pytest
import torch

from skipfold.errors import ConfigError, DataError
from skipfold.replication import data

COUNTS = {"train": 7, "t10k": 3}


def idx_files() -> dict[str, bytes]:
    """The four files of a tiny MNIST, by name."""
    generator = torch.Generator().manual_seed(0)
    files = {}
    for split, count in COUNTS.items():
        pixels = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 10, (count,), generator=generator, dtype=torch.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (2051, count, 28, 28))
        files[f"{split}-images-idx3-ubyte"] = header + bytes(pixels.flatten().tolist())
        files[f"{split}-labels-idx1-ubyte"] = (
            (2049).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(labels.tolist())
        )
    return files


@pytest.fixture
def files(monkeypatch):
    made = idx_files()
    monkeypatch.setattr(data, "MNIST_MD5", {name: hashlib.md5(made[name]).hexdigest() for name in data.MNIST_MD5})
    monkeypatch.delenv(data.FOLDER_VARIABLE, raising=False)
    return made


def write(folder, files, compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (name + ".gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return folder


def check(dataset, files):
    assert dataset.name == "mnist"
    assert dataset.train_images.shape == (7, 1, 28, 28) and dataset.train_images.dtype == torch.uint8
    assert dataset.val_images.shape == (3, 1, 28, 28)
    assert dataset.train_labels.dtype == torch.int64
    assert bytes(dataset.train_images.flatten().tolist()) == files["train-images-idx3-ubyte"][16:]
    assert bytes(dataset.val_labels.tolist()) == files["t10k-labels-idx1-ubyte"][8:]
    assert dataset.md5 == data.MNIST_MD5


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("inside", [".", "MNIST/raw"])
def test_raw_and_gzipped_files(tmp_path, files, compress, inside):
    write(tmp_path / inside, files, compress)
    check(data.load("mnist", tmp_path), files)


def test_folder_from_the_environment(tmp_path, files, monkeypatch):
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(write(tmp_path, files)))
    check(data.load("mnist"), files)


def test_folder_given_comes_before_the_environment(tmp_path, files, monkeypatch):
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path / "absent"))
    check(data.load("mnist", write(tmp_path / "given", files)), files)


@pytest.mark.parametrize("name", sorted(data.MNIST_MD5))
def test_missing_file(tmp_path, files, name):
    write(tmp_path, files)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} .* is missing"):
        data.load("mnist", tmp_path)


def test_missing_folder(tmp_path, files):
    with pytest.raises(DataError, match="is missing; the folder must hold"):
        data.load("mnist", tmp_path / "nowhere")


def altered(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: b"", altered, lambda c: c + b"\0"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", sorted(data.MNIST_MD5))
def test_truncated_or_altered_content(tmp_path, files, name, compress, damage):
    write(tmp_path, {**files, name: damage(files[name])}, compress)
    with pytest.raises(DataError, match=f"{name}.*md5.*truncated or altered"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda c: c[: len(c) // 2], lambda c: b"no gzip at all", lambda c: c[:20] + b"\xff" * 9 + c[29:]]
)
def test_damaged_gzip(tmp_path, files, damage):
    write(tmp_path, files, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz.*(cannot be read|md5)") as caught:
        data.load("mnist", tmp_path)
    assert "\n" not in str(caught.value)


def test_download_that_fails_is_one_line(tmp_path, files, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Error downloading\nno network")

    monkeypatch.setattr(data, "root", lambda: tmp_path)
    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    with pytest.raises(DataError, match=r"no network.*\$SKIPFOLD_MNIST") as caught:
        data.load("mnist")
    assert "\n" not in str(caught.value)


def test_unknown_data_set():
    with pytest.raises(ConfigError, match="unknown data set 'cifar'; allowed are mnist and digits"):
        data.load("cifar")


def test_digits_are_28_by_28():
    digits = data.load("digits")
    assert len(digits.train_images) + len(digits.val_images) == 1797
    for images, labels in ((digits.train_images, digits.train_labels), (digits.val_images, digits.val_labels)):
        assert images.shape == (len(labels), 1, 28, 28) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(10))
        assert images.float().std() > 50
    assert digits.md5 == data.load("digits").md5


def test_first_images():
    digits = data.load("digits")
    part = digits.first(10, 5)
    assert torch.equal(part.train_images, digits.train_images[:10]) and len(part.val_labels) == 5
    assert len(digits.first(None, None).train_images) == len(digits.train_images)


@pytest.mark.parametrize(("train", "val"), [(0, 5), (5, 0), (-1, None), (10**6, None), (None, 10**6)])
def test_more_images_than_there_are(train, val):
    with pytest.raises(ConfigError, match="images asked for; allowed are 1 to"):
        data.load("digits").first(train, val)


def test_inputs_are_in_0_to_1():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.equal(data.to_input(images), torch.tensor([0, 0.2, 1]))
    assert images.tolist() == [0, 51, 255]


@pytest.mark.skipif(not os.environ.get(data.FOLDER_VARIABLE), reason=f"${data.FOLDER_VARIABLE} names no MNIST folder")
def test_the_real_mnist():
    mnist = data.load("mnist")
    assert len(mnist.train_images) == 60_000 and len(mnist.val_images) == 10_000
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert float(mnist.train_images.float().mean() / 255) == pytest.approx(0.1307, abs=1e-4)
