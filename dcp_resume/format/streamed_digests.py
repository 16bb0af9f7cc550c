"""Block digests of a file that passes by once, in windows that end anywhere."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dcp_resume.format.digests import DIGEST_BYTES, DigestAlgorithm

__all__ = ["StreamedDigests"]


class StreamedDigests:
    """Digests the blocks of one file while its bytes go by; equal to ``digest_blocks``.

    Args:
        bounds: int64[n + 1], from ``block_bounds``.
        algorithm: Of the checkpoint.
    """

    def __init__(
        self,
        bounds: npt.NDArray[np.int64],
        algorithm: DigestAlgorithm = DigestAlgorithm.XXH3,
    ) -> None:
        self._algorithm = algorithm
        self._stops: list[int] = bounds[1:].tolist()
        self._stops.reverse()
        self._position = 0
        self._state = algorithm.new()
        self._digests: list[bytes] = []

    def update(self, window: memoryview) -> None:
        """Take the next bytes of the file; the memory may be reused afterwards.

        Raises:
            ValueError: More bytes than the file has.
        """
        while len(window):
            if not self._stops:
                raise ValueError(f"bytes beyond the end of the file at {self._position}")
            piece = window[: self._stops[-1] - self._position]
            self._state.update(piece)
            self._position += len(piece)
            window = window[len(piece) :]
            if self._position == self._stops[-1]:
                self._stops.pop()
                self._digests.append(self._state.digest()[:DIGEST_BYTES])
                self._state = self._algorithm.new()

    def finish(self) -> bytes:
        """The digests of all blocks, 16 bytes each.

        Raises:
            ValueError: Fewer bytes than the file has.
        """
        if self._stops:
            raise ValueError(f"the file ends at {self._stops[0]}, only {self._position} bytes came")
        return b"".join(self._digests)
