"""Image sets: found, cached with a hash, split, normalised. Each test has a cache and folders of its own."""

from __future__ import annotations

import gzip
import hashlib
import logging
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpt_torch.data import DATASETS, as_rows, digits_images, fashion_mnist, image_npz, image_sources, mnist
from hpt_torch.data import image_sources as sources
from hpt_torch.types import TaskError

TESTS = Path(__file__).parent.parent
FIXTURE = TESTS / "fixtures" / "fashion_mnist_250.npz"
SHARED = TESTS.parent.parent / "shared" / "data"
DEBIAN = Path(sources.SOURCES["fashion_mnist"].system_directory)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The torchvision root; nothing of this machine is found, nothing is downloaded, no cache is touched."""
    monkeypatch.setenv("HPT_TORCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HPT_TORCH_DATA", str(tmp_path / "root"))
    monkeypatch.setenv("HPT_TORCH_DOWNLOAD", "0")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    import dataclasses

    bare = {n: dataclasses.replace(source, system_directory="") for n, source in sources.SOURCES.items()}
    monkeypatch.setattr(sources, "SOURCES", bare)
    return tmp_path / "root"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, *, packed: bool = True) -> dict[str, np.ndarray]:
    """The fixture as the four files of Fashion-MNIST."""
    folder.mkdir(parents=True)
    with np.load(FIXTURE) as file:
        arrays = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    for name, array in zip(sources._IDX, arrays.values(), strict=True):
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return arrays


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_under_a_torchvision_root(root: Path, packed: bool) -> None:
    arrays = write_idx(root / "FashionMNIST" / "raw", packed=packed)
    data = fashion_mnist()
    assert data.holdout is not None
    assert (len(data.train), len(data.valid), len(data.holdout)) == (160, 40, 50)
    assert (data.input_shape, data.out_features, data.name) == ((1, 28, 28), 10, "fashion_mnist")
    assert torch.equal(data.holdout.tensors["inputs"], torch.from_numpy(arrays["x_test"])[:, None])
    assert data.holdout.tensors["targets"].tolist() == arrays["y_test"].tolist()
    assert data.train.tensors["inputs"].dtype == torch.uint8
    both = torch.cat([data.train.tensors["inputs"], data.valid.tensors["inputs"]]).flatten(1)
    assert sorted(both.tolist()) == sorted(arrays["x_train"].reshape(200, -1).tolist())
    for part, share in ((data.train, 16), (data.valid, 4)):
        assert torch.bincount(part.tensors["targets"]).tolist() == [share] * 10


def test_statistics_are_of_the_train_rows_only(root: Path) -> None:
    write_idx(root / "FashionMNIST" / "raw")
    data = fashion_mnist()
    assert data.mean is not None
    assert data.std is not None
    assert data.mean.shape == (1, 1, 1)
    seen = data.train.tensors["inputs"].double() / 255
    torch.testing.assert_close(data.mean.double().item(), seen.mean().item())
    torch.testing.assert_close(data.std.double().item(), seen.std(correction=0).item())
    moved = data.to(torch.device("cpu"), torch.float32)
    assert abs(float(moved.train.tensors["inputs"].mean())) < 1e-5
    assert abs(float(moved.valid.tensors["inputs"].mean())) > 1e-5


def test_a_channel_that_never_varies_is_finite(tmp_path: Path) -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    images = draw.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    images[..., 1] = 77
    np.savez(tmp_path / "flat.npz", x=images, y=np.arange(40) % 2)
    moved = image_npz(tmp_path / "flat.npz").to(torch.device("cpu"), torch.float32)
    assert moved.train.tensors["inputs"][:, 1].abs().max() < 1e-5
    torch.testing.assert_close(moved.train.tensors["inputs"][:, 0].std(correction=0), torch.tensor(1.0))


def test_seeds_and_limits(root: Path) -> None:
    write_idx(root / "FashionMNIST" / "raw")
    assert fashion_mnist(seed=1).fingerprint() == fashion_mnist(seed=1).fingerprint()
    assert fashion_mnist(seed=1).fingerprint() != fashion_mnist(seed=2).fingerprint()
    short = fashion_mnist(limit=40, valid_fraction=0.25)
    assert short.holdout is not None
    assert (len(short.train), len(short.valid), len(short.holdout)) == (30, 10, 40)
    assert torch.bincount(short.train.tensors["targets"]).tolist() == [3] * 10
    assert torch.bincount(short.holdout.tensors["targets"]).tolist() == [4] * 10
    assert fashion_mnist(limit=10**6).fingerprint() == fashion_mnist().fingerprint()
    assert fashion_mnist(holdout_fraction=0).holdout is None
    with pytest.raises(TaskError, match="limit must be at least 1 row, got 0; leave it out for all rows"):
        fashion_mnist(limit=0)


# -- the cache -----------------------------------------------------------------------------------------


def test_the_second_load_needs_only_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(root / "FashionMNIST" / "raw")
    first = fashion_mnist()
    file = root.parent / "cache" / "fashion_mnist.safetensors"
    assert load_file(file)["x_train"].shape == (200, 1, 28, 28)
    recorded = file.with_suffix(".sha256").read_text().split()
    assert recorded == [hashlib.sha256(file.read_bytes()).hexdigest(), file.name]
    monkeypatch.setattr("hpt_torch.data.images.find", lambda name: pytest.fail("looked for it again"))
    assert fashion_mnist().fingerprint() == first.fingerprint()


@pytest.mark.parametrize("damage", ["flip", "cut", "no hash", "other hash", "binary hash"])
def test_a_damaged_cache_is_rebuilt(root: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    write_idx(root / "FashionMNIST" / "raw")
    first = fashion_mnist().fingerprint()
    file = root.parent / "cache" / "fashion_mnist.safetensors"
    whole, sidecar = file.read_bytes(), file.with_suffix(".sha256")
    match damage:
        case "flip":
            file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        case "cut":
            file.write_bytes(whole[:100])
        case "no hash":
            sidecar.unlink()
        case "other hash":
            sidecar.write_text("0" * 64)
        case "binary hash":
            sidecar.write_bytes(b"\xff\xfe")
    with caplog.at_level(logging.WARNING):
        assert fashion_mnist().fingerprint() == first
    assert "is damaged: its SHA-256 is not the one beside it; it is built anew" in caplog.text
    assert file.read_bytes() == whole
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert fashion_mnist().fingerprint() == first
    assert not caplog.records


def test_a_cache_that_cannot_be_written_costs_only_time(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_idx(root / "FashionMNIST" / "raw")
    (root.parent / "a_file").touch()
    monkeypatch.setenv("HPT_TORCH_CACHE", str(root.parent / "a_file" / "cache"))
    assert len(fashion_mnist().train) == 160
    assert "cannot be written" in caplog.text


# -- where sets are found ------------------------------------------------------------------------------


def test_nowhere_says_the_three_ways(root: Path) -> None:
    with pytest.raises(
        TaskError,
        match=r"'mnist' must be on this machine or be downloaded.*root.*\(1\) set HPT_TORCH_DATA to a "
        r"torchvision root \(a folder that holds MNIST/raw/train-images-idx3-ubyte\), or \(2\) name an .npz "
        r"file .*image_npz, or \(3\) leave HPT_TORCH_DOWNLOAD other than 0",
    ):
        mnist()
    with pytest.raises(TaskError, match=r"\(2\) install the Debian package dataset-fashion-mnist"):
        fashion_mnist()


def test_a_download_is_torchvisions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPT_TORCH_DOWNLOAD", "1")
    from torchvision import datasets

    calls = []

    class Fake(datasets.FashionMNIST):
        def __init__(self, root: str, *, train: bool, download: bool) -> None:
            calls.append((root, train, download))
            if train:
                write_idx(Path(root) / "FashionMNIST" / "raw", packed=False)
            self.data, self.targets = torch.zeros(1, 28, 28, dtype=torch.uint8), torch.zeros(1)

    monkeypatch.setattr(datasets, "FashionMNIST", Fake)
    assert len(fashion_mnist().train) == 160
    assert calls == [(str(root), True, True), (str(root), False, True)]


def test_a_download_that_fails_says_why_and_what_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPT_TORCH_DOWNLOAD", "1")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr("torchvision.datasets.KMNIST", refuse)
    with pytest.raises(TaskError, match=r"\(1\) set HPT_TORCH_DATA .* The download failed: no route"):
        DATASETS["kmnist"]()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(folder: Path, files: dict[str, int], label: str, classes: int) -> list[tuple[str, str]]:
    folder.mkdir(parents=True)
    draw = np.random.Generator(np.random.PCG64(1))
    listed = []
    for name, rows in files.items():
        content = {
            "data": draw.integers(0, 256, (rows, 3072), dtype=np.uint8),
            label: [i % classes for i in range(rows)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
        listed.append((name, md5(folder / name)))
    return listed


@pytest.mark.parametrize(
    ("name", "folder", "label", "classes"),
    [
        ("cifar10", "cifar-10-batches-py", "labels", 10),
        ("cifar100", "cifar-100-python", "fine_labels", 20),
    ],
)
def test_cifar_under_a_torchvision_root(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str, label: str, classes: int
) -> None:
    made = f"torchvision.datasets.{name.upper()}"
    train, test = write_cifar(root / folder, {"train": 100, "test": 40}, label, classes)
    meta = root / folder / "meta"
    meta.write_bytes(pickle.dumps({"names": ["a"]}))
    monkeypatch.setattr(f"{made}.train_list", [train])
    monkeypatch.setattr(f"{made}.test_list", [test])
    monkeypatch.setattr(f"{made}.meta", {"filename": "meta", "key": "names", "md5": md5(meta)})
    data = DATASETS[name]()
    assert data.holdout is not None
    assert (len(data.train), len(data.valid), len(data.holdout)) == (80, 20, 40)
    assert (data.input_shape, data.out_features) == ((3, 32, 32), classes)
    stored = pickle.loads((root / folder / "test").read_bytes())["data"].reshape(40, 3, 32, 32)
    assert torch.equal(data.holdout.tensors["inputs"], torch.from_numpy(stored))


def test_svhn_under_a_torchvision_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    root.mkdir()
    draw, listed = np.random.Generator(np.random.PCG64(2)), {}
    for part, rows in (("train", 100), ("test", 30)):
        file = root / f"{part}_32x32.mat"
        pixels = draw.integers(0, 256, (32, 32, 3, rows), dtype=np.uint8)
        savemat(file, {"X": pixels, "y": (np.arange(rows)[:, None] % 10 + 1).astype(np.uint8)})
        listed[part] = ["", file.name, md5(file)]
    monkeypatch.setattr("torchvision.datasets.SVHN.split_list", listed)
    data = DATASETS["svhn"]()
    assert data.holdout is not None
    assert (data.input_shape, data.out_features, len(data.train)) == ((3, 32, 32), 10, 80)
    assert torch.equal(data.holdout.tensors["inputs"], torch.from_numpy(pixels.transpose(3, 2, 0, 1).copy()))


def test_files_that_torchvision_refuses_are_not_used(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_cifar(root / "cifar-10-batches-py", {"data_batch_1": 10}, "labels", 10)
    with pytest.raises(TaskError, match="'cifar10' must be on this machine"):
        DATASETS["cifar10"]()
    assert "torchvision refuses CIFAR10" in caplog.text


def test_the_debian_package(monkeypatch: pytest.MonkeyPatch) -> None:
    if not DEBIAN.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    import dataclasses

    source = dataclasses.replace(sources.SOURCES["fashion_mnist"], system_directory=str(DEBIAN))
    monkeypatch.setitem(image_sources.SOURCES, "fashion_mnist", source)
    found = image_sources.find("fashion_mnist")
    assert found["x_train"].shape == (60000, 1, 28, 28)
    assert found["x_test"].shape == (10000, 1, 28, 28)
    assert torch.bincount(found["y_train"].int()).tolist() == [6000] * 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be an idx file of bytes; delete it and fetch it again"),
        (b"\0\0\x0d\1\0\0\0\1\0\0\0\0", "must be an idx file of bytes"),
        (b"\0\0\x08\2\0\0\0\1", "must be an idx file of bytes"),
        (
            idx(np.zeros((2, 3), dtype=np.uint8))[:-1],
            r"must hold 6 values, as its shape \(2, 3\) says, got 5; del",
        ),
    ],
)
def test_idx_errors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(TaskError, match=message):
        sources.read_idx(tmp_path / "file")


@pytest.mark.parametrize("keep", [slice(None, 20), slice(5, None)])
def test_a_damaged_gz_file(tmp_path: Path, keep: slice) -> None:
    (tmp_path / "file.gz").write_bytes(gzip.compress(idx(np.arange(100, dtype=np.uint8)))[keep])
    with pytest.raises(TaskError, match=r"file.gz cannot be unpacked: .*; delete it and fetch it again"):
        sources.read_idx(tmp_path / "file.gz")


# -- images of other places ----------------------------------------------------------------------------


def test_layouts(tmp_path: Path) -> None:
    images = np.arange(2 * 5 * 6 * 3, dtype=np.uint8).reshape(2, 5, 6, 3)
    wanted = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert torch.equal(sources.as_nchw(images), wanted)
    assert torch.equal(sources.as_nchw(wanted.numpy()), wanted)
    assert sources.as_nchw(images[..., 0]).shape == (2, 1, 5, 6)
    with pytest.raises(
        TaskError, match=r"images of shape \(2, 3, 6, 3\) must have .*; say which with layout='NHWC'"
    ):
        sources.as_nchw(images[:, :3])
    assert sources.as_nchw(images[:, :3], "NCHW").shape == (2, 3, 6, 3)
    with pytest.raises(TaskError, match="layout must be 'auto', 'NHWC' or 'NCHW', got 'HWC'"):
        sources.as_nchw(images, "HWC")


def test_image_npz() -> None:
    data = image_npz(FIXTURE)
    assert data.holdout is not None
    assert (len(data.train), len(data.valid), len(data.holdout)) == (160, 40, 50)
    assert (data.input_shape, data.name) == ((1, 28, 28), "fashion_mnist_250")
    short = image_npz(FIXTURE, limit=50)
    assert (len(short.train), len(short.valid)) == (40, 10)


def test_image_npz_errors(tmp_path: Path) -> None:
    np.savez(tmp_path / "float.npz", x=np.zeros((10, 4, 4)), y=np.arange(10) % 2)
    with pytest.raises(
        TaskError, match=r"float.npz: images must be uint8 .*, got float64 .*; for other arrays use npz"
    ):
        image_npz(tmp_path / "float.npz")
    np.savez(tmp_path / "real.npz", x=np.zeros((10, 4, 4), dtype=np.uint8), y=np.arange(10.0))
    with pytest.raises(TaskError, match="limit keeps the share of each class, and these targets are real"):
        image_npz(tmp_path / "real.npz", limit=5)


@pytest.mark.parametrize(
    ("name", "shape", "rows", "classes"),
    [
        ("fashion_mnist_2k.npz", (1, 28, 28), (1280, 320, 400), 0),
        pytest.param("cifar10_subset.npz", (3, 32, 32), (8000, 2000, 2000), 10, marks=pytest.mark.slow),
    ],
)
def test_shared_images(name: str, shape: tuple[int, ...], rows: tuple[int, ...], classes: int) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"shared/data/{name} is not beside this checkout")
    data = image_npz(SHARED / name)
    assert data.holdout is not None
    assert (len(data.train), len(data.valid), len(data.holdout)) == rows
    assert (data.input_shape, data.out_features, len(data.classes)) == (shape, 10, classes)


def test_digits_as_images_are_the_digits() -> None:
    data, flat = digits_images(seed=3), DATASETS["digits"](seed=3)
    assert data.input_shape == (1, 8, 8)
    assert int(data.train.tensors["inputs"].max()) == 255
    assert torch.equal(data.valid.tensors["targets"], flat.valid.tensors["targets"])


def test_images_as_rows(root: Path) -> None:
    write_idx(root / "FashionMNIST" / "raw")
    write_idx(root / "MNIST" / "raw")
    rows, images = DATASETS["fashion_mnist_rows"](), fashion_mnist()
    assert (rows.input_shape, rows.name) == ((28, 28), "fashion_mnist_rows")
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.float64):
        moved, other = rows.to(cpu, dtype), images.to(cpu, dtype)
        assert torch.equal(moved.train.tensors["inputs"], other.train.tensors["inputs"].squeeze(1))
    assert DATASETS["mnist_rows"]().input_shape == (28, 28)
    with pytest.raises(
        TaskError, match=r"needs images of one channel, .*, got \(28, 28\); choose another data set"
    ):
        as_rows(rows)
