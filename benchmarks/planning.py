"""``python -m benchmarks.planning``: what the coordinator spends on a save, by number of ranks.

Ranks are simulated: each rank's plan and report are made as bytes, outside the clock, and the
coordinator does to them what it does in a save. There is no network and no store in these figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dcp_resume.format.digests import DigestAlgorithm, choose_block_size
from dcp_resume.format.leaves import pack_leaves
from dcp_resume.manifest.models import MeshEntry, TensorEntry, TrainerFacts
from dcp_resume.planning.box_rows import Boxes
from dcp_resume.planning.plans import LocalPlan, PlanContents, PlanShape, encode_structure
from dcp_resume.session.attempt import Order
from dcp_resume.session.documents import (
    AttemptIdentity,
    Facts,
    build_documents,
    planned_tables,
)
from dcp_resume.session.plan_memory import PlanMemory
from dcp_resume.session.writing import RankReport

WIDTHS = (16, 32, 48, 64, 96, 128)
"""Columns of the tensors, in turn; each has one row a rank."""
FRAME = b"+"
"""Of each ballot and answer."""
STEP = (1).to_bytes(8, "little")
ORDER = bytes(Order.NUM_BYTES)


@dataclass
class Clock:
    """CPU seconds of the phases of one save, in their order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to a phase."""
        started = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started


@dataclass(frozen=True)
class Planned:
    """One simulated save."""

    save: str
    ranks: int
    tensors: int
    seconds: dict[str, float]
    plans_bytes: int
    orders_bytes: int
    index_bytes: int
    digest_bytes: int
    catalog_bytes: int

    @property
    def microseconds_a_pair(self) -> float:
        """CPU time at the coordinator, per tensor and rank."""
        return sum(self.seconds.values()) / (self.ranks * self.tensors) * 1e6


def offered(ranks: int, tensors: int) -> Iterator[LocalPlan]:
    """Each rank's plan: every tensor sharded by rows over all ranks."""
    mesh = MeshEntry(id="mesh", axes=("dp",), shape=(ranks,))
    entries = [
        TensorEntry(
            fqn=f"model.layers.{number}.weight",
            path=("model", f"layers.{number}.weight"),
            part="model",
            dtype="float32",
            global_shape=(ranks, WIDTHS[number % len(WIDTHS)]),
            kind="sharded",
            mesh="mesh",
            placements=("S(0)",),
            rule={"dp": 0},
            layer=number,
        )
        for number in range(tensors)
    ]
    structure = encode_structure(entries, [mesh])
    box = np.arange(tensors, dtype=np.int32) % len(WIDTHS)
    sizes = np.array([[1, width] for width in WIDTHS[:tensors]])
    for rank in range(ranks):
        shape = PlanShape(
            rank=rank,
            world_size=ranks,
            structure=structure,
            tensor=np.arange(tensors, dtype=np.int32),
            box=box,
            boxes=Boxes(np.tile(np.array([rank, 0]), (len(sizes), 1)), sizes),
            compared=np.zeros(0, np.int32),
        )
        yield LocalPlan(shape, PlanContents(b"", pack_leaves({})))


def reported(ranks: int, tensors: int, block_size: int) -> Iterator[bytes]:
    """Each rank's report of its file; the plan is not asked, so that it stays cold."""
    held = sum(4 * WIDTHS[number % len(WIDTHS)] for number in range(tensors))
    header, num_blocks = np.array([8192]), 1 + -(-held // block_size)
    for rank in range(ranks):
        digests = np.random.default_rng(rank).integers(0, 256, (num_blocks, 16), np.uint8)
        yield FRAME + RankReport(header + held, header, np.array([num_blocks]), digests).to_bytes()


def plan_saves(ranks: int, tensors: int) -> Iterator[Planned]:
    """Do the coordinator's part of a first save, and of one more of the same structure."""
    coordinator = PlanMemory()
    others = [PlanMemory() for _ in range(ranks)]
    for save in ("first", "again"):
        clock = Clock()
        sent = [
            FRAME + STEP + memory.ballot(own)
            for memory, own in zip(others, offered(ranks, tensors), strict=True)
        ]
        gc.collect()
        with clock.phase("ballots"):
            received = [ballot[len(FRAME) :] for ballot in sent]
            assert {ballot[: len(STEP)] for ballot in received} == {STEP}
            ballots = [ballot[len(STEP) :] for ballot in received]
        with clock.phase("merge"):
            assert coordinator.can_merge(ballots)
            plan = coordinator.merge(ballots)
        with clock.phase("orders"):
            block_size = choose_block_size(plan.layout.num_bytes)
            answers = [ORDER + answer for answer in coordinator.answers(ballots, plan)]
            answers = [FRAME + bytes(answer) for answer in answers]
        for memory, answer, own in zip(others, answers, offered(ranks, tensors), strict=True):
            memory.learn(answer[len(FRAME) + len(ORDER) :], own)
        sent_reports = list(reported(ranks, tensors, block_size))
        with clock.phase("reports"):
            reports = [RankReport.from_bytes(ballot[len(FRAME) :]) for ballot in sent_reports]
        with clock.phase("documents"):
            documents = build_documents(
                plan,
                planned_tables(plan, reports, DigestAlgorithm.XXH3),
                reports,
                AttemptIdentity("00000000-0000-4000-8000-000000000000", 1, "a" * 12, 1, None, None),
                Facts(TrainerFacts(step=1)),
                block_size,
            )
        yield Planned(
            save,
            ranks,
            tensors,
            clock.seconds,
            sum(map(len, sent)),
            sum(map(len, answers)),
            len(documents.index_bytes),
            documents.manifest.counts.blocks * 16,
            len(documents.catalog_bytes),
        )


def main() -> None:
    """Parse, plan, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 2048, 8192])
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    results = [save for ranks in arguments.ranks for save in plan_saves(ranks, arguments.tensors)]
    names = list(results[0].seconds)
    print(f"{arguments.tensors} tensors, each sharded over all ranks; CPU seconds")
    print(
        f"{'ranks':>6} {'save':>6} {'total':>7} {'µs/pair':>7} "
        + " ".join(f"{n:>10}" for n in names)
        + f" {'plans MiB':>10} {'orders MiB':>10} {'index MiB':>10} {'catalog MiB':>11}"
    )
    for result in results:
        print(
            f"{result.ranks:6} {result.save:>6} {sum(result.seconds.values()):7.2f} "
            f"{result.microseconds_a_pair:7.2f} "
            + " ".join(f"{result.seconds[n]:10.2f}" for n in names)
            + f" {result.plans_bytes / 2**20:10.1f} {result.orders_bytes / 2**20:10.1f} "
            f"{(result.index_bytes - result.digest_bytes) / 2**20:10.1f} "
            f"{result.catalog_bytes / 2**20:11.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
