import math
import pickle

import pytest

from dcp_resume.errors import InvalidDocument, RunMismatch
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.models import DocumentRef, TrainerFacts
from dcp_resume.manifest.records import (
    CommitRecord,
    OpenRecord,
    PinRecord,
    QuarantineRecord,
    RetireRecord,
    UnpinRecord,
)

CREATED = "2026-01-01T00:00:00Z"


def opened(generation, source=None, run="r"):
    return OpenRecord(
        run=run,
        created=CREATED,
        generation=generation,
        resume_source=source,
        incarnation=f"i{generation}",
    )


def commit(generation, step, *, references=(), attempt=None, **metrics):
    return CommitRecord(
        run="r",
        created=CREATED,
        generation=generation,
        step=step,
        attempt=attempt or f"g{generation}s{step}",
        manifest=DocumentRef(key="m", size=1, digest="d"),
        parent=None,
        references=references,
        num_bytes=1,
        trainer=TrainerFacts(step=step, metrics=metrics),
    )


def mark(kind, target):
    return kind(run="r", created=CREATED, target=target)


def history(*records):
    return RunHistory().extend(enumerate(records, 1))


def line(*records):
    return [entry.seq for entry in history(*records).lineage()]


def test_an_empty_log():
    empty = RunHistory()
    assert empty.newest() is None
    assert empty.protected() == frozenset()
    assert (empty.run, empty.generation, empty.last_seq) == (None, 0, 0)
    assert history(opened(1)).newest() is None


def test_newest_is_the_last_commit_of_the_live_generation():
    assert line(opened(1), commit(1, 40), commit(1, 60)) == [3, 2]
    assert line(opened(1), commit(1, 40), opened(2, 2), commit(2, 50)) == [4, 2]


def test_a_generation_without_a_commit_stands_for_its_resume_source():
    assert line(opened(1), commit(1, 40), commit(1, 60), opened(2, 3)) == [3, 2]
    assert line(opened(1), commit(1, 40), opened(2, 2), opened(3, 2)) == [2]


def test_a_rollback_hides_younger_commits_of_the_older_generation():
    records = [opened(1), commit(1, 50), commit(1, 100), commit(1, 150), opened(2, 2)]
    assert line(*records) == [2]
    assert line(*records, opened(3, 2)) == [2]
    assert line(*records, commit(2, 60)) == [6, 2]


def test_a_rollback_over_a_whole_generation_skips_it():
    records = [opened(1), commit(1, 50), opened(2, 2), commit(2, 60), opened(3, 2), commit(3, 55)]
    assert line(*records) == [6, 2]


def test_beginning_anew_hides_everything():
    assert line(opened(1), commit(1, 50), opened(2, None)) == []
    assert line(opened(1), commit(1, 50), opened(2, None), commit(2, 10)) == [4]


@pytest.mark.parametrize("kind", [RetireRecord, QuarantineRecord])
def test_unusable_commits_are_passed_over(kind):
    records = [opened(1), commit(1, 40), commit(1, 60), opened(2, 3), commit(2, 80)]
    assert line(*records, mark(kind, 5)) == [3, 2]
    assert line(*records, mark(kind, 5), mark(kind, 3)) == [2]
    assert line(*records, mark(kind, 2), mark(kind, 3), mark(kind, 5)) == []


def test_a_commit_of_a_fenced_generation_does_not_count_and_is_reported():
    found = history(opened(1), commit(1, 40), opened(2, 2), commit(1, 60), mark(PinRecord, 4))
    assert [entry.seq for entry in found.lineage()] == [2]
    assert found.find_attempt("g1s60") is None
    assert "generation 1 while 2" in found.ignored[4]
    assert "no commit before it" in found.ignored[5]


def test_a_commit_before_its_own_open_does_not_count():
    assert history(opened(1), commit(2, 40)).ignored.keys() == {2}


