"""What a load makes of declared layouts: padding filled or dropped, segments that contradict."""

from __future__ import annotations

import pytest
import torch

from dcp_resume import (
    Apply,
    CheckpointManager,
    Declarations,
    LoadOptions,
    MeshPlace,
    Padding,
    SaveMode,
    Segment,
    Settings,
    Severity,
    Split,
)
from dcp_resume.errors import ConfigurationError, LoadRefused
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.manifest.models import Padding as StoredPadding
from dcp_resume.manifest.models import Segment as StoredSegment
from dcp_resume.session.compare_layouts import compare_segments, compare_shapes

ALONE = MeshPlace.numbered({"tp": 1}, 0)
LOGICAL = 10


def padded(logical=LOGICAL):
    return Split({"tp": 0}, padding=Padding(logical))


def manager(root, layouts, **options):
    declared = Declarations(mesh=ALONE, layouts=layouts)
    load = LoadOptions(**options)
    return CheckpointManager(
        root, Settings(mode=SaveMode.BLOCKING, declarations=declared, load=load)
    )


def rows(count, fill=0.0):
    """Numbered rows, and above the logical ones what a trained padding may hold."""
    table = torch.full((count, 3), fill)
    table[:LOGICAL] = torch.arange(1.0, LOGICAL + 1)[:, None]
    return table


def save(root, count, layouts):
    state = {"model": {"embed": rows(count, 0.5)}, "optim": {"embed": {"m": rows(count, 0.25)}}}
    with manager(root, layouts) as checkpoints:
        checkpoints.save(1, state)


def load(root, count, layouts, **options):
    embed, moment = torch.full((count, 3), -1.0), torch.full((count, 3), -1.0)
    with manager(root, layouts, **options) as checkpoints:
        report = checkpoints.load({"model": {"embed": embed}, "optim": {"embed": {"m": moment}}})
    return embed, moment, report.report.items


@pytest.mark.parametrize("apply", list(Apply))
@pytest.mark.parametrize("count", [12, 16, 11, 10])
def test_padding_is_taken_as_far_as_it_is_stored_and_zero_beyond(tmp_path, count, apply):
    save(tmp_path, 12, {"*embed*": padded()})

    embed, moment, items = load(tmp_path, count, {"*embed*": padded()}, apply=apply)

    for found, fill in ((embed, 0.5), (moment, 0.25)):
        expected = rows(count, fill)
        expected[12:] = 0.0
        assert torch.equal(found, expected)
    kinds = [(item.severity, item.kind, item.where) for item in items]
    both = [(Severity.WARN, "padding", where) for where in ("model.embed", "optim.embed.m")]
    assert kinds == ([] if count == 12 else both)


def test_padding_is_needed_on_one_side_alone(tmp_path):
    save(tmp_path / "padded", 12, {"*embed*": padded()})
    embed, _, items = load(tmp_path / "padded", LOGICAL, {})
    assert torch.equal(embed, rows(LOGICAL))
    assert "padding beyond it is dropped" in items[0].message
    assert torch.equal(load(tmp_path / "padded", 12, {})[0], rows(12, 0.5))

    save(tmp_path / "plain", LOGICAL, {})
    embed, moment, items = load(tmp_path / "plain", 16, {"*embed*": padded()})
    assert torch.equal(embed, rows(16))
    assert torch.equal(moment, rows(16))
    assert "the padding beyond it is set to zero" in items[0].message


@pytest.mark.parametrize(
    ("count", "layouts"),
    [(16, {}), (9, {}), (12, {"*embed*": padded(11)}), (16, {"*embed*": padded(11)})],
)
def test_other_differences_of_shape_stay_refused(tmp_path, count, layouts):
    save(tmp_path, 12, {"*embed*": padded()})
    with pytest.raises(LoadRefused) as caught:
        load(tmp_path, count, layouts, overrides={"*": Severity.OK})
    kinds = {(p.where, p.kind) for p in caught.value.problems}
    assert kinds == {("model.embed", "shape"), ("optim.embed.m", "shape")}


def test_a_mesh_of_another_rank_is_refused_at_load(tmp_path):
    save(tmp_path, 12, {"*embed*": padded()})
    other = MeshPlace.numbered({"tp": 2}, 1)
    declared = Declarations(mesh=other, layouts={"*": padded()})
    with (
        CheckpointManager(tmp_path, Settings(declarations=declared)) as checkpoints,
        pytest.raises(ConfigurationError, match="seen from rank 1; this is rank 0 of 1"),
    ):
        checkpoints.load({"model": {"embed": torch.zeros(6, 3)}})


# Segments.

MESHES = {
    "one": MeshEntry(id="one", axes=("tp",), shape=(1,)),
    "two": MeshEntry(id="two", axes=("tp",), shape=(2,)),
}
QKV = (StoredSegment(name="q", size=4), StoredSegment(name="kv", size=2))


def entry(mesh=None, segments=None, placements=None, rule=None, padding=None, rows=6):
    return TensorEntry(
        fqn="m.w",
        path=("m", "w"),
        part="m",
        dtype="float32",
        global_shape=(rows, 2),
        kind="sharded",
        mesh=mesh,
        placements=placements,
        rule={"tp": 0} if rule is None else rule,
        segments=segments,
        padding=padding,
    )


PACKED = entry("two", QKV)


@pytest.mark.parametrize(
    ("other", "kinds"),
    [
        (PACKED, []),
        (entry("one", QKV), []),
        (entry("two", (QKV[0], StoredSegment(name="kv", size=2, units=2))), []),
        (
            entry("two", (StoredSegment(name="q", size=2), StoredSegment(name="kv", size=4))),
            ["segments"],
        ),
        (entry("two", (QKV[1], QKV[0])), ["segments"]),
        (entry("two"), ["segments"]),
        (entry("one"), []),
        (entry("two", rule={"tp": 1}), []),
        (entry("two", placements=("S(0)",)), []),
        (entry(rule={}), []),
    ],
)
def test_segments_that_contradict_are_refused(other, kinds):
    for stored, wanted in ((PACKED, other), (other, PACKED)):
        items = list(compare_segments("m.w", stored, wanted, MESHES, MESHES))
        assert [item.kind for item in items] == kinds
        assert all(item.severity is Severity.REFUSE for item in items)


def test_padding_that_contradicts_is_refused_though_shapes_are_equal():
    stored, wanted = (entry(padding=StoredPadding(dim=0, logical_size=n)) for n in (4, 5))
    (item,) = compare_shapes("m.w", stored, wanted)
    assert (item.severity, item.kind) == (Severity.REFUSE, "shape")
    assert list(compare_shapes("m.w", stored, entry())) == []
    other = entry(padding=StoredPadding(dim=0, logical_size=4), rows=8)
    (item,) = compare_shapes("m.w", stored, other)
    assert (item.severity, item.kind) == (Severity.WARN, "padding")


def test_segments_along_another_dim_than_the_first(tmp_path):
    experts = Split({"ep": 0, "tp": 1}, (Segment("gate", 4), Segment("up", 4)))
    place = MeshPlace.numbered({"ep": 1, "tp": 1}, 0)
    declared = Declarations(mesh=place, layouts={"*": experts})
    with CheckpointManager(
        tmp_path, Settings(mode=SaveMode.BLOCKING, declarations=declared)
    ) as checkpoints:
        checkpoints.save(1, {"m": {"w": torch.arange(16.0).reshape(2, 8)}})
    (path,) = tmp_path.glob("step-*/*/catalog.json")
    assert '"dim":1' in path.read_text()
