"""Every verb in every case: what its exit code says, and that its message helps."""

from __future__ import annotations

import json
import socket
import uuid

import pytest

from dcp_resume.cli.main import _parser, main
from dcp_resume.errors import OutcomeUnknown
from dcp_resume.manifest.keys import LOG_PREFIX, log_key
from dcp_resume.storage.posix_store import PosixStore
from tests.support.saved_run import flip
from tests.support.verbs import call_verbs

VERBS = {
    "ls": "ls {url}",
    "inspect": "inspect {url} --tensors",
    "verify": "verify {url}",
    "plan": "plan {url} --to tp=2",
    "cp": "cp {url} {new}",
    "export": "export {url} {new}.pth --format torch --drop",
    "reshard": "reshard {url} {new}-tp2 --to tp=2",
    "materialize": "materialize {url} --into {new}-whole",
    "diff": "diff {url} {url}",
    "pin": "pin {url} --step 20",
    "unpin": "unpin {url} --step 20",
    "tag": "tag {url} good --step 20",
    "quarantine": "quarantine {url} 20",
    "unquarantine": "unquarantine {url} 20",
    "report": "report {url} --output {new}.html",
    "prune": "prune {url} --keep-last 1",
    "gc": "gc {url}",
    "doctor": "doctor {url}",
    "import": "import {new}.safetensors {url} --step 40",
}
"""In this order each one ends well on a whole run."""
ENDLESS = {"watch": "watch {url}"}
WITHOUT_URL = {"compare-loss": "compare-loss a b", "completion": "completion bash"}
ON_COMMANDS = {"prove": "prove --stop-at 1 --last 2 -- true {{run}} {{stop}}"}
_WITH_TORCH = {"plan", "reshard", "materialize", "export", "import", "diff"}
WITHOUT_TORCH = {*VERBS, *ENDLESS, *WITHOUT_URL} - _WITH_TORCH


def words(line, **places):
    return line.format(**{name: str(place) for name, place in places.items()}).split()


def options(s3):
    """The words that make a verb find a server."""
    return [
        word
        for name, value in s3.items()
        if isinstance(value, str)
        for word in ("--storage-option", f"{name}={value}")
    ]


