"""Which files the public data sets consist of, where they are published, and the checksums of what is published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

EMNIST_SPLITS: Final = ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file that a server has under `name`.

    Args:
      name: the name there. One that ends in `.gz` is checked uncompressed, since mirrors compress differently.
      sha256, num_bytes: of the content.
    """

    name: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PublishedData:
    """A public data set.

    Args:
      files: the names that its data kind reads, each perhaps with `.gz` after it.
      url: the folder that the publisher serves; None where the data are not published in this form.
      downloads: what is fetched from there.
      archive_folder: where `downloads` is one zip archive, the folder in it that has `files`, each with `.gz`.
      instead: what to do where `url` is None, or why there is nothing to do where there are no `files`.
    """

    files: tuple[str, ...]
    url: str | None = None
    downloads: tuple[PublishedFile, ...] = ()
    archive_folder: str | None = None
    instead: str | None = None


def idx_files(*parts: str) -> tuple[str, ...]:
    """The names of a data set's files of images and of labels.

    >>> idx_files("t10k")
    ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')
    """
    return tuple(f"{part}-{what}" for part in parts for what in ("images-idx3-ubyte", "labels-idx1-ubyte"))


PUBLISHED: Final = {
    "heart_disease": PublishedData((), instead="comes with fedrounds"),
    "digits": PublishedData((), instead="comes with scikit-learn"),
    "mnist": PublishedData(
        idx_files("train", "t10k"),
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        (
            PublishedFile(
                "train-images-idx3-ubyte.gz",
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                47_040_016,
            ),
            PublishedFile(
                "train-labels-idx1-ubyte.gz",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                60_008,
            ),
            PublishedFile(
                "t10k-images-idx3-ubyte.gz",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                7_840_016,
            ),
            PublishedFile(
                "t10k-labels-idx1-ubyte.gz",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                10_008,
            ),
        ),
    ),
    "emnist": PublishedData(
        idx_files(*(f"emnist-{split}-{part}" for split in EMNIST_SPLITS for part in ("train", "test"))),
        "https://biometrics.nist.gov/cs_links/EMNIST",
        (PublishedFile("gzip.zip", "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e", 561_753_746),),
        archive_folder="gzip",
    ),
    "femnist": PublishedData(
        tuple(
            f"femnist-{part}-{what}"
            for part in ("train", "test")
            for what in ("images-idx3-ubyte", "labels-idx1-ubyte", "writers-idx1-int")
        ),
        instead="LEAF publishes a script that builds FEMNIST, not its files: write its output as IDX files",
    ),
    "shakespeare": PublishedData(
        ("input.txt",),
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare",
        (PublishedFile("input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 1_115_394),),
    ),
}
"""Every public data set, by its data kind."""
