"""Data sets: the arrays that real files give, the batches drawn from them, and the errors that damaged files give."""

import dataclasses
import gc
import gzip
import hashlib
import http.server
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from fixup_init.training import DataFileError, data, load
from fixup_init.training.data import CIFAR_ARCHIVE, CIFAR_FOLDER, Source, train_batches

SHARED = Path(__file__).parents[2] / "shared" / "data"
BATCHES = [f"data_batch_{k}.bin" for k in range(1, 6)]


def idx(values: np.ndarray) -> bytes:
    """The IDX layout, from its description: zeros, type 8, dimensions; big-endian sizes; values."""
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_fashion(folder: Path, train: int = 30, test: int = 10) -> dict[str, np.ndarray]:
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", train), ("t10k", test)):
        arrays[f"{split}-images-idx3-ubyte.gz"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}-labels-idx1-ubyte.gz"] = (np.arange(count) % 10).astype(np.uint8)
    for name, values in arrays.items():
        (folder / name).write_bytes(gzip.compress(idx(values)))
    return arrays


def write_cifar(folder: Path, count: int = 6) -> dict[str, np.ndarray]:
    """Six files of records (label, red plane, green plane, blue plane) in the official folder."""
    rng, images = np.random.default_rng(0), {}
    (folder / CIFAR_FOLDER).mkdir(parents=True)
    for name in [*BATCHES, "test_batch.bin"]:
        images[name] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        records = b"".join(bytes([k % 10]) + image.transpose(2, 0, 1).tobytes() for k, image in enumerate(images[name]))
        (folder / CIFAR_FOLDER / name).write_bytes(records)
    return images


def pack_cifar(folder: Path) -> Path:
    with tarfile.open(folder / CIFAR_ARCHIVE, "w:gz") as archive:
        archive.add(folder / CIFAR_FOLDER, CIFAR_FOLDER)
    return folder / CIFAR_ARCHIVE


# ------------------------------------------------------------------------------------------------- what is read