@pytest.fixture
def new(tmp_path):
    """Where a verb makes something; what it is to import lies beside."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    foreign = tmp_path / "new.safetensors"
    foreign.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    return tmp_path / "new"


def test_the_tables_name_every_verb():
    (verbs,) = (a.choices for a in _parser()._actions if a.dest == "==SUPPRESS==" and a.choices)
    assert {*verbs} == {*VERBS, *ENDLESS, *WITHOUT_URL, *ON_COMMANDS}


def test_on_a_whole_local_run(run, new, call):
    for verb, line in VERBS.items():
        code, out, err = call(*words(line, url=run, new=new))
        assert (code, err) == (0, ""), verb
        assert out, verb


@pytest.mark.s3
def test_on_a_whole_run_on_s3_with_json(run, new, s3_server, bucket, call):
    s3 = options(s3_server.storage_options)
    url = f"s3://{bucket}/{uuid.uuid4().hex}"
    assert call("cp", run, url, "--all", *s3)[0] == 0
    for verb, line in VERBS.items():
        code, out, err = call(*words(line, url=url, new=new), *s3, "--json")
        assert (code, err) == (0, ""), verb
        assert json.loads(out), verb


def test_where_a_data_file_is_damaged(run, new, call):
    for path in run.glob("step-*/*/*-model-*"):
        flip(path, -1)
    finds = {"verify", "cp", "reshard", "materialize", "export"}
    for verb, line in VERBS.items():
        code, out, err = call(*words(line, url=run, new=new))
        assert code == (1 if verb in finds else 0), verb
        if verb in finds:
            assert "-model-" in out + err, verb
            assert "model.weight[0:4, 0:8]" in out + err or verb in finds - {"verify", "cp"}, verb
        assert "Traceback" not in err, verb


def test_where_a_log_record_is_damaged(run, new, call):
    flip(run / log_key(2), 0)
    for verb, line in {**VERBS, **ENDLESS}.items():
        code, out, err = call(*words(line, url=run, new=new))
        assert code == 1, verb
        assert log_key(2) in out + err, verb
        assert "Traceback" not in err, verb


def test_where_there_is_no_run(tmp_path, new, call):
    for verb, line in {**VERBS, **ENDLESS}.items():
        code, out, err = call(*words(line, url=tmp_path / "nothing" / verb, new=new))
        if verb in {"doctor", "import"}:
            assert code == 0
            continue
        assert (code, out) == (3, ""), verb
        assert str(tmp_path / "nothing") in err, verb
    assert not new.exists()


@pytest.mark.parametrize("verb", [*VERBS, *ENDLESS, *WITHOUT_URL, *ON_COMMANDS])
def test_wrong_arguments_are_told_from_right_ones(verb, call):
    line = {**VERBS, **ENDLESS, **WITHOUT_URL, **ON_COMMANDS}[verb]
    code, out, err = call(verb, "--no-such-option", *words(line, url="a", new="b")[1:])
    assert (code, out) == (2, "")
    assert err.startswith("usage: dcp-resume")
    code, out, err = call(verb)
    assert (code, out) == (2, "")
    assert "required" in err


@pytest.mark.parametrize("verb", [*VERBS, *ENDLESS])
def test_options_for_local_paths_alone_are_refused(verb, run, new, call):
    line = {**VERBS, **ENDLESS}[verb]
    code, _, err = call(*words(line, url=run, new=new), "--storage-option", "key=value")
    assert code == 2
    assert "storage_options ['key']" in err


@pytest.mark.parametrize("verb", [*VERBS, *ENDLESS, *WITHOUT_URL, *ON_COMMANDS])
def test_help_says_arguments_defaults_examples_and_exit_codes(verb, call):
    code, out, _ = call(verb, "--help")
    assert code == 0
    for part in ("usage: dcp-resume", "options:", "examples:", "exit codes:", "--json"):
        assert part in out, part
    assert f"  dcp-resume {verb}" in out.partition("examples:")[2]


def test_an_endpoint_that_refuses_connections_is_given_up_in_time_and_said(new, call):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
    s3 = options({"endpoint_url": endpoint, "key": "k", "secret": "s"})
    for verb, line in {**VERBS, **ENDLESS}.items():
        call_words = words(line, url="s3://bucket/run", new=new)
        code, out, err = call(*call_words, *s3, "--deadline", "0.2")
        assert code == (1 if verb == "doctor" else 4), verb
        assert "in 0.2 s" in out + err, verb
        assert "Traceback" not in err, verb
    assert not new.exists()


@pytest.mark.parametrize("verb", ["cp", "reshard", "materialize", "import"])
def test_an_append_whose_answer_is_lost_is_given_up_in_time(verb, run, new, call, monkeypatch):
    lost = []
    create = PosixStore.create

    def lose(self, key, data):
        if not key.startswith(LOG_PREFIX):
            return create(self, key, data)
        lost.append(key)
        raise OutcomeUnknown("the answer was lost", url=self.url, key=key)

    monkeypatch.setattr(PosixStore, "create", lose)
    code, _, err = call(*words(VERBS[verb], url=run, new=new), "--deadline", "0.001")
    assert code != 0
    assert "log/" in err
    assert len(lost) == 1  # two minutes' worth of them, without the deadline


def test_waiting_for_an_endpoint_is_said(call):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
    s3 = options({"endpoint_url": endpoint, "key": "k", "secret": "s"})
    code, _, err = call("ls", "s3://bucket/run", *s3, "--deadline", "2")
    assert code == 4
    assert err.startswith("dcp-resume: storage is tried again")


def test_ctrl_c_ends_every_verb_with_its_own_code(new):
    lines = {**VERBS, **ENDLESS}
    s3 = options({"endpoint_url": "{endpoint}", "key": "k", "secret": "s"})
    calls = [[*words(line, url="s3://bucket/run", new=new), *s3] for line in lines.values()]
    for verb, (code, out, err) in zip(lines, call_verbs("interrupted", calls), strict=True):
        assert (code, out, err) == (130, "", "dcp-resume: interrupted\n"), verb


def test_verbs_that_touch_no_tensor_work_where_torch_cannot_be_imported(run, new, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text('{"step": 1, "loss": 2.0}\n')
    lines = {**VERBS, **WITHOUT_URL}
    calls = {
        verb: [str(tmp_path / w) if w in ("a", "b") else w for w in words(line, url=run, new=new)]
        for verb, line in lines.items()
        if verb in WITHOUT_TORCH
    }
    found = call_verbs("without-torch", [*calls.values()])
    for verb, (code, out, err) in zip(calls, found, strict=True):
        assert (code, err) == (0, ""), verb
        assert out, verb
    assert main(["verify", str(new)]) == 0
