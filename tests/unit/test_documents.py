"""The documents of saves of one structure: as those made afresh, and refused where they must be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dcp_resume.errors import IncompletePlan, InvalidDocument
from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.format.digests import DigestAlgorithm
from dcp_resume.format.index_structure import IndexStructure
from dcp_resume.manifest.models import TrainerFacts
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.local_plans import local_plan
from dcp_resume.planning.merge import MergeMemory, merge
from dcp_resume.planning.state import describe_state
from dcp_resume.session.documents import AttemptIdentity, Facts, build_documents, planned_tables
from dcp_resume.session.writing import RankReport

HEADER = 128
BLOCK_SIZE = 2**16
WORLD_SIZE = 3
IDENTITY = AttemptIdentity("00000000-0000-4000-8000-000000000000", 1, "a" * 12, 1, None, None)


def plans(*names, rows=2, value=1):
    """A plan of each rank: its own rows of each tensor, and what all have alike."""
    state = {name: torch.ones(rows, 4) for name in names} | {"n": value}
    declared = Declarations(per_rank=frozenset(names))
    return [
        local_plan(describe_state(state, declared), rank, WORLD_SIZE, declared)
        for rank in range(WORLD_SIZE)
    ]


def reports(plan, seed):
    """A report of each rank, with digests of its own."""
    held = [
        [int(plan.layout.chunks.num_bytes([4] * len(plan.tensors))[plan.layout.file == f].sum())]
        for f in range(len(plan.layout.names))
    ]
    random = np.random.default_rng(seed)
    return [
        RankReport(
            np.array(own) + HEADER,
            np.full(1, HEADER),
            np.full(1, 2),
            random.integers(0, 256, (2, 16), np.uint8),
        )
        for own in held
    ]


def documents(plan, told):
    tables = planned_tables(plan, told, DigestAlgorithm.XXH3)
    facts = Facts(TrainerFacts(step=1))
    return build_documents(plan, tables, told, IDENTITY, facts, BLOCK_SIZE)


def test_a_further_save_of_one_structure_has_the_documents_of_a_first():
    memory = MergeMemory()
    first = memory.merge(plans("a", "b"))
    documents(first, reports(first, seed=1))

    again = memory.renew([plan.contents for plan in plans("a", "b", value=2)])
    found = documents(again, reports(again, seed=2))

    fresh = merge(plans("a", "b", value=2))
    expected = documents(fresh, reports(fresh, seed=2))
    assert found.index_bytes == expected.index_bytes
    assert found.catalog_bytes == expected.catalog_bytes
    assert again.layout.structure is first.layout.structure is not fresh.layout.structure
    read = ChunkIndex.from_bytes(found.index_bytes, "index")
    assert read.block_digest.tolist() == found.index.block_digest.tolist()


def test_a_structure_is_proved_once_and_a_changed_one_again():
    memory = MergeMemory()
    first = memory.merge(plans("a", "b"))
    documents(first, reports(first, seed=1))
    assert vars(first.layout.structure)["tiling_problems"] == ()

    changed = memory.merge(plans("a", "b", rows=3))
    assert changed.layout is not first.layout
    assert "tiling_problems" not in vars(changed.layout.structure)
    documents(changed, reports(changed, seed=1))
    assert vars(changed.layout.structure)["tiling_problems"] == ()


WRONG = {
    "size": lambda r: replace(r, sizes=r.sizes + 4),
    "header": lambda r: replace(r, header_sizes=r.header_sizes + 4),
    "fewer digests": lambda r: replace(r, num_blocks=r.num_blocks - 1, digests=r.digests[1:]),
    "blocks of another file": lambda r: replace(r, num_blocks=r.num_blocks - 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_report_of_a_known_structure_is_refused(what):
    memory = MergeMemory()
    first = memory.merge(plans("a"))
    documents(first, reports(first, seed=1))

    again = memory.renew([plan.contents for plan in plans("a")])
    told = reports(again, seed=2)
    with pytest.raises(IncompletePlan):
        documents(again, [told[0], WRONG[what](told[1]), told[2]])
    documents(again, told)


def test_a_plan_whose_chunks_overlap_is_refused_at_every_save():
    plan = merge(plans("a"))
    known = plan.layout.structure
    box = known.index.chunk_box.copy()
    box[1] = box[0]
    twice = IndexStructure(replace(known.index, chunk_box=box), known.tensors, known.keys)
    for _ in range(2):
        assert {problem.kind for problem in twice.tiling_problems} == {"overlap"}


FORGED = {
    "rank 1 names a box that": lambda s: replace(s, box=s.box + 7),
    "rank 1 names a tensor that": lambda s: replace(s, tensor=s.tensor - 1),
    "rank 1 names a tensor that it": lambda s: replace(s, tensor=s.tensor + 99),
    "rank 1 names a chunk that": lambda s: replace(s, compared=np.asarray([-1], np.int32)),
    "rank 1 says that it is rank 0": lambda s: replace(s, rank=0),
}


@pytest.mark.parametrize("message", FORGED)
def test_a_plan_that_names_what_it_does_not_list_or_another_rank_is_refused(message):
    offered = plans("a")
    shape = FORGED[message](offered[1].shape)
    with pytest.raises(InvalidDocument, match=message):
        merge([offered[0], replace(offered[1], shape=shape), offered[2]])
