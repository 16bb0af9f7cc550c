"""One manager saves again and again: any change is noticed, and no change costs a new plan."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_resume import CheckpointManager, Declarations, RngState, SaveMode, Settings
from dcp_resume.errors import RankErrors, ReplicaMismatch
from dcp_resume.events import Event, PlanAgreed, StepReached, subscribe
from dcp_resume.planning.outline import OutlineMemory
from dcp_resume.planning.state import describe_state
from tests.support.damage import small_files

pytestmark = pytest.mark.ranks

State = dict[str, Any]
Make = Callable[[float], State]
"""A state full of numbers that depend on one."""

PER_RANK = Declarations(per_rank=("*own.*",))


def blocking(declarations: Declarations = PER_RANK) -> Settings:
    return Settings(mode=SaveMode.BLOCKING, declarations=declarations, deadline_s=40.0)


class Told:
    """Whether each plan was a remembered one."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, PlanAgreed):
            self.found.append(event.is_remembered)


def mesh_1d() -> DeviceMesh:
    return init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))


def mesh_2d() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def mesh_2d_otherwise() -> DeviceMesh:
    """As many ranks under the same names, at other places."""
    return DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("dp", "tp"))


def base(seed: float, **changes: Any) -> State:
    """Sharded and replicated DTensors, plain tensors, values, and values of each rank."""
    meshes = changes.get("mesh", mesh_1d)()
    placements = changes.get("placements", [Shard(0), Replicate()][: meshes.ndim])
    shape, dtype = changes.get("shape", (8, 4)), changes.get("dtype", torch.float32)
    whole = (torch.arange(float(torch.Size(shape).numel())).reshape(shape) + seed).to(dtype)
    model: State = {
        changes.get("name", "w"): distribute_tensor(whole, meshes, placements),
        "bias": torch.full((3,), seed),
        "own": {"buffer": torch.full((2,), seed + dist.get_rank())},
    }
    extra = torch.full((5,), seed)
    model.update(dict.fromkeys(changes.get("extra", ()), extra))
    if changes.get("is_tied"):
        model["bias2"] = model["bias"]
    elif "is_tied" in changes:
        model["bias2"] = model["bias"].clone()
    return {
        "model": {key: value for key, value in model.items() if key not in changes.get("less", ())},
        "step": int(seed),
        "text": changes.get("text", "t") + str(seed),
        "own": {"n": f"{changes.get('own', '')}{dist.get_rank()}/{seed}"},
    }


def flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{key}."))
        elif isinstance(value, DTensor):
            found[prefix + key] = value.full_tensor().tolist()
        else:
            found[prefix + key] = value.tolist() if isinstance(value, torch.Tensor) else value
    return found


def variant(**changes: Any) -> Make:
    return lambda seed: base(seed, **changes)


def of_rank_2(**changes: Any) -> Make:
    """A change on one rank alone."""
    return lambda seed: base(seed, **(changes if dist.get_rank() == 2 else {}))


CHANGES: dict[str, tuple[Make, Make, bool]] = {
    "values": (variant(), variant(text="longer"), True),
    "shape": (variant(), variant(shape=(12, 4)), False),
    "dims": (variant(), variant(shape=(8, 2, 2)), False),
    "dtype": (variant(), variant(dtype=torch.float64), False),
    "placement": (variant(), variant(placements=[Shard(1)]), False),
    "replicated": (variant(), variant(placements=[Replicate()]), False),
    "mesh": (variant(), variant(mesh=mesh_2d), False),
    "ranks of the mesh": (variant(mesh=mesh_2d), variant(mesh=mesh_2d_otherwise), False),
    "name": (variant(), variant(name="v"), False),
    "added": (variant(), variant(extra=("x",)), False),
    "removed": (variant(extra=("x",)), variant(), False),
    "added on one rank": (variant(), of_rank_2(extra=("x",)), False),
    "tied": (variant(is_tied=False), variant(is_tied=True), False),
    "untied": (variant(is_tied=True), variant(is_tied=False), False),
    "values beyond the manifest": (variant(), variant(text="x" * 70_000), False),
    "values that return to it": (variant(text="x" * 70_000), variant(), False),
    "inline values of about one size": (
        variant(text="x" * 70_000),
        variant(text="y" * 70_010),
        True,
    ),
    "a rank's values of about one size": (variant(), variant(own="1"), True),
    "a rank's values grow": (variant(), variant(own="1" * 200), False),
    "one rank's values grow": (variant(), of_rank_2(own="1" * 200), False),
}


def save_twice_each(root: str) -> dict[str, list[Any]]:
    """For each change save twice before, and twice after it; load all of them."""
    outcomes = {}
    for number, (name, (before, after, _)) in enumerate(CHANGES.items()):
        told, makes = Told(), [before, before, after, after]
        with CheckpointManager(f"{root}/{number}", blocking()) as checkpoints:
            unsubscribe = subscribe(told)
            for step, make in enumerate(makes):
                checkpoints.save(step, make(10.0 * step))
            unsubscribe()
            for step, make in enumerate(makes):
                target = make(-1.0)
                checkpoints.load(target, step)
                assert flat(target) == flat(make(10.0 * step)), (name, step)
        with CheckpointManager(f"{root}/{number}", blocking()) as checkpoints:
            target = after(-1.0)  # by one that remembers nothing
            checkpoints.load(target)
            assert flat(target) == flat(after(30.0)), name
        outcomes[name] = told.found
    return outcomes


