"""The random number generators of one rank: python, numpy, torch, and the current CUDA device.

DTensor draws from the device's generator and keeps none of its own (``torch.distributed.tensor``
since 2.9), so it is covered.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.report import ReportItem, Severity, newer_version
from dcp_resume.session.ranks import place_in_world

__all__ = ["RngState"]

VERSION = 1


class RngState:
    """A ``Stateful`` that saves and restores this rank's generators; put it into the state.

    On as many streams as were saved, each rank goes on in the middle of its own. On another number
    there is no state to go on with: every rank derives a new one from the seed, the step and its
    stream, the same at each resume of that step, and the load report says so.

    Args:
        seed: Of the derived states; the same on every rank.
        stream: Which random stream this rank draws from; -1 for one a rank. Ranks that must draw
            alike (tensor-parallel ones, for dropout outside of the sharded region) share one.
        num_streams: Number of streams; needed with ``stream``.

    Raises:
        ConfigurationError: ``stream`` is not below ``num_streams``.
    """

    per_rank = ("stream", "python", "numpy*", "torch", "cuda")

    def __init__(self, seed: int = 0, *, stream: int = -1, num_streams: int = 0) -> None:
        is_one_a_rank = stream == -1 and num_streams == 0
        if not is_one_a_rank and not 0 <= stream < num_streams:
            raise ConfigurationError(
                f"stream must be at least 0 and below num_streams, got {stream} of {num_streams}",
                option="stream",
            )
        rank, world_size = place_in_world()
        self.seed = seed
        self.stream = rank if is_one_a_rank else stream
        self.num_streams = world_size if is_one_a_rank else num_streams

    def state_dict(self) -> dict[str, Any]:
        """The generators' states, as values; they do not advance."""
        return {
            "version": VERSION,
            "seed": self.seed,
            "num_streams": self.num_streams,
            "stream": self.stream,
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state().numpy(),
            "cuda": [torch.cuda.get_rng_state().numpy()] if _has_cuda_state() else [],
        }

    def differences(self, saved: Mapping[str, Any]) -> Iterator[ReportItem]:
        """Whether each rank can go on with its own stream."""
        newer = newer_version(saved, VERSION)
        if newer:
            yield from newer
            return
        streams = saved.get("num_streams", 0)
        if streams and (streams, saved.get("stream")) != (self.num_streams, self.stream):
            message = (
                f"saved for {streams} random stream(s), now {self.num_streams}, or in another "
                f"order of ranks: each is derived anew from seed {saved.get('seed')}, the step and "
                f"its number"
            )
            yield ReportItem(Severity.WARN, "rng", "", message)
        elif bool(saved.get("cuda")) != _has_cuda_state():
            message = "a CUDA generator is on one side only: it keeps its state, or is left out"
            yield ReportItem(Severity.WARN, "precision", "cuda", message)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put the generators where they were."""
        self.seed = state_dict["seed"]
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(torch.from_numpy(np.array(state_dict["torch"])))
        if torch.cuda.is_available():
            for state in state_dict["cuda"]:
                torch.cuda.set_rng_state(torch.from_numpy(np.array(state)))

    def derive(self, saved: Mapping[str, Any], step: int) -> None:
        """Seed every generator from the saved seed, ``step`` and this rank's stream."""
        self.seed = saved.get("seed", self.seed)
        text = f"{self.seed}/{step}/{self.num_streams}/{self.stream}"
        digest = blake2b(text.encode(), digest_size=24).digest()
        random.seed(digest[:8])
        np.random.seed(np.frombuffer(digest[8:16], np.uint32))
        torch.manual_seed(int.from_bytes(digest[16:], "little") >> 1)  # CUDA's generators too


def _has_cuda_state() -> bool:
    """Whether this process draws from a CUDA generator; asking must not start CUDA."""
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
