"""Real image data sets, read from their official files into arrays, and the batches that training draws from them.

`load` gives a `Dataset` for three names. `digits` (8x8 grey images, 1,797 of them) comes inside scikit-learn and needs
no network. `fashion-mnist` and `cifar10` are read from the files that their authors publish; files that a user already
has are read where they lie and only their layout is checked, files that are missing are downloaded by pooch and their
hash is checked too. Whatever is wrong with a file becomes a `DataFileError` that names it and says what to do.
"""

import gzip
import math
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32, UInt8
from rich.console import Console
from rich.progress import DownloadColumn, Progress

from fixup_init.extras import require


class DataFileError(ValueError):
    """A data file is missing, cannot be fetched, or does not hold what its layout promises."""


@dataclass(frozen=True)
class Source:
    """Where one official file can be fetched, and the hash (`algorithm:hex`) that the authors' copy has."""

    url: str
    hash: str


_FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
SOURCES: dict[str, Source] = {
    "train-images-idx3-ubyte.gz": Source(
        f"{_FASHION_MNIST}/train-images-idx3-ubyte.gz", "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d"
    ),
    "train-labels-idx1-ubyte.gz": Source(
        f"{_FASHION_MNIST}/train-labels-idx1-ubyte.gz", "md5:25c81989df183df01b3e8a0aad5dffbe"
    ),
    "t10k-images-idx3-ubyte.gz": Source(
        f"{_FASHION_MNIST}/t10k-images-idx3-ubyte.gz", "md5:bef4ecab320f06d8554ea6380940ec79"
    ),
    "t10k-labels-idx1-ubyte.gz": Source(
        f"{_FASHION_MNIST}/t10k-labels-idx1-ubyte.gz", "md5:bb300cfdad3c16e7a12a480ee83cd310"
    ),
    "cifar-10-binary.tar.gz": Source(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530"
    ),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, split into train and test.

    `mean` and `std` are those of the training pixels, one per channel, in pixel units: a network sees
    `(image - mean) / std`, so the scale of the raw values (0 to 16 in digits, 0 to 255 elsewhere) does not matter.
    """

    name: str
    train_images: UInt8[np.ndarray, "train height width channels"]
    train_labels: Int32[np.ndarray, "train"]
    test_images: UInt8[np.ndarray, "test height width channels"]
    test_labels: Int32[np.ndarray, "test"]
    num_classes: int
    mean: Float64[np.ndarray, "channels"]
    std: Float64[np.ndarray, "channels"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Reads a data set, fetching the files that are not there.

    Args:
      name: `"digits"`, `"fashion-mnist"` or `"cifar10"`.
      data_dir: the directory that holds the official files, or takes those that are downloaded; by default the cache
        directory of the operating system. `digits` reads no file and ignores it.

    Returns:
      The data set as arrays.

    Raises:
      DataFileError: a file is missing and cannot be fetched, or is damaged; the message names it and the remedy.
      ValueError: the name is not one of the three.

    Example:
      >>> digits = load("digits")
      >>> digits.train_images.shape, digits.test_images.shape, digits.num_classes
      ((1437, 8, 8, 1), (360, 8, 8, 1), 10)
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(_LOADERS)}")
    directory = None if data_dir is None else Path(data_dir).expanduser()
    if directory is not None and name != "digits" and not directory.is_dir():
        raise DataFileError(
            f"{directory}: no such directory, expected the one that holds the {name} files. "
            "Give an existing directory (files that it lacks are downloaded into it), or none to use the cache."
        )
    train_images, train_labels, test_images, test_labels = _LOADERS[name](directory)
    mean, std = _pixel_moments(train_images)
    return Dataset(
        name=name,
        train_images=train_images,
        train_labels=train_labels.astype(np.int32),
        test_images=test_images,
        test_labels=test_labels.astype(np.int32),
        num_classes=NUM_CLASSES,
        mean=mean,
        std=std,
    )


def train_batches(
    dataset: Dataset, batch_size: int, *, seed: int
) -> Iterator[tuple[UInt8[np.ndarray, "batch height width channels"], Int32[np.ndarray, "batch"]]]:
    """Endless training batches: every epoch is a new shuffle of all examples, less the incomplete last batch.

    The same seed gives the same batches. An epoch is `len(dataset.train_images) // batch_size` batches.
    """
    count = len(dataset.train_images)
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size is {batch_size}, expected 1 to {count}, the number of training examples")
    grain = require("grain", "examples")
    # Indices travel through the pipeline, one gather makes the batch: a tenth of the time of stacking examples.
    indices = grain.MapDataset.range(count).shuffle(seed=seed).batch(batch_size, drop_remainder=True).repeat()
    batches = indices.map(lambda chosen: (dataset.train_images[chosen], dataset.train_labels[chosen]))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


NUM_CLASSES = 10  # of each of the three data sets
_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # train images, train labels, test images, test labels


def _pixel_moments(images: UInt8[np.ndarray, "n height width channels"]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, from its histogram: exact, and no copy of the images in float."""
    values = np.arange(256)
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(images, -1, 0)])
    weights = counts / counts.sum(1, keepdims=True)
    mean = weights @ values
    return mean, np.sqrt((weights * (values - mean[:, None]) ** 2).sum(1))


