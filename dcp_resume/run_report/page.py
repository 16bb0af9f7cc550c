"""The report as one HTML file that asks no network for anything, and runs no script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from dcp_resume.manifest.history import CommitEntry
from dcp_resume.run_report.charts import Series, heat_table, legend, line_chart, stacked_bars
from dcp_resume.run_report.gathering import CheckpointView, RunReport
from dcp_resume.run_report.style import STYLE

__all__ = ["html_page"]

_MAX_SAVES = 48
"""Bars that can still be told apart."""
_MAX_COLUMNS = 64
_UNRECORDED = (
    "Why a save failed, and which requests were tried again, a run does not record: the job's own "
    "log and events tell."
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Told to the browser: whatever a name from storage says, nothing is fetched and nothing runs."""


def html_page(report: RunReport) -> str:
    """The whole file."""
    name = report.url.rstrip("/").rpartition("/")[2] or report.url
    sections = "".join(
        f"<section><h2>{escape(title)}</h2>{body}</section>"
        for title, body in _sections(report)
        if body
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(name)}: run report</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(name)}</h1><p>{escape(report.url)} · run {escape(report.history.run or '')}"
        f"</p>{_tiles(report)}{sections}</main></body></html>\n"
    )


def _sections(report: RunReport) -> Iterator[tuple[str, str]]:
    yield "What each save took", _timeline(report)
    view = report.checkpoint
    if view is not None:
        yield f"Phases by rank, step {view.step}", _phases(view)
        yield f"Which rank wrote what, step {view.step}", _shards(view)
    yield "Saves that came to nothing", _lost(report)
    yield "Loss", _losses(report)
    yield "Learning rate", _rates(report)
    yield "Storage", _storage(report)
    yield "What retention will do", _retention(report)
    yield (
        "Not shown",
        "".join(f"<li>{escape(why)}</li>" for why in report.missing).join(
            ("<ul>", "</ul>") if report.missing else ("", "")
        ),
    )


def _tiles(report: RunReport) -> str:
    history = report.history
    newest, best = history.newest(), history.best()
    live = history.live_commits()
    tiles: list[tuple[str, str, str]] = []
    if newest is not None:
        record = newest.record
        tiles.append(("Resumes from", f"step {record.step}", record.created))
    num_bytes = sum(record.num_bytes for record in live.values())
    tiles.append(("Checkpoints", str(len(live)), f"{_bytes(num_bytes)} on storage"))
    if best is not None:
        loss = best.record.trainer.metrics["loss"]
        tiles.append(("Best loss kept", f"{loss:.4g}", f"step {best.record.step}"))
    if report.history.opens:
        restarts = len(history.opens) - 1
        tiles.append(("Restarts", str(restarts), f"generation {history.generation} owns the run"))
    advice = report.advice
    if advice is not None:
        source = "measured" if advice.is_measured else "given"
        tiles.append(
            (
                "Save every",
                _seconds(advice.interval_s),
                f"a save holds the trainer up {_seconds(advice.cost_s)}, "
                f"{_seconds(advice.mtbf_s)} between failures ({source})",
            )
        )
    items = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for name, value, small in tiles
    )
    return f"<dl>{''.join(items)}</dl>"


def _timeline(report: RunReport) -> str:
    timed = [entry for entry in report.commits if entry.record.times is not None][-_MAX_SAVES:]
    if not timed:
        return ""
    layers: dict[str, list[float]] = {"staged": [], "written": [], "durable": [], "committed": []}
    titles = []
    for _, record in timed:
        times = record.times
        assert times is not None
        reached = [times.staged_s, times.written_s, times.durable_s, times.committed_s]
        for values, end, begin in zip(layers.values(), reached, [0.0, *reached], strict=False):
            values.append(max(0.0, end - begin))
        said = zip(layers, reached, strict=True)
        titles.append(
            f"step {record.step}, {record.created}, {_bytes(record.num_bytes)}: "
            + ", ".join(f"{name} {_seconds(at)}" for name, at in said)
            + f"; trainers stood still for {_seconds(times.blocked_s)}"
        )
    names = (
        ("staged, while trainers wait", "var(--blocked)"),
        ("written, behind the trainer", "var(--behind)"),
        ("seen durable", "var(--proved)"),
        ("committed", "var(--sealed)"),
    )
    series = [
        Series(name, color, values)
        for (name, color), values in zip(names, layers.values(), strict=True)
    ]
    steps = [str(entry.record.step) for entry in timed]
    chart = stacked_bars(steps, series, titles, _seconds, _restarts(timed))
    return (
        "<p>Seconds from the call of save until it was committed, by step. A dotted line is a "
        f"restart.{_blocking(timed)}</p>{legend(series)}{chart}"
    )


