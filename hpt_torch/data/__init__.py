"""Data sets as tensors, kept on the device or streamed, split before anything is learned from them."""

from collections.abc import Callable

from hpt_torch.data.arrays import npz
from hpt_torch.data.base import Column, Data, Part, Rows
from hpt_torch.data.images import (
    as_rows,
    cifar10,
    cifar100,
    digits_images,
    fashion_mnist,
    fashion_mnist_rows,
    image_npz,
    kmnist,
    mnist,
    mnist_rows,
    svhn,
)
from hpt_torch.data.sequences import japanese_vowels, text, ts
from hpt_torch.data.splits import split
from hpt_torch.data.stream import Stream
from hpt_torch.data.synthetic import adding, copying, teacher_student
from hpt_torch.data.tabular import breast_cancer, csv, diabetes, digits, iris, wine

DATASETS: dict[str, Callable[..., Data]] = {
    made.__name__: made
    for made in (
        *(digits, breast_cancer, wine, iris, diabetes, csv, npz),
        *(mnist, fashion_mnist, kmnist, cifar10, cifar100, svhn, digits_images, image_npz),
        *(fashion_mnist_rows, mnist_rows),
        *(japanese_vowels, ts, text),
        *(adding, copying, teacher_student),
    )
}

__all__ = ["DATASETS", "Column", "Data", "Part", "Rows", "Stream", "as_rows", "split", *DATASETS]