def test_each_change_is_noticed_and_every_checkpoint_loads(ranks, tmp_path):
    for outcome in ranks.run(save_twice_each, 4, str(tmp_path), timeout_s=300):
        expected = {name: [False, True, is_same, True] for name, (_, _, is_same) in CHANGES.items()}
        assert outcome == expected


def change_declarations_in_place(root: str) -> list[Any]:
    from_rank, seen = {}, []
    declarations = Declarations(per_rank=("own.*",), from_rank=from_rank)

    def state(number: float) -> State:
        return {"model": {"w": torch.full((4,), number)}, "own": {"n": dist.get_rank()}}

    told = Told()
    unsubscribe = subscribe(told)
    with CheckpointManager(root, blocking(declarations)) as checkpoints:
        checkpoints.save(1, state(1.0))
        try:
            checkpoints.save(2, state(float(dist.get_rank())))
        except ReplicaMismatch as error:
            seen.append(error.problems[0].where)
        from_rank["model.w"] = 3
        checkpoints.save(3, state(float(dist.get_rank())))
        from_rank["model.w"] = 1
        checkpoints.save(4, state(float(dist.get_rank())))
        for step in (1, 3, 4):
            target = state(-1.0)
            checkpoints.load(target, step)
            seen.append(target["model"]["w"].tolist())
    unsubscribe()
    return [told.found, seen]


def test_declarations_that_change_between_two_saves(ranks, tmp_path):
    for told, seen in ranks.run(change_declarations_in_place, 4, str(tmp_path)):
        assert told == [False, False, False]  # of the refused save none was agreed
        assert seen == ["model.w", [1.0] * 4, [3.0] * 4, [1.0] * 4]


class NoMemory:
    """Lets a rank allocate nothing more from step 2 to step 3 of a save."""

    def __init__(self, save: int) -> None:
        self._save = save
        self._limits = resource.getrlimit(resource.RLIMIT_AS)

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepReached) and (event.step, event.number) == (self._save, 2):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + 2**24
            resource.setrlimit(resource.RLIMIT_AS, (most, self._limits[1]))
        elif isinstance(event, StepReached):
            resource.setrlimit(resource.RLIMIT_AS, self._limits)


def fail_in_between(root: str) -> list[Any]:
    """Saves of new structures that fail on one rank in step 1, in step 2 and in step 3."""
    told, outcomes, rank = Told(), [], dist.get_rank()
    settings = Settings(declarations=PER_RANK, deadline_s=40.0)
    stops = [subscribe(told)]
    if rank == 1:
        stops.append(subscribe(NoMemory(5)))
    with CheckpointManager(root, settings) as checkpoints:
        checkpoints.save(1, base(1.0)).result()
        checkpoints.save(2, base(2.0)).result()
        for step in (3, 5, 7):
            bad = base(float(step), extra=("x",))
            if step == 3 and rank == 1:
                bad["text"] = object()
            if step == 5:
                bad["model"][f"large{rank}"] = torch.zeros(2**24)
            try:
                with small_files(100, is_on=step == 7 and rank == 2):
                    checkpoints.save(step, bad).result()
            except RankErrors as error:
                outcomes.append((error.step, list(error.errors)))
            checkpoints.save(step + 1, base(step + 1.0)).result()
        for step in (1, 2, 4, 6, 8):
            target = base(-1.0)
            checkpoints.load(target, step)
            assert flat(target) == flat(base(float(step)))
        assert checkpoints.steps() == [1, 2, 4, 6, 8]
    for stop in stops:
        stop()
    return [told.found, outcomes]


def test_saves_that_fail_in_between_leave_no_stale_plan(ranks, tmp_path):
    for told, outcomes in ranks.run(fail_in_between, 4, str(tmp_path)):
        assert outcomes == [(3, [1]), (5, [1]), (7, [2])]
        # Saves 1, 2, 4, 5, 6, 7, 8: the third failed before anything was agreed.
        assert told == [False, True, True, False, False, False, False]


def describe_as_two_ranks() -> list[list[Any]]:
    """One process, which a new process group gives another rank on an equal mesh."""
    memory, found = OutlineMemory(), []
    for rank in (1, 2):
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        mesh = DeviceMesh("cpu", [0, 1, 2, 3], mesh_dim_names=("dp",))
        tensor = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False)
        described = describe_state({"w": tensor}, Declarations(), memory)
        found.append([piece.box.offsets for piece in described.tensors[0].pieces])
    return found


def test_another_rank_on_an_equal_mesh(ranks):
    assert ranks.run(describe_as_two_ranks, 1) == [[[(2, 0)], [(4, 0)]]]


def save_generators(root: str) -> list[bool]:
    told = Told()
    unsubscribe = subscribe(told)
    with CheckpointManager(root, blocking(Declarations())) as checkpoints:
        for step in range(4):
            random.seed(100 * step + dist.get_rank())
            checkpoints.save(step, {"model": {"w": torch.ones(3)}, "rng": RngState()})
        expected = random.getstate()
        random.seed(0)
        checkpoints.load({"model": {"w": torch.ones(3)}, "rng": RngState()})
        assert random.getstate() == expected
    unsubscribe()
    return told.found


def test_generators_whose_digits_vary_keep_the_plan(ranks, tmp_path):
    for told in ranks.run(save_generators, 2, str(tmp_path)):
        assert told == [False, True, True, True]
