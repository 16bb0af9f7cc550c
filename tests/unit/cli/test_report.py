"""The verb report: one page that stands alone, from the log and one checkpoint's documents."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from dcp_resume.manager.checkpoint_manager import CheckpointManager
from dcp_resume.manager.policies import KeepLast
from dcp_resume.manager.settings import SaveMode, Settings
from dcp_resume.manifest.models import RankTimes
from dcp_resume.manifest.records import DropRecord
from dcp_resume.run_report.charts import heat_table, ticks
from dcp_resume.run_report.gathering import gather, phases_of
from dcp_resume.run_report.lost_saves import find_lost_saves
from dcp_resume.run_report.page import html_page
from dcp_resume.run_report.picture import find_browser, write_png
from dcp_resume.session.marks import drop
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import open_store
from tests.support.built_run import BuiltRun
from tests.support.saved_run import save_steps

HOSTILE = "<script>alert(1)</script>"


def report_of(root, **choices):
    store = open_store(str(root))
    history = RunLog(store).refresh()
    choices = {"entry": history.newest(), "policy": None, **choices}
    return gather(store, history, **choices)


def test_the_page_shows_the_run_and_needs_nothing_else(run, call_json, tmp_path):
    page = tmp_path / "page.html"
    code, document = call_json(
        "report", run, "--output", page, "--keep-last", 1, "--mtbf", "8h", "--step", 20
    )
    assert code == 0
    assert document["files"] == [str(page)]
    assert document["step"] == 20
    assert document["slowest_ranks"] == {"plan": 0, "stage": 0, "write": 0}
    assert document["advised_interval_s"] > 0
    assert document["missing"] == []
    text = page.read_text()
    for title in ("each save took", "Phases by rank, step 20", "Which rank wrote what", "Loss"):
        assert title in text, title
    assert "model.weight" in text
    assert text.count('class="goes"') == 2, "steps 10 and 20 would be deleted"
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", text)


def test_what_is_missing_is_said(run, call, tmp_path):
    page = tmp_path / "page.html"
    code, out, _ = call("report", run, "--output", page)
    assert code == 0
    assert "no policy was given" in out
    assert "never interrupted" in out
    assert "no policy was given" in page.read_text()


def test_restarts_and_retired_checkpoints_are_on_the_page(run):
    save_steps(run, [30, 40], resume=20)
    store = open_store(str(run))
    built = report_of(run)
    assert built.advice is None or built.advice.is_measured
    page = html_page(built)
    assert 'class="restart"' in page
    assert "generation 2 owns the run" in page
    states = [built.state_of(entry.seq) for entry in built.commits]
    assert states == ["current", "current", "rolled back", "current", "current"]
    store.close()


def test_saves_that_came_to_nothing_are_told_apart(tmp_path):
    built = BuiltRun(open_store(str(tmp_path)))
    built.save(10, 20)
    failed, dropped, gone, running = (built.attempt(step) for step in (12, 14, 16, 30))
    drop(built.log, [dropped, gone])
    built.store.delete([info.key for info in built.store.list("step-00000016/")])
    lost = find_lost_saves(built.store, RunLog(built.store))
    assert [(one.step, one.attempt, one.num_files, one.why) for one in lost] == [
        (12, failed, 1, "no commit"),
        (14, dropped, 1, "given up in log record 4"),
        (30, running, 1, "no commit, or under way"),
        (None, gone, 0, "given up in log record 4, and deleted"),
    ]
    page = html_page(report_of(tmp_path, lost=lost))
    assert "4 attempt(s) without a commit, of which 12 B lie on storage" in page
    assert "No attempt is without its commit" in html_page(report_of(tmp_path))


def test_a_record_that_does_not_count_is_on_the_page_with_the_reason(tmp_path):
    built = BuiltRun(open_store(str(tmp_path)))
    built.save(10)
    late = DropRecord(
        run=built.log.run, created=built.log.timestamp(), attempts=(built.find(10).record.attempt,)
    )
    refused = dataclasses.replace(
        report_of(tmp_path), history=built.log.history.apply(built.log.history.last_seq + 1, late)
    )
    assert "record 3: drop of a1, committed before it" in html_page(refused)


def test_a_mesh_that_several_ranks_have_is_named_once(run):
    report = report_of(run)
    view = dataclasses.replace(report.checkpoint, meshes=("tp=2", "dp=2", "tp=2"))
    page = html_page(dataclasses.replace(report, checkpoint=view))
    assert "World size 1 (tp=2; dp=2). Darker" in page


def test_long_names_lose_their_middle_and_keep_their_ends():
    names = [
        f"optim.state.transformer.h.0.mlp.c_fc.weight.{end}" for end in ("exp_avg", "exp_avg_sq")
    ]
    table = heat_table(["rank 0"], [(name, "", [1.0], ["100 %"], None) for name in names], "")
    shown = re.findall(r'class="name" title="(.*?)">(.*?)<', table)
    assert [whole for whole, _ in shown] == names
    assert all(short.endswith(name[-20:]) for (_, short), name in zip(shown, names, strict=True))
    assert shown[0][1] != shown[1][1]


def test_a_damaged_checkpoint_or_none_leaves_the_rest_of_the_page(tmp_path):
    built = BuiltRun(open_store(str(tmp_path)))
    assert "There is no checkpoint yet." in html_page(report_of(tmp_path))
    built.save(10, 20, loss=2.0)
    built.damage(20)
    built.retire(10)
    report = report_of(tmp_path, policy=KeepLast(1))
    assert report.checkpoint is None
    assert any("Step 20 cannot be opened" in why for why in report.missing)
    assert any("2 of 2 saves have no recorded times" in why for why in report.missing)
    assert [total for _, total in report.live_bytes()] == [4, 8, 4]
    assert "Best loss kept" in html_page(report)


def test_names_from_storage_are_text(tmp_path):
    with CheckpointManager(tmp_path, Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        checkpoints.save(1, {"model": {HOSTILE: torch.ones(4)}})
    page = html_page(report_of(tmp_path))
    assert "alert(1)" in page
    assert HOSTILE not in page


def test_who_called_last_and_who_was_slowest_is_named():
    plan, stage, write = phases_of(
        RankTimes(planned_s=(5.0, 0.5, 4.0), staged_s=(6.0, 1.0, 7.0), written_s=(8.0, 9.0, 8.0))
    )
    assert (plan.slowest, stage.slowest, write.slowest) == (1, 2, 1)
    assert stage.seconds == (1.0, 0.5, 3.0)
    assert write.seconds == (2.0, 8.0, 1.0)


def test_a_thousand_ranks_fit_the_page(run):
    report = report_of(run)
    times = RankTimes(
        planned_s=(1.0,) * 1000,
        staged_s=(2.0,) * 1000,
        written_s=(*(3.0,) * 777, 9.0, *(3.0,) * 222),
    )
    view = dataclasses.replace(
        report.checkpoint, world_size=1000, phases=phases_of(times), rank_bytes=(10**9,) * 1000
    )
    page = html_page(dataclasses.replace(report, checkpoint=view))
    assert "slowest: rank 777, 7 s (median 1 s)" in page
    assert "ranks 768 to 783" in page
    assert len(page) < 200_000


def test_a_png_without_a_browser_is_refused_before_anything_is_written(
    run, call, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call("report", run, "--output", tmp_path / "a.html", "--png", tmp_path / "a.png")
    assert code == 2
    assert "a PNG needs a browser" in err
    assert list(tmp_path.glob("a.*")) == []


def has_browser():
    try:
        return bool(find_browser())
    except ValueError:
        return False


@pytest.mark.skipif(not has_browser(), reason="no browser on PATH")
def test_the_picture_is_as_tall_as_the_page(run, tmp_path):
    path = tmp_path / "a.png"
    write_png(find_browser(), html_page(report_of(run)), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert width == 1080
    assert height > 1000


def test_ticks_are_round_and_inside():
    assert ticks(5.0, 1.0) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert ticks(3 * 1024.0, unit=1024.0) == [0.0, 1024.0, 2048.0, 3072.0]
    assert ticks(2.0, 2.0) == [2.0]