def test_a_second_commit_of_a_step_in_one_generation_does_not_count():
    found = history(opened(1), commit(1, 40), commit(1, 40, attempt="again"))
    assert list(found.commits) == [2]
    assert "second commit of step 40" in found.ignored[3]


def test_each_generation_may_commit_a_step_and_the_live_one_wins():
    found = history(opened(1), commit(1, 40), commit(1, 60), opened(2, 2), commit(2, 60))
    assert found.find_step(60).seq == 5
    assert found.find_step(40).seq == 2


def test_find_step_looks_at_other_lines_only_when_asked():
    found = history(opened(1), commit(1, 40), commit(1, 60), opened(2, 2))
    assert found.find_step(60) is None
    assert found.find_step(60, is_any_line=True).seq == 3
    assert found.find_step(61, is_any_line=True) is None


def test_best_reads_the_metric_of_usable_commits_of_the_line():
    found = history(
        opened(1),
        commit(1, 10, loss=0.5, acc=0.1),
        commit(1, 20, loss=0.5),
        commit(1, 30, loss=math.nan, acc=0.3),
        commit(1, 40),
        commit(1, 50, loss=0.1),
        mark(QuarantineRecord, 6),
    )
    assert found.best().seq == 3  # of equals the youngest
    assert found.best("acc", "max").seq == 4
    assert found.best("absent") is None
    assert history(opened(1), commit(1, 1, loss=math.inf)).best().seq == 2


def test_protected_are_newest_live_source_and_pins():
    records = [opened(1), commit(1, 10), commit(1, 20), commit(1, 30), opened(2, 3)]
    assert history(*records).protected() == {3}
    records += [commit(2, 40), mark(PinRecord, 2)]
    assert history(*records).protected() == {2, 3, 6}
    assert history(*records, mark(UnpinRecord, 2)).protected() == {3, 6}
    assert history(*records, mark(RetireRecord, 2)).protected() == {3, 6}


def test_live_commits_and_what_they_refer_to():
    records = [opened(1), commit(1, 10), commit(1, 20, references=(2,)), mark(RetireRecord, 2)]
    assert list(history(*records).live_commits()) == [3]
    assert history(*records).referenced() == {2}
    assert history(*records, mark(RetireRecord, 3)).referenced() == frozenset()


def test_the_first_retire_counts():
    found = history(opened(1), commit(1, 10), mark(RetireRecord, 2), mark(RetireRecord, 2))
    assert found.retired == {2: 3}


def test_two_runs_in_one_log():
    with pytest.raises(RunMismatch, match="two runs share one root") as caught:
        history(opened(1), opened(2, run="other"))
    assert (caught.value.expected, caught.value.found) == ("r", "other")


@pytest.mark.parametrize(
    ("records", "kind"),
    [
        ([(2, opened(1))], "gap"),
        ([(1, opened(1)), (3, opened(2))], "gap"),
        ([(1, opened(1)), (1, opened(2))], "gap"),
        ([(1, opened(2)), (2, opened(2))], "generation"),
        ([(1, opened(2)), (2, opened(1))], "generation"),
        ([(1, opened(1, 7))], "dangling"),
        ([(1, opened(1, 2)), (2, commit(1, 1))], "dangling"),
    ],
)
def test_a_log_that_contradicts_itself(records, kind):
    with pytest.raises(InvalidDocument) as caught:
        RunHistory().extend(records)
    assert [problem.kind for problem in caught.value.problems] == [kind]


def test_the_fold_leaves_the_old_value_alone_and_is_the_same_in_any_portions():
    records = list(enumerate([opened(1), commit(1, 1), mark(PinRecord, 2), opened(2, 2)], 1))
    one_by_one = RunHistory()
    for seq, record in records:
        before = pickle.dumps(one_by_one)
        after = one_by_one.apply(seq, record)
        assert pickle.loads(before) == one_by_one
        one_by_one = after
    assert one_by_one == RunHistory().extend(records)