def test_digits_is_the_whole_set_split_alike_in_every_class():
    digits = load("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1) and digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.max() == 16 and digits.image_shape == (8, 8, 1)
    share = np.bincount(digits.test_labels) / np.bincount(np.r_[digits.train_labels, digits.test_labels])
    np.testing.assert_allclose(share, 0.2, atol=0.005)
    every = {image.tobytes() for image in np.concatenate([digits.train_images, digits.test_images])}
    assert len(every) == 1797, "no image is in both parts"
    np.testing.assert_array_equal(digits.train_images, load("digits").train_images)


def test_mean_and_std_are_those_of_the_training_pixels(tmp_path):
    write_cifar(tmp_path)
    cifar = load("cifar10", tmp_path)
    np.testing.assert_allclose(cifar.mean, cifar.train_images.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(cifar.std, cifar.train_images.std((0, 1, 2)), rtol=1e-12)


def test_fashion_mnist_reads_what_was_written(tmp_path):
    arrays = write_fashion(tmp_path)
    fashion = load("fashion-mnist", tmp_path)
    np.testing.assert_array_equal(fashion.train_images[..., 0], arrays["train-images-idx3-ubyte.gz"])
    np.testing.assert_array_equal(fashion.test_images[..., 0], arrays["t10k-images-idx3-ubyte.gz"])
    np.testing.assert_array_equal(fashion.test_labels, arrays["t10k-labels-idx1-ubyte.gz"])


@pytest.mark.parametrize("place", ["parent folder", "folder itself", "archive"])
def test_cifar10_reads_what_was_written(tmp_path, place):
    images = write_cifar(tmp_path)
    directory = tmp_path / CIFAR_FOLDER if place == "folder itself" else tmp_path
    if place == "archive":
        directory = tmp_path / "archive only"
        directory.mkdir()
        pack_cifar(tmp_path).rename(directory / CIFAR_ARCHIVE)
    cifar = load("cifar10", str(directory))
    np.testing.assert_array_equal(cifar.train_images, np.concatenate([images[name] for name in BATCHES]))
    np.testing.assert_array_equal(cifar.test_images, images["test_batch.bin"])
    np.testing.assert_array_equal(cifar.train_labels, np.tile(np.arange(6), 5))


@pytest.mark.skipif(not (SHARED / "fashion_mnist").is_dir(), reason="the real Fashion-MNIST is not here")
def test_the_real_fashion_mnist():
    for name, source in data.SOURCES.items():
        if name != CIFAR_ARCHIVE:
            digest = hashlib.md5((SHARED / "fashion_mnist" / name).read_bytes()).hexdigest()
            assert f"md5:{digest}" == source.hash
    fashion = load("fashion-mnist", SHARED / "fashion_mnist")
    assert fashion.train_images.shape == (60_000, 28, 28, 1) and fashion.test_images.shape == (10_000, 28, 28, 1)
    assert (np.bincount(fashion.train_labels) == 6000).all() and (np.bincount(fashion.test_labels) == 1000).all()
    np.testing.assert_allclose(fashion.mean / 255, 0.2860, atol=5e-5)  # the figure that everyone uses
    np.testing.assert_allclose(fashion.std / 255, 0.3530, atol=5e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "unpack_cifar10.py").is_file(), reason="the real CIFAR-10 is not here")
def test_the_real_cifar10(tmp_path):
    subprocess.run([sys.executable, SHARED / "unpack_cifar10.py", tmp_path], check=True, capture_output=True)
    cifar = load("cifar10", tmp_path)
    assert cifar.train_images.shape == (50_000, 32, 32, 3) and cifar.test_images.shape == (10_000, 32, 32, 3)
    assert (np.bincount(cifar.train_labels) == 5000).all() and (np.bincount(cifar.test_labels) == 1000).all()
    np.testing.assert_allclose(cifar.mean / 255, (0.4914, 0.4822, 0.4465), atol=1e-4)


# ---------------------------------------------------------------------------------------------------- batches


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    digits = load("digits")
    digits = dataclasses.replace(digits, train_labels=np.arange(1437, dtype=np.int32))  # each image has its own number
    batches = [labels for _, labels in islice(train_batches(digits, 100, seed=3), 28)]
    first, second = np.concatenate(batches[:14]), np.concatenate(batches[14:])
    assert len(set(first)) == len(set(second)) == 1400 and (first != second).any()
    assert (first != np.sort(first)).any()


def test_batches_follow_the_seed_and_pair_images_with_their_labels():
    digits = load("digits")
    again, other = ([b for b in islice(train_batches(digits, 64, seed=seed), 30)] for seed in (0, 1))
    for (images, labels), (images2, labels2) in zip(islice(train_batches(digits, 64, seed=0), 30), again, strict=True):
        np.testing.assert_array_equal(images, images2)
        np.testing.assert_array_equal(labels, labels2)
    assert (again[0][1] != other[0][1]).any()
    label_of = {i.tobytes(): y for i, y in zip(digits.train_images, digits.train_labels, strict=True)}
    assert all(label_of[i.tobytes()] == y for i, y in zip(*again[0], strict=True))


@pytest.mark.parametrize("size", [0, -1, 1438])
def test_a_batch_size_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match=rf"batch_size is {size}, expected 1 to 1437"):
        train_batches(load("digits"), size, seed=0)


