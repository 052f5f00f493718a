"""Images and videos in and out of datasets, through PyAV (extra `video`); PNG is written without it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from actok.core import DataError, MissingExtraError

# The widely decodable choice. A key frame every other frame makes random access cheap, as LeRobot's own videos do.
CODEC = "libx264"
CODEC_OPTIONS = {"g": "2", "crf": "18"}
PIXELS = "yuv420p"

__all__ = ["VideoWriter", "decode_image", "decode_video", "encode_png"]


def _av() -> ModuleType:
    try:
        import av
    except ImportError:
        raise MissingExtraError("PyAV", "video", "reading and writing of images and videos") from None
    return av


def encode_png(image: np.ndarray) -> bytes:
    """A lossless PNG of uint8 [H, W, 3]."""
    height, width, _ = image.shape
    # Filter type 1 (difference to the pixel on the left, modulo 256): small for smooth images, one subtraction to make.
    filtered = image.copy()
    filtered[:, 1:] -= image[:, :-1]
    lines = np.empty((height, 1 + 3 * width), np.uint8)
    lines[:, 0] = 1
    lines[:, 1:] = filtered.reshape(height, -1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines.tobytes(), 6)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def decode_image(content: bytes, where: str) -> np.ndarray:
    """uint8 [H, W, 3] of a PNG or JPEG. Raises DataError naming `where` if it is neither or damaged."""
    av = _av()
    try:
        with av.open(io.BytesIO(content)) as container:
            frame = next(container.decode(video=0))
            image: np.ndarray = frame.to_ndarray(format="rgb24")
            return image
    except (av.FFmpegError, StopIteration, IndexError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{where} holds an image that cannot be decoded ({reason}); write it again") from None


def decode_video(path: Path, start: float, count: int, fps: float) -> np.ndarray:
    """uint8 [count, H, W, 3]: the frames at `start`, start + 1/fps, ... seconds.

    Raises DataError where the file is missing or damaged, or has no frame within half a frame time of one of these.
    """
    av = _av()
    if not path.is_file():
        raise DataError(f"{path} is missing; download the dataset's videos, or read it without images")
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(max(0, int(start / stream.time_base) - 1), stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                seconds = float(frame.pts * stream.time_base)
                wanted = start + len(frames) / fps
                if seconds < wanted - 0.5 / fps:
                    continue
                if seconds > wanted + 0.5 / fps:
                    break
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == count:
                    return np.stack(frames)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise DataError(f"{path} cannot be decoded ({error}); download the video again") from None
    raise DataError(
        f"{path} has no frame at {start + len(frames) / fps:.3f} s, frame {len(frames)} of {count} of an episode;"
        " download the video again"
    )


class VideoWriter:
    """Frames to one mp4 file at a fixed rate; `close` completes it."""

    def __init__(self, path: Path, fps: float, height: int, width: int) -> None:
        from fractions import Fraction

        av = _av()
        if height % 2 or width % 2:
            raise DataError(
                f"images of {height} x {width} pixels make no video; even sizes do, or write images='image'"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.count = 0
        self._container: Any = av.open(str(path), "w")
        rate = Fraction(fps).limit_denominator(100_000)
        self._time_base = 1 / rate
        self._stream: Any = self._container.add_stream(CODEC, rate=rate, options=CODEC_OPTIONS)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, PIXELS
        self._frame = av.VideoFrame

    def write(self, images: np.ndarray) -> None:
        """Append uint8 [T, H, W, 3]."""
        for image in images:
            frame = self._frame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = self.count
            frame.time_base = self._time_base
            self._container.mux(self._stream.encode(frame))
            self.count += 1

    def close(self) -> None:
        """Flush and close."""
        self._container.mux(self._stream.encode())
        self._container.close()

    def abandon(self) -> None:
        """Close without completing; the file is to be deleted."""
        self._container.close()