def _digits(directory: Path | None) -> _Arrays:
    """Every fifth image of the class-sorted set is for testing: 36 or so of each digit, 360 in all, always the same."""
    del directory
    bunch = require("sklearn.datasets", "examples").load_digits()
    images = bunch.images.astype(np.uint8)[..., None]  # whole numbers from 0 to 16
    order = np.argsort(bunch.target, kind="stable")
    is_test = np.zeros(len(order), bool)
    is_test[order[::5]] = True
    return images[~is_test], bunch.target[~is_test], images[is_test], bunch.target[is_test]


def _fashion_mnist(directory: Path | None) -> _Arrays:
    """Four IDX files; train and t10k, images and labels."""
    arrays = []
    for split in ("train", "t10k"):
        images_path = _fetch(f"{split}-images-idx3-ubyte.gz", directory)
        labels_path = _fetch(f"{split}-labels-idx1-ubyte.gz", directory)
        images, labels = _read_idx(images_path, dimensions=3), _read_idx(labels_path, dimensions=1)
        if len(images) != len(labels):
            raise _damaged(labels_path, f"holds {len(labels):,} labels for the {len(images):,} images beside it")
        _check_labels(labels, labels_path)
        arrays += [images[..., None], labels]
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file: two zero bytes, type 8 (uint8), number of dimensions; big-endian sizes; the values."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"is not a whole gzip file ({error})") from error
    magic, header = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic or len(content) < header:
        raise _damaged(path, f"starts with {content[:4].hex() or 'nothing'}, expected the IDX header {magic.hex()}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected, found = math.prod(shape), len(content) - header
    if expected != found or expected == 0:
        raise _damaged(path, f"promises {expected:,} values of shape {shape} in its header and holds {found:,}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


CIFAR_FOLDER, CIFAR_ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"
_CIFAR_TRAIN, _CIFAR_TEST = tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"
_CIFAR_RECORD = 1 + 3 * 32 * 32  # the label, then the red, the green and the blue plane


def _cifar10(directory: Path | None) -> _Arrays:
    """Six files of records, in the folder that the archive makes, or still in the archive."""
    names = (*_CIFAR_TRAIN, _CIFAR_TEST)
    folders = [] if directory is None else [directory / CIFAR_FOLDER, directory]
    folder = next((f for f in folders if any((f / name).exists() for name in names)), None)
    if folder is None:
        archive = _fetch(CIFAR_ARCHIVE, directory)
        contents = _read_archive(archive, names)
        paths = {name: archive / CIFAR_FOLDER / name for name in names}
    else:
        paths = {name: folder / name for name in names}
        contents = {name: _read_bytes(path) for name, path in paths.items()}
    parts = {name: _read_cifar(contents[name], paths[name]) for name in names}
    counts = {name: len(parts[name][1]) for name in _CIFAR_TRAIN}
    for name, count in counts.items():
        if count != max(counts.values()):
            raise _damaged(paths[name], f"holds {count:,} images, its sister files {max(counts.values()):,}")
    images, labels = (np.concatenate([parts[name][k] for name in _CIFAR_TRAIN]) for k in (0, 1))
    return images, labels, *parts[_CIFAR_TEST]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error


def _read_archive(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The named members of the archive, read without unpacking it."""
    wanted, contents = {f"{CIFAR_FOLDER}/{name}": name for name in names}, {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name, file = wanted.get(member.name.removeprefix("./")), archive.extractfile(member)
                if name is not None and file is not None:
                    contents[name] = file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise _damaged(path, f"is not a whole .tar.gz archive ({error})") from error
    missing = [name for name in names if name not in contents]
    if missing:
        raise _damaged(path, f"lacks {CIFAR_FOLDER}/{missing[0]}")
    return contents


def _read_cifar(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not content or len(content) % _CIFAR_RECORD:
        raise _damaged(path, f"has {len(content):,} bytes, expected a multiple of {_CIFAR_RECORD:,} (one image each)")
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0]
    _check_labels(labels, path)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _check_labels(labels: np.ndarray, path: Path) -> None:
    if labels.max() >= NUM_CLASSES:
        where = int(np.argmax(labels >= NUM_CLASSES))
        raise _damaged(path, f"has label {labels[where]} at index {where}, expected 0 to {NUM_CLASSES - 1}")


def _fetch(file_name: str, directory: Path | None) -> Path:
    """The path of an official file: the user's own copy as it is, otherwise the download, whole and with its hash."""
    if directory is not None and (directory / file_name).exists():
        return directory / file_name
    pooch, source, bar = require("pooch", "examples"), SOURCES[file_name], _DownloadBar(file_name)
    cache = Path(directory or pooch.os_cache("fixup_init"))
    try:
        # pooch writes to a temporary name and moves the file once its hash is right, so no half file stays behind.
        downloader = pooch.HTTPDownloader(progressbar=bar, timeout=30)
        return Path(pooch.retrieve(source.url, source.hash, file_name, cache, downloader=downloader))
    except (OSError, ValueError) as error:  # no network, no such page, no room, no permission; a wrong hash
        raise DataFileError(
            f"{cache / file_name}: missing, and could not be fetched from {source.url} ({error}). Fetch it on a "
            "machine with a network and give the directory that holds it as data_dir (--data-dir), or use `digits`, "
            "which needs no download."
        ) from error
    finally:
        bar.close()


def _damaged(path: Path, what: str) -> DataFileError:
    archive = next((parent for parent in path.parents if parent.name == CIFAR_ARCHIVE), None)
    if path.suffix == ".bin" and archive is None:
        url = SOURCES[CIFAR_ARCHIVE].url
        remedy = f"Unpack it anew from {url}, or delete the folder {path.parent} and run again to download it."
    else:
        whole = archive or path
        remedy = f"Delete {whole} and run again to download it, or copy it anew from {SOURCES[whole.name].url}."
    return DataFileError(f"{path}: {what}. {remedy}")


class _DownloadBar:
    """What pooch asks of a progress bar (`total`, `update`, `reset`, `close`), drawn by rich."""

    def __init__(self, description: str):
        columns = (*Progress.get_default_columns(), DownloadColumn())
        self.total = 0
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(description, total=None)

    def update(self, amount: int) -> None:
        self._bar.start()
        self._bar.update(self._task, total=self.total or None, advance=amount)

    def reset(self) -> None:
        self._bar.update(self._task, completed=0)

    def close(self) -> None:
        self._bar.stop()


_LOADERS: dict[str, Any] = {"digits": _digits, "fashion-mnist": _fashion_mnist, "cifar10": _cifar10}
