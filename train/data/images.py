"""Labelled images behind one interface, whatever holds them: files, table columns, arrays."""

import io
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..optional import optional
from .sources import first_line

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageError(ValueError):
    """An image that cannot be read; the message names it."""


class ImageSet(ABC):
    """Images in a fixed order with their labels (int64): a data set split."""

    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, index: int) -> "Image":
        """The image, decoded, in RGB. Raises ImageError."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What error messages call the image."""

    @abstractmethod
    def contents(self) -> Iterator[bytes]:
        """Bytes that tell this set from another one of the same size."""

    def crc(self) -> int:
        """A checksum of labels and contents."""
        crc = zlib.crc32(self.labels.tobytes())
        for piece in self.contents():
            crc = zlib.crc32(piece, crc)
        return crc


class Part(ImageSet):
    """Some of the images of a set."""

    def __init__(self, whole: ImageSet, indices: NDArray[np.int64]) -> None:
        self.whole, self.indices = whole, indices
        self.labels = whole.labels[indices]

    def open(self, index: int) -> "Image":
        return self.whole.open(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))

    def contents(self) -> Iterator[bytes]:
        yield self.indices.tobytes()
        yield from self.whole.contents()


class Arrays(ImageSet):
    """Grey images (N, H, W), uint8, in memory."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], title: str) -> None:
        self.images, self.labels, self.title = images, labels, title

    def open(self, index: int) -> "Image":
        return _pillow().fromarray(self.images[index]).convert("RGB")

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def contents(self) -> Iterator[bytes]:
        yield self.images.tobytes()


class Files(ImageSet):
    """Image files."""

    def __init__(self, root: Path, paths: Sequence[str], labels: NDArray[np.int64]) -> None:
        """paths: below `root`."""
        # One array of bytes: millions of str objects would be copied into every worker as it counts references.
        self.root, self.paths, self.labels = root, np.array([os.fsencode(p) for p in paths]), labels

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.paths[index]))

    def open(self, index: int) -> "Image":
        return decode(self.path(index), self.name(index))

    def name(self, index: int) -> str:
        return str(self.path(index))

    def contents(self) -> Iterator[bytes]:
        yield self.paths.tobytes()


class Rows(ImageSet):
    """Encoded images in a column of a table: Arrow's, in memory, or a hub data set's, mapped from disk."""

    def __init__(self, column: Any, labels: NDArray[np.int64], title: str, key: bytes | None = None) -> None:
        """column[i]: bytes, or a dict with "bytes" and "path", perhaps as an Arrow scalar. key: tells the contents."""
        self.column, self.labels, self.title, self.key = column, labels, title, key

    def open(self, index: int) -> "Image":
        value = self.column[index]
        value = value.as_py() if hasattr(value, "as_py") else value
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else Path(value.get("path") or "")
        return decode(b"" if value is None else value, self.name(index))

    def name(self, index: int) -> str:
        return f"{self.title} row {index}"

    def contents(self) -> Iterator[bytes]:
        if self.key is not None:
            yield self.key
            return
        for chunk in self.column.chunks:
            yield from (buffer for buffer in chunk.buffers() if buffer is not None)


def decode(content: bytes | Path, name: str) -> "Image":
    """A decoded RGB image, as stored: transparency and the orientation in EXIF count for nothing, as with torchvision.

    Raises ImageError for whatever is wrong with it, a missing file included.
    """
    try:
        with _pillow().open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            return _rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError(f"image {name}: unreadable or truncated ({first_line(error)})") from error


def _rgb(image: Any) -> Any:
    """Of 16 bits the upper 8, where Pillow's own conversion makes everything above 255 white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _pillow().fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    return image.convert("RGB")


def _pillow() -> Any:
    return optional("PIL.Image", "vision", "pillow")
