"""Digests of whole tensors on one rank: what has one, and what finds that it is another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_resume import (
    Apply,
    CheckpointManager,
    Declarations,
    LoadOptions,
    MeshPlace,
    Padding,
    Prove,
    SaveMode,
    Settings,
    Severity,
    Split,
    TensorDigests,
    digest_tensors,
)
from dcp_resume.cli.main import main
from dcp_resume.errors import (
    CorruptData,
    InvalidCheckpoint,
    LoadRefused,
    TensorMismatch,
)
from dcp_resume.format.dtypes import DTYPES
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.held import HeldPiece
from dcp_resume.session.box_digests import digest_view
from dcp_resume.session.held_tensors import HeldMemory, HeldTotals, digest_held
from dcp_resume.session.votes import LonelyVotes
from tests.support.damage import DamagedRun
from tests.support.forgery import FORGED_STEP, flip_element, opened_at

PROVED = LoadOptions(prove=Prove.TENSORS)


def brute(tensor: torch.Tensor) -> str:
    shape = tuple(tensor.shape)
    return PositionDigest.of(as_bytes(tensor), tensor.element_size(), Box.whole(shape), shape).hex


def manager(root: Path, **options: Any) -> CheckpointManager:
    options = {"mode": SaveMode.BLOCKING, "tensor_digests": TensorDigests.RECORD, **options}
    return CheckpointManager(root, Settings(**options))


def save(root: Path, state: dict[str, Any], **options: Any) -> None:
    with manager(root, **options) as checkpoints:
        checkpoints.save(FORGED_STEP, state)


def load(root: Path, state: dict[str, Any], options: LoadOptions = PROVED, **settings: Any) -> Any:
    with manager(root, **settings) as checkpoints:
        return checkpoints.load(state, options=options)


def recorded(root: Path) -> dict[str, str | None]:
    tensors = opened_at(root).catalog.tensors
    return {e.fqn: e.tensor_digest.value if e.tensor_digest else None for e in tensors}


def zeros(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: zeros(value) if isinstance(value, dict) else torch.zeros_like(value)
        for key, value in state.items()
    }


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, info in DTYPES.items():
        raw = torch.randint(0, 256, (3, 5, info.itemsize), dtype=torch.uint8, generator=generator)
        raw = raw % 2 if name == "bool" else raw
        found[name] = raw.reshape(-1).view(info.torch_dtype).view(3, 5)
    return found


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("mode", SaveMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("apply", Apply, ids=lambda apply: apply.value)
def test_every_dtype_shape_and_stride_is_recorded_proved_and_told(tmp_path, mode, apply):
    whole = torch.arange(60.0).reshape(3, 4, 5)
    state = {
        "dtypes": every_dtype(),
        "shapes": {
            "scalar": torch.tensor(-0.0),
            "empty": torch.zeros(0, 4),
            "nan": torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32),
            "transposed": whole.transpose(0, 2),
            "strided": whole[:, ::2],
            "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        },
    }
    save(tmp_path, state, mode=mode)

    expected = {f"{k}.{n}": brute(t) for k, part in state.items() for n, t in part.items()}
    assert recorded(tmp_path) == expected
    assert digest_tensors(state) == expected

    target = zeros(state)
    target["shapes"]["transposed"] = torch.zeros_like(whole).transpose(0, 2)
    load(tmp_path, target, LoadOptions(prove=Prove.TENSORS, apply=apply))
    assert digest_tensors(target) == expected


def test_without_asking_nothing_is_recorded(tmp_path):
    save(tmp_path, {"a": {"w": torch.ones(3)}}, tensor_digests=TensorDigests.OMIT)
    assert recorded(tmp_path) == {"a.w": None}


def test_names_of_one_tensor_have_one_digest(tmp_path):
    shared = torch.arange(6.0)
    state = {"a": {"x": shared, "y": shared, "z": shared.clone()}}
    save(tmp_path, state)

    assert recorded(tmp_path) == {"a.x": brute(shared), "a.y": None, "a.z": brute(shared)}
    assert digest_tensors(state) == dict.fromkeys(("a.x", "a.y", "a.z"), brute(shared))
    untied = {"a": {"x": torch.zeros(6), "y": torch.zeros(6), "z": torch.zeros(6)}}
    load(tmp_path, untied, LoadOptions(prove=Prove.TENSORS))
    assert torch.equal(untied["a"]["y"], shared)


@pytest.mark.parametrize("dim", [0, 1])
def test_padding_is_no_part_of_a_tensor(tmp_path, dim):
    """Stored with 12 rows, or columns, of which 10 count; loaded with 16, and with 10."""

    def table(size: int, fill: float) -> torch.Tensor:
        found = torch.full((size, 3), fill)
        found[:10] = torch.arange(30.0).reshape(10, 3)
        return found if dim == 0 else found.T.contiguous()

    declared = Declarations(
        mesh=MeshPlace.numbered({"tp": 1}, 0),
        layouts={"*embed": Split({"tp": dim}, padding=Padding(10, dim=dim))},
    )
    logical = brute(table(10, 0.0))
    save(tmp_path, {"m": {"embed": table(12, 0.5)}}, declarations=declared)
    assert recorded(tmp_path) == {"m.embed": logical}

    for size in (16, 12, 11):
        target = {"m": {"embed": torch.full_like(table(size, 0.0), -1.0)}}
        load(tmp_path, target, declarations=declared)
        assert digest_tensors(target, declarations=declared) == {"m.embed": logical}
    plain = {"m": {"embed": torch.full_like(table(10, 0.0), -1.0)}}
    load(tmp_path, plain)
    assert digest_tensors(plain) == {"m.embed": logical}


def test_a_rewritten_element_is_named_by_the_load_and_by_verify(tmp_path, capsys):
    state = {"a": {"w": torch.arange(40.0).reshape(8, 5), "b": torch.ones(3)}}
    save(tmp_path, state)
    right = recorded(tmp_path)["a.w"]
    assert main(["verify", str(tmp_path), "--tensors"]) == 0
    assert "2 tensor digests" in capsys.readouterr().out

    flip_element(tmp_path, "a.w")

    assert main(["verify", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path), "--tensors", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["checkpoints"]
    target = zeros(state)
    with pytest.raises(TensorMismatch) as caught:
        load(tmp_path, target)
    wrong = brute(target["a"]["w"])
    assert wrong != right
    assert found["num_tensors"] == 2
    (problem,) = found["problems"]
    assert (problem["where"], problem["kind"]) == ("a.w", "tensor_digest")
    assert right in problem["message"]
    assert wrong in problem["message"]
    error = caught.value
    assert (error.step, error.expected, error.found) == (
        FORGED_STEP,
        {"a.w": right},
        {"a.w": wrong},
    )
    assert [(p.where, p.kind) for p in error.problems] == [("a.w", "tensor_digest")]

    load(tmp_path, target, LoadOptions())  # the blocks are those that the documents name
    with pytest.raises(TensorMismatch), manager(tmp_path, load=PROVED) as checkpoints:
        checkpoints.resume(target)


def test_a_reshard_proves_what_it_writes_and_commits_nothing_that_differs(tmp_path, capsys):
    source = tmp_path / "a"
    save(source, {"a": {"w": torch.arange(40.0).reshape(8, 5)}})
    words = ["reshard", str(source), "--to", "tp=3"]
    assert main([*words[:2], str(tmp_path / "b"), *words[2:]]) == 0
    assert recorded(tmp_path / "b") == recorded(source)

    flip_element(source, "a.w")

    capsys.readouterr()
    assert main([*words[:2], str(tmp_path / "c"), *words[2:]]) == 1
    assert "a.w: expected the tensor digest" in capsys.readouterr().err
    assert not list((tmp_path / "c").glob("step-*/*/manifest.json"))


def test_what_was_not_recorded_cannot_be_proved(tmp_path, capsys):
    state = {"a": {"w": torch.ones(3), "n": 7}}
    save(tmp_path, state, tensor_digests=TensorDigests.OMIT)

    with pytest.raises(LoadRefused) as caught:
        load(tmp_path, state)
    assert [(p.where, p.kind) for p in caught.value.problems] == [("a.w", "tensor_digest")]
    accepted = LoadOptions(prove=Prove.TENSORS, overrides={"tensor_digest": Severity.WARN})
    load(tmp_path, state, accepted)

    assert main(["verify", str(tmp_path), "--tensors"]) == 1
    out = capsys.readouterr().out
    assert "NOT PROVED, 1 problem(s)" in out
    assert "save with TensorDigests.RECORD" in out


def test_damaged_blocks_are_told_before_digests_of_tensors(tmp_path, capsys):
    save(tmp_path, {"a": {"w": torch.ones(3)}})
    (path,) = tmp_path.glob("step-*/*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert main(["verify", str(tmp_path), "--tensors", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [problem["kind"] for problem in found["problems"]] == ["digest"]
    with pytest.raises(CorruptData):
        load(tmp_path, {"a": {"w": torch.zeros(3)}})


def test_a_digest_of_a_malformed_value_is_refused_and_of_another_algorithm_passed_over(tmp_path):
    run = DamagedRun(tmp_path)

    def put(algorithm: str, value: str) -> None:
        digest = {"algorithm": algorithm, "value": value}
        run.edit_catalog(lambda catalog: catalog["tensors"][0].update(tensor_digest=digest))

    put("position-sums-128", "ab")
    with pytest.raises(InvalidCheckpoint) as caught:
        opened_at(tmp_path)
    assert [p.kind for p in caught.value.problems] == ["digest_form"]
    put("of-a-newer-version", "whatever it is")
    state = {"p00": {"w": torch.zeros(6, 10)}}
    result = load(tmp_path, state, LoadOptions(parts=("p00",)))
    assert result.step == FORGED_STEP
    with pytest.raises(LoadRefused):
        load(tmp_path, state, LoadOptions(parts=("p00",), prove=Prove.TENSORS))


# What ranks hold together.


def memory(offset: int, values: torch.Tensor, length: int = 8) -> HeldMemory:
    piece = HeldPiece(Box((offset,), tuple(values.shape)), values)
    return HeldMemory("w", ("w",), (length,), 4, (piece,))


def totals_of(*held: HeldMemory) -> HeldTotals:
    found: list[HeldTotals] = []

    def decide(totals: HeldTotals) -> bytes:
        found.append(totals)
        return b""

    digest_held(LonelyVotes(), held, decide)
    return found[0]


def test_elements_that_several_boxes_hold_count_once():
    """Ranges of two flat buffers that were cut at other places."""
    whole = torch.arange(8.0)
    parts = [memory(0, whole[:5]), memory(5, whole[5:]), memory(0, whole[:3]), memory(3, whole[3:])]
    assert totals_of(*parts).digests["w"].hex == brute(whole)
    assert totals_of(memory(0, whole), memory(0, whole.clone())).digests["w"].hex == brute(whole)


def test_copies_that_differ_and_elements_that_nobody_holds_are_told():
    whole = torch.arange(8.0)
    other = whole.clone()
    other[4] = -1.0
    totals = totals_of(memory(0, whole), memory(3, other[3:]))
    assert totals.digests == {}
    assert [(p.where, p.kind) for p in totals.problems] == [("w", "replica")]
    (hole,) = totals_of(memory(0, whole[:5]), memory(4, whole[4:7])).problems
    assert (hole.kind, hole.message) == ("hole", "it has 8 elements, the ranks hold 7")


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (5, 8, 9)])
def test_memory_is_digested_in_pieces_wherever_it_lies(monkeypatch, shape):
    """Not contiguous, and larger than what is digested at a time."""
    monkeypatch.setattr("dcp_resume.session.box_digests.PIECE_BYTES", 64)
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    strided = whole.transpose(0, -1).contiguous().transpose(0, -1)
    box = Box((1, *(0 for _ in shape[1:])), (3, *shape[1:]))
    for tensor in (whole, strided):
        rest = [
            digest_view(tensor[:1], 4, Box((0,) * len(shape), (1, *shape[1:])), shape),
            digest_view(
                tensor[4:], 4, Box((4, *box.offsets[1:]), (shape[0] - 4, *shape[1:])), shape
            ),
        ]
        total = sum(rest, digest_view(tensor[1:4], 4, box, shape))
        assert total.hex == brute(whole)