# ----------------------------------------------------------------------------------------------- damaged files


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
FASHION_DAMAGE = {
    "truncated gzip": (IMAGES, lambda b: b[: len(b) // 2], "not a whole gzip file"),
    "no gzip": (LABELS, gzip.decompress, "not a whole gzip file"),
    "bad checksum": (IMAGES, lambda b: b[:-8] + bytes(8), "not a whole gzip file"),
    "empty": (IMAGES, lambda b: b"", "starts with nothing, expected the IDX header 00000803"),
    "wrong magic": (LABELS, lambda b: gzip.compress(b"\x89PNG" + bytes(40)), "starts with 89504e47, expected"),
    "labels for images": (IMAGES, lambda b: gzip.compress(idx(np.zeros(30, np.uint8))), "starts with 00000801"),
    "short": (IMAGES, lambda b: gzip.compress(gzip.decompress(b)[:-1]), r"23,520 values .* and holds 23,519"),
    "long": (IMAGES, lambda b: gzip.compress(gzip.decompress(b) + b"x"), r"23,520 values .* and holds 23,521"),
    "no image": (IMAGES, lambda b: gzip.compress(idx(np.zeros((0, 28, 28), np.uint8))), "promises 0 values"),
    "fewer labels": (LABELS, lambda b: gzip.compress(idx(np.zeros(29, np.uint8))), "29 labels for the 30 images"),
    "strange label": (LABELS, lambda b: gzip.compress(idx(np.full(30, 10, np.uint8))), "label 10 at index 0"),
}


@pytest.mark.parametrize("damage", FASHION_DAMAGE)
def test_a_damaged_idx_file_is_named_with_its_remedy(tmp_path, damage):
    name, change, what = FASHION_DAMAGE[damage]
    write_fashion(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(DataFileError, match=what) as error:
        load("fashion-mnist", tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert "Delete" in str(error.value) and data.SOURCES[name].url in str(error.value)


CIFAR_DAMAGE = {
    "cut inside a record": ("data_batch_3.bin", lambda b: b[:-1], "18,437 bytes, expected a multiple of 3,073"),
    "cut between records": ("data_batch_3.bin", lambda b: b[:3073], "holds 1 images, its sister files 6"),
    "empty": ("test_batch.bin", lambda b: b"", "0 bytes"),
    "strange label": ("data_batch_5.bin", lambda b: b"\xff" + b[1:], "label 255 at index 0, expected 0 to 9"),
    "missing": ("data_batch_2.bin", None, "cannot be read"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", CIFAR_DAMAGE)
def test_a_damaged_cifar10_file_is_named_with_its_remedy(tmp_path, damage, packed):
    name, change, what = CIFAR_DAMAGE[damage]
    write_cifar(tmp_path / "files")
    path = tmp_path / "files" / CIFAR_FOLDER / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    if packed:
        what = "lacks" if damage == "missing" else what
        pack_cifar(tmp_path / "files").rename(tmp_path / CIFAR_ARCHIVE)
    with pytest.raises(DataFileError, match=what) as error:
        load("cifar10", tmp_path if packed else tmp_path / "files")
    assert name in str(error.value) and data.SOURCES[CIFAR_ARCHIVE].url in str(error.value)
    assert f"elete {tmp_path / CIFAR_ARCHIVE} and" in str(error.value) if packed else str(path) in str(error.value)


def test_a_truncated_archive_is_named_with_its_remedy(tmp_path):
    write_cifar(tmp_path / "files")
    whole = pack_cifar(tmp_path / "files").read_bytes()
    (tmp_path / CIFAR_ARCHIVE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataFileError, match=r"not a whole .tar.gz archive.*Delete .* and run again"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_a_directory_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(DataFileError, match=r"no such directory.* Give an existing directory") as error:
        load(name, tmp_path / "typo")
    assert str(tmp_path / "typo") in str(error.value) and not (tmp_path / "typo").exists()


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown data set 'mnist'; expected one of digits, fashion-mnist, cifar10"):
        load("mnist")


# --------------------------------------------------------------------------------------------------- downloads


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        del format, args


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server on this machine with small Fashion-MNIST files, named as the official ones; yields its folder."""
    folder = tmp_path / "site"
    folder.mkdir()
    write_fashion(folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for path in folder.iterdir():
            digest = hashlib.md5(path.read_bytes()).hexdigest()
            source = Source(f"http://127.0.0.1:{server.server_port}/{path.name}", f"md5:{digest}")
            monkeypatch.setitem(data.SOURCES, path.name, source)
        yield folder
        server.shutdown()
        thread.join()


def test_missing_files_are_downloaded_and_files_that_are_there_are_kept(tmp_path, site):
    mine = tmp_path / "mine"
    mine.mkdir()
    own = gzip.compress(idx(np.full(30, 7, np.uint8)))  # the user's own file has another hash
    (mine / LABELS).write_bytes(own)
    fashion = load("fashion-mnist", mine)
    assert (fashion.train_labels == 7).all() and (mine / LABELS).read_bytes() == own
    assert sorted(p.name for p in mine.iterdir()) == sorted(p.name for p in site.iterdir())
    for path in site.iterdir():
        path.unlink()  # so nothing can be fetched again
    np.testing.assert_array_equal(load("fashion-mnist", mine).train_images, fashion.train_images)


@pytest.mark.parametrize("trouble", ["wrong hash", "no such page", "no server"])
def test_a_download_that_fails_says_so_and_leaves_no_file(tmp_path, site, monkeypatch, trouble):
    mine = tmp_path / "mine"
    mine.mkdir()
    if trouble == "wrong hash":
        (site / IMAGES).write_bytes((site / IMAGES).read_bytes()[:-10])
    elif trouble == "no such page":
        (site / IMAGES).unlink()
    else:
        monkeypatch.setitem(data.SOURCES, IMAGES, Source("http://127.0.0.1:9/" + IMAGES, "md5:0"))
    with pytest.raises(DataFileError, match=r"missing, and could not be fetched from http://127.*--data-dir") as error:
        load("fashion-mnist", mine)
    assert str(mine / IMAGES) in str(error.value)
    assert list(mine.iterdir()) == []
    del error
    with warnings.catch_warnings():  # requests leaves the socket of a refused page to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
