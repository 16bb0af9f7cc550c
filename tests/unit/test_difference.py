"""In what two checkpoints differ: names, values, elements; and what does not count."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import numpy as np
import pytest
import torch

from dcp_resume import (
    CheckpointManager,
    Declarations,
    MeshPlace,
    Padding,
    RngState,
    SaveMode,
    Settings,
    Split,
    TrainerState,
)
from dcp_resume.cli.main import main
from dcp_resume.errors import ConfigurationError, CorruptData, InvalidDocument
from dcp_resume.format.leaves import encode_leaf
from dcp_resume.session.difference import DiffOptions, compare_checkpoints
from dcp_resume.session.side import open_side
from dcp_resume.session.value_difference import compare_values
from dcp_resume.storage import open_store

NAN, INF = math.nan, math.inf
UNDECLARED = Declarations()
PADDED = Declarations(
    mesh=MeshPlace.numbered({"tp": 1}, 0),
    layouts={"*embed": Split({"tp": 0}, padding=Padding(10))},
)


@pytest.fixture
def compare(tmp_path):
    """Save two states, and compare them."""

    def compare(a, b, declarations=UNDECLARED, **options):
        sides = []
        for name, state in zip("ab", (a, b), strict=True):
            root = tmp_path / name
            settings = Settings(mode=SaveMode.BLOCKING, declarations=declarations)
            with CheckpointManager(str(root), settings) as checkpoints:
                checkpoints.save(1, state() if callable(state) else state)
            sides.append(open_side(open_store(str(root)), 1))
        return compare_checkpoints(*sides, DiffOptions(**options))

    return compare


def names(found):
    return [(problem.where, problem.kind) for problem in found.names]


def test_equal_states_are_equal_and_digests_alone_prove_it(compare):
    def state():
        torch.manual_seed(3)
        return {"model": torch.nn.Linear(40, 50), "x": {"deep": [1, {"k": (2.5, NAN)}], "n": None}}

    found = compare(state(), state())

    assert found.is_equal
    assert list(found.lines()) == []
    assert (found.num_tensors, found.num_values) == (2, 2)
    assert found.num_bytes == found.digest_bytes == 4 * (40 * 50 + 50)
    assert [asdict(part) for part in found.parts] == [
        {"name": "model", "num_tensors": 2, "num_values": 0, "differences": ()},
        {"name": "x", "num_tensors": 0, "num_values": 2, "differences": ()},
    ]


def test_names_shapes_and_dtypes_that_differ_are_all_listed(compare):
    a = {name: torch.ones(2) for name in ("same", "only", "shape", "dtype", "kind")}
    b = {"same": torch.ones(2), "more": torch.ones(2), "shape": torch.ones(2, 1)}
    b |= {"dtype": torch.ones(2).double(), "kind": 1}

    found = compare({"m": a, "v": {"x": 1}}, {"m": b, "v": {"y": 1}})

    assert sorted(names(found)) == [
        ("m.dtype", "dtype"),
        ("m.kind", "extra"),
        ("m.kind", "missing"),
        ("m.more", "extra"),
        ("m.only", "missing"),
        ("m.shape", "shape"),
        ("v.x", "missing"),
        ("v.y", "extra"),
    ]
    assert found.num_tensors == 1
    assert {part.name: len(part.differences) for part in found.parts} == {"m": 6, "v": 2}


@pytest.mark.parametrize(
    ("a", "b", "place", "texts", "count"),
    [
        (1, 2, "", ("1", "2"), 1),
        (1, 1.0, "", ("1", "1.0"), 1),
        (1, True, "", ("1", "true"), 1),
        (0.0, -0.0, "", ("0.0", "-0.0"), 1),
        (NAN, INF, "", ('"nan"', '"inf"'), 1),
        ("a", None, "", ('"a"', "null"), 1),
        ((1, (2, 3)), (1, (2, 4)), "[1][1]", ("3", "4"), 1),
        ([1, 2, 3], [1, 5, 6], "[1]", ("2", "5"), 2),
        ([1], [1, 2], "", ("[1]", "[1, 2]"), 1),
        ((1, {"k": [1, 2]}), (1, {"k": [1, 3]}), "[1].k[1]", ("2", "3"), 1),
        (np.arange(6).reshape(2, 3), np.array([[0, 1, 2], [3, 9, 9]]), "[1, 1]", ("4", "9"), 2),
        (np.float32(1.5), np.float32(2.5), "", ("1.5", "2.5"), 1),
        (np.ones(2), np.ones(3), "", ("<f8 of shape [2]", "<f8 of shape [3]"), 1),
        (("x" * 99,), ("y",), "[0]", ('"' + "x" * 58 + "…", '"y"'), 1),
    ],
)
def test_a_value_that_differs_is_named_to_the_place(compare, a, b, place, texts, count):
    found = compare({"v": {"x": a, "same": 1}}, {"v": {"x": b, "same": 1}})

    (item,) = found.values
    assert (item.fqn, item.place, (item.a, item.b), item.num_different) == (
        "v.x", place, texts, count
    )  # fmt: skip
    assert item.ranks == ()
    assert not found.is_equal


def test_a_tensor_inside_a_value_is_compared_by_its_elements():
    a, b = (encode_leaf({1: torch.tensor([1.5, x]).bfloat16()}, "v.x") for x in (2.0, 3.0))

    found = compare_values("v.x", "v", a, b)

    assert str(found) == "v.x[0][1][1]: 2.0 and 3.0"


@pytest.mark.parametrize("data", ["AAAA", "!", 7])
def test_an_array_that_is_malformed_is_an_error_of_the_checkpoint(data):
    whole = {"$numpy": {"dtype": "<f8", "shape": [1], "data": "AAAAAAAA8D8="}}
    torn = {"$numpy": {"dtype": "<f8", "shape": [1], "data": data}}
    with pytest.raises(InvalidDocument, match="malformed"):
        compare_values("v.x", "v", whole, torn)


@pytest.mark.parametrize(
    ("dtype", "a", "b", "first", "count", "max_abs", "max_rel", "num_not_finite"),
    [
        ("float32", [1, 2, 3, 4], [1, 2.5, 3, 5], 1, 2, 1.0, 0.2, 0),
        ("float64", [0, 1e-9], [0, 2e-9], 1, 1, 1e-9, 0.5, 0),
        ("bfloat16", [1, 2], [1, 2.015625], 1, 1, 0.015625, 0.015625 / 2.015625, 0),
        ("float16", [8, 2], [4, 2], 0, 1, 4.0, 0.5, 0),
        ("float8_e4m3fn", [1, 2], [1, 4], 1, 1, 2.0, 0.5, 0),
        ("float32", [0.0, 1], [-0.0, 1], 0, 1, 0.0, 0.0, 0),
        ("float32", [NAN, 1], [NAN, 1], None, 0, NAN, NAN, 0),
        ("float32", [NAN, 1], [2, 1], 0, 1, NAN, NAN, 1),
        ("float32", [INF, 1], [2, 3], 0, 2, 2.0, 2 / 3, 1),
        ("complex64", [3 + 4j, 0], [0, 0], 0, 1, 5.0, 1.0, 0),
        ("int64", [-(2**63), 2**62], [2**63 - 1, 2**62 + 1], 0, 2, 2.0**64, 2.0, 0),
        ("int64", [2**62], [2**62 + 1], 0, 1, 1.0, 2.0**-62, 0),
        ("uint8", [3, 250], [3, 5], 1, 1, 245.0, 0.98, 0),
        ("uint64", [2**63, 1], [2**63 + 3, 1], 0, 1, 3.0, 3 / 2**63, 0),
        ("bool", [True, False], [True, True], 1, 1, 1.0, 1.0, 0),
    ],
)
def test_elements_that_differ_are_counted_and_measured(
    compare, dtype, a, b, first, count, max_abs, max_rel, num_not_finite
):
    kind = getattr(torch, dtype)
    a, b = (torch.tensor(side, dtype=kind) for side in (a, b))

    found = compare({"m": {"t": a}}, {"m": {"t": b}})

    assert len(found.tensors) == (first is not None)
    for item in found.tensors:
        assert (item.fqn, item.first_index, item.num_different) == ("m.t", (first,), count)
        assert item.num_not_finite == num_not_finite
        assert item.max_abs == pytest.approx(max_abs, rel=1e-12, abs=0, nan_ok=True)
        assert item.max_rel == pytest.approx(max_rel, rel=1e-12, abs=0, nan_ok=True)


def test_packed_halves_of_a_byte_are_counted_and_not_measured(compare):
    a, b = (
        torch.tensor(x, dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for x in ([1, 2], [1, 3])
    )

    (item,) = compare({"m": {"t": a}}, {"m": {"t": b}}).tensors

    assert (item.first_index, item.num_different) == ((1,), 1)
    assert math.isnan(item.max_abs)


def test_scalars_and_empty_tensors_have_their_places(compare):
    a = {"m": {"scalar": torch.tensor(1.0), "empty": torch.ones(0, 3)}}
    b = {"m": {"scalar": torch.tensor(3.0), "empty": torch.ones(0, 3)}}

    (item,) = compare(a, b).tensors

    assert (item.fqn, item.first_index, item.num_elements, item.max_abs) == ("m.scalar", (), 1, 2)


def test_a_tensor_larger_than_the_window_goes_by_in_pieces(compare):
    """Against numpy: 6 MB through windows of 1 MiB, at places of every window and its edges."""
    a = torch.arange(3 * 500 * 1000, dtype=torch.float32).reshape(3, 500, 1000)
    b = a.clone()
    flat = sorted(
        [*random.Random(5).sample(range(a.numel()), 40), 0, 262_143, 262_144, a.numel() - 1]
    )
    b.view(-1)[flat] *= 1.5
    done = []

    found = compare(
        {"m": {"t": a, "u": a}},
        {"m": {"t": b, "u": a.clone()}},
        window_bytes=1 << 20,
        progress=lambda *state: done.append(state),
    )

    different = np.argwhere(a.numpy() != b.numpy())  # 0 * 1.5 is 0
    (item,) = found.tensors
    assert item.num_different == len(different) == len(set(flat)) - 1
    assert item.first_index == tuple(different[0])
    assert item.max_abs == (b - a).abs().max()
    assert item.max_rel == pytest.approx(1 / 3)
    assert done[-1] == (found.num_bytes, found.num_bytes)
    assert found.num_bytes == 2 * 4 * a.numel()
    assert [done for done, _ in done] == sorted(done for done, _ in done)


def test_a_tensor_with_several_names_is_compared_once_under_any_of_them(compare):
    weight = torch.arange(6.0).reshape(2, 3)
    tied = {"model": {"wte": weight, "head": weight}}

    assert compare(tied, {"model": {"wte": weight.clone()}}).is_equal
    assert compare({"model": {"wte": weight}}, tied).num_tensors == 1


def test_a_tie_on_one_side_is_compared_with_both_tensors_of_the_other(compare):
    weight, other = torch.arange(6.0), torch.arange(6.0) + 1
    tied = {"model": {"wte": weight, "head": weight}}

    found = compare(tied, {"model": {"wte": weight.clone(), "head": other}})

    assert [item.fqn for item in found.tensors] == ["model.head"]
    assert found.num_tensors == 2


def test_values_of_a_tied_parameter_are_found_under_its_other_name(compare):
    weight = torch.arange(6.0)
    a = {"model": {"wte": weight, "head": weight}, "optim": {"head": {"lr": 0.5}}}
    b = {"model": {"wte": weight.clone()}, "optim": {"wte": {"lr": 0.25}}}

    found = compare(a, b)

    assert names(found) == []
    assert [item.fqn for item in found.values] == ["optim.head.lr"]


def test_padding_is_left_out(compare):
    def rows(count, fill):
        table = torch.full((count, 3), fill)
        table[:10] = torch.arange(30.0).reshape(10, 3)
        return table

    a, b = {"model": {"embed": rows(12, 0.5)}}, {"model": {"embed": rows(16, 9.0)}}
    found = compare(a, b, PADDED)

    assert found.is_equal
    assert found.num_bytes == 4 * 10 * 3


def test_a_difference_above_the_padding_is_found(compare):
    a, b = torch.zeros(12, 3), torch.ones(16, 3)
    b[:10] = 0
    b[9, 2] = -1.0

    (item,) = compare({"model": {"embed": a}}, {"model": {"embed": b}}, PADDED).tensors

    assert (item.first_index, item.num_different, item.num_elements) == ((9, 2), 1, 30)


def test_what_may_differ_is_named_and_not_looked_at(compare):
    def state(seconds, loss, tag):
        trainer = TrainerState()
        trainer.advance(step=1, loss=loss, duration_s=seconds)
        return {"trainer": trainer, "m": {"noise": torch.tensor(seconds), "tag": tag}}

    a, b = state(1.0, 2.5, "x"), state(9.0, 2.5, "y")
    found = compare(a, b, ignored=("m.*",))

    assert found.is_equal
    assert set(found.passed_over) == {
        "m.noise",
        "m.tag",
        "trainer.wall_time_s",
        "trainer.lineage",
    }


def test_causes_come_before_what_follows_from_them(compare):
    def state(number):
        trainer = TrainerState()
        trainer.advance(step=1, loss=float(number))
        torch.manual_seed(number)
        optim = {"state": torch.tensor(float(number)), "lr": 0.5 * number}
        return {"trainer": trainer, "optim": optim, "rng": RngState(), "zz": {"place": number}}

    found = compare(lambda: state(1), lambda: state(2), ignored=("rng.python*", "rng.numpy*"))

    parts = list(dict.fromkeys(item.part for item in found.values))
    assert parts == ["zz", "rng", "optim", "trainer"]
    (generator,) = (item for item in found.values if item.part == "rng")
    assert generator.fqn == "rng.torch"
    assert generator.ranks == (0,)
    assert str(generator).startswith("rng.torch[0] on rank(s) 0: 1 and 2; ")
    facts = [problem.where for problem in found.facts]
    assert facts == ["manifest.trainer.best_loss", "manifest.trainer.metrics.loss"]


def test_a_damaged_block_is_an_error_and_no_difference(compare, tmp_path):
    tensor = torch.arange(1000.0)
    compare({"m": {"t": tensor}}, {"m": {"t": tensor + 1}})
    (path,) = tmp_path.glob("b/step-*/*/shard*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    sides = [open_side(open_store(str(tmp_path / name)), 1) for name in "ab"]
    with pytest.raises(CorruptData, match=r"step 1 of .*/b is damaged and cannot be compared"):
        compare_checkpoints(*sides)


def test_too_small_a_window_is_refused():
    with pytest.raises(ConfigurationError, match="window"):
        DiffOptions(window_bytes=1000)


def test_the_verb_says_it_for_people_programs_and_shells(compare, tmp_path, capsys):
    compare({"m": {"t": torch.ones(2)}, "v": {"x": 1}}, {"m": {"t": torch.zeros(2)}, "v": {"x": 2}})
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    assert main(["diff", a, a]) == 0
    assert capsys.readouterr().out == "equal: 1 tensors (8 B) and 1 values\n"
    assert main(["diff", a, b]) == 5
    out = capsys.readouterr().out
    assert (
        "NOT EQUAL: 2 difference(s) in 1 tensors (8 B) and 1 values; the first:\n  v.x: 1 and 2"
        in out
    )
    assert "m.t: 2 of 2 elements differ, the first at [0]; by at most 1 (relative 1)" in out
    assert main(["diff", a, b, "--ignore", "m*", "--ignore", "v*"]) == 0
    assert "may differ, not looked at: m.t, v.x" in capsys.readouterr().out
    assert main(["diff", a, b, "--json"]) == 5
    document = json.loads(capsys.readouterr().out)
    assert document["is_equal"] is False
    assert document["tensors"][0]["first_index"] == [0]
    assert document["values"][0]["fqn"] == "v.x"
    assert main(["diff", a, b, "--step", "1", "--other-step", "7"]) == 3
    assert main(["diff", a, b, "--window-mib", "0"]) == 2