def _blocking(entries: Sequence[CommitEntry]) -> str:
    times = [entry.record.times for entry in entries]
    count = sum(one is not None and one.blocked_s > one.staged_s for one in times)
    return f" Of {count} blocking saves the trainers waited for the whole bar." if count else ""


def _restarts(entries: Sequence[CommitEntry]) -> list[int]:
    generations = [entry.record.generation for entry in entries]
    return [n for n in range(1, len(entries)) if generations[n] != generations[n - 1]]


def _phases(view: CheckpointView) -> str:
    if not view.phases:
        return ""
    width = math.ceil(view.world_size / _MAX_COLUMNS)
    columns = _columns(view.world_size, width)
    rows: list[tuple[str, str, Sequence[float], Sequence[str], int | None]] = []
    for phase in view.phases:
        values = _bins(phase.seconds, width)
        middle = sorted(phase.seconds)[len(phase.seconds) // 2]
        if phase.name == "plan":
            note = f"rank {phase.slowest} called last, others waited up to {_seconds(max(values))}"
        else:
            worst = phase.seconds[phase.slowest]
            note = f"slowest: rank {phase.slowest}, {_seconds(worst)} (median {_seconds(middle)})"
        texts = [_seconds(value) for value in values]
        rows.append((phase.name, note, values, texts, phase.slowest // width))
    write_s = view.phases[-1].seconds
    rates = [b / s if s else 0.0 for b, s in zip(view.rank_bytes, write_s, strict=False)]
    slowest = min(range(len(rates)), key=rates.__getitem__)
    binned = [min(rates[n : n + width]) for n in range(0, len(rates), width)]
    texts = [f"{_bytes(rate)}/s" for rate in binned]
    note = f"least: rank {slowest}, {_bytes(rates[slowest])}/s"
    rows.append(("write rate", note, binned, texts, slowest // width))
    return (
        f"<p>World size {view.world_size}{_meshes(view)}. Darker is more within its row; the "
        f"framed rank is the one that the others wait for.</p>{heat_table(columns, rows, '')}"
    )


def _shards(view: CheckpointView) -> str:
    if not view.tensors:
        return ""
    num_ranks = len(view.rank_bytes)
    width = math.ceil(num_ranks / _MAX_COLUMNS)
    rows: list[tuple[str, str, Sequence[float], Sequence[str], int | None]] = []
    for row in view.tensors:
        values = [
            float(sum(row.rank_bytes[start : start + width]))
            for start in range(0, num_ranks, width)
        ]
        total = sum(values)
        texts = [f"{100 * value / total:.0f} %" if value else "" for value in values]
        rows.append((row.name, f"{_bytes(total)}  {row.about}", values, texts, None))
    return (
        "<p>Share of each tensor's bytes by the rank that wrote them, largest tensors first. Of "
        "equal copies one rank writes each piece.</p>"
        + heat_table(_columns(num_ranks, width), rows, "size, dtype, shape")
    )


def _columns(num_ranks: int, width: int) -> list[str]:
    if width == 1:
        return [f"rank {rank}" for rank in range(num_ranks)]
    starts = range(0, num_ranks, width)
    return [f"ranks {start} to {min(start + width, num_ranks) - 1}" for start in starts]


def _bins(values: Sequence[float], width: int) -> list[float]:
    return [max(values[start : start + width]) for start in range(0, len(values), width)]


def _meshes(view: CheckpointView) -> str:
    """Each mesh once: ranks of several rows of one mesh have the same sub-mesh."""
    meshes = "; ".join(dict.fromkeys(view.meshes))
    return f" ({escape(meshes)})" if meshes else ""


def _on_line(report: RunReport) -> list[CommitEntry]:
    """Commits that the newest descends from, deleted ones too, oldest first: one a step."""
    by_step: dict[int, CommitEntry] = {}
    for entry in report.commits:
        for step in [step for step in by_step if step >= entry.record.step]:
            del by_step[step]  # a restart from an older step went over it again
        by_step[entry.record.step] = entry
    return [by_step[step] for step in sorted(by_step)]


def _losses(report: RunReport) -> str:
    entries = _on_line(report)
    facts = [entry.record.trainer for entry in entries]
    series = [
        Series(
            "loss at the save", "var(--behind)", [f.metrics.get("loss", math.nan) for f in facts]
        ),
        Series("best so far", "var(--sealed)", [f.best_loss for f in facts], is_stepped=True),
    ]
    known = [one for one in series if any(map(math.isfinite, one.values))]
    if not known:
        return ""
    return legend(known) + _over_steps(entries, known, 220)


def _rates(report: RunReport) -> str:
    entries = _on_line(report)
    rates = [entry.record.trainer.last_lr for entry in entries]
    count = max(map(len, rates), default=0)
    if not count:
        return ""
    first = [lr[0] if lr else math.nan for lr in rates]
    more = f"<p>Of the first of {count} parameter groups.</p>" if count > 1 else ""
    return more + _over_steps(entries, [Series("lr", "var(--blocked)", first)], 130)


def _over_steps(entries: Sequence[CommitEntry], series: Sequence[Series], height: int) -> str:
    steps = [float(entry.record.step) for entry in entries]
    marks = [steps[n] for n in _restarts(entries)]
    return line_chart(steps, series, lambda v: f"{v:.4g}", lambda x: f"{x:.0f}", marks, height)


def _storage(report: RunReport) -> str:
    points = report.live_bytes()
    if not points:
        return ""
    values = [float(total) for _, total in points]
    series = [Series("live", "var(--behind)", values, is_stepped=True, is_filled=True)]
    numbers = [float(seq) for seq, _ in points]
    unit = 1024.0 ** int(math.log(max(*values, 1.0), 1024))
    chart = line_chart(numbers, series, _bytes, lambda seq: f"#{seq:.0f}", height=190, unit=unit)
    peak = max(values)
    return (
        f"<p>Bytes of live checkpoints by log record: {_bytes(values[-1])} now, "
        f"{_bytes(peak)} at most.</p>{chart}"
    )


def _retention(report: RunReport) -> str:
    if not report.policy:
        return ""
    goes = [one.entry.record.num_bytes for one in report.decisions if not one.is_kept]
    rows = []
    for one in report.decisions[-200:]:
        record = one.entry.record
        loss = record.trainer.metrics.get("loss")
        cells = (
            str(record.step),
            str(record.generation),
            record.created,
            _bytes(record.num_bytes),
            "" if loss is None else f"{loss:.4g}",
        )
        text = f"{'keep' if one.is_kept else 'delete'}: {one.reason}" if one.reason else "delete"
        rows.append(_row(cells, text, "" if one.is_kept else ' class="goes"'))
    heads = ("step", "gen", "time", "size", "loss")
    return (
        f"<p>{escape(report.policy)}: {len(goes)} of {len(report.decisions)} checkpoint(s), "
        f"{_bytes(sum(goes))}, would be deleted.</p>{_table(heads, 'action, because', rows)}"
    )


def _lost(report: RunReport) -> str:
    """Attempts without a commit, and records that do not count."""
    rows = []
    for one in report.lost[-200:]:
        size = _bytes(one.num_bytes) if one.num_files else ""
        cells = (
            "" if one.step is None else str(one.step),
            one.attempt,
            one.written,
            str(one.num_files),
            size,
        )
        rows.append(_row(cells, one.why))
    refused = "".join(
        f"<li>record {seq}: {escape(why)}</li>" for seq, why in report.history.ignored.items()
    )
    body = _table(("step", "attempt", "last written", "files", "size"), "why", rows) if rows else ""
    if refused:
        body += f"<p>Records of the log that do not count:</p><ul>{refused}</ul>"
    num_bytes = sum(one.num_bytes for one in report.lost)
    begun = "No attempt is without its commit."
    if report.lost:
        begun = (
            f"{len(report.lost)} attempt(s) without a commit, of which {_bytes(num_bytes)} lie on "
            "storage. No load sees them; gc removes them."
        )
    return f"<p>{begun} {_UNRECORDED}</p>{body}"


def _row(cells: Sequence[str], text: str, kind: str = "") -> str:
    shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr{kind}>{shown}<td class="text">{escape(text)}</td></tr>'


def _table(heads: Sequence[str], text: str, rows: Sequence[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads) + f'<th class="text">{text}</th>'
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _seconds(seconds: float) -> str:
    if seconds == 0:
        return "0"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
