"""No credential reaches a log, an error or its causes, an event, a document or the terminal."""

from __future__ import annotations

import json
import logging
import pickle
import traceback
import uuid
from urllib.parse import quote

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_resume import (
    CheckpointManager,
    Reader,
    RetryPolicy,
    SaveMode,
    Settings,
    Writer,
    events,
    open_store,
    preflight,
)
from dcp_resume.cli.main import main
from dcp_resume.errors import ConfigurationError, DcpResumeError
from dcp_resume.session.error_wire import encode_error
from dcp_resume.session.incarnation import forget_incarnations
from tests.support.free_ports import free_ports

SECRET = "wJalr/XUtn+FEMI/K7MDENG=never"
TOKEN = "FwoGZXIvYXdzEBY-never"
IMPATIENT = RetryPolicy(deadline_s=0.5)
STATE = {"model": {"w": torch.ones(8)}, "epoch": 1}


class Output:
    """Everything that this process says while a test runs."""

    def __init__(self, capfd, caplog):
        self._capfd, self._caplog = capfd, caplog
        self.texts = []
        self.errors = []

    def note(self, thing):
        self.texts += [repr(thing), str(thing)]

    def attempt(self, action):
        """Do it; keep what it raises: message, causes with their traces, pickle and wire form."""
        try:
            self.note(action())
        except (DcpResumeError, dcp.CheckpointException) as error:
            self.errors.append(error)
            self.texts += traceback.format_exception(error)
            self.texts.append(repr(pickle.dumps(error)))
            if isinstance(error, DcpResumeError):
                self.texts.append(json.dumps(encode_error(error)))

    def command(self, *arguments):
        code = main([str(argument) for argument in arguments])
        self.texts.append(f"exit {code}")
        return code

    def collected(self):
        out, err = self._capfd.readouterr()
        # Below INFO only our own logger counts: botocore's prints the headers that it signs.
        logs = [
            record.getMessage() + str(record.exc_info or "")
            for record in self._caplog.records
            if record.levelno >= logging.INFO or record.name.startswith("dcp_resume")
        ]
        return "\n".join([*self.texts, *logs, out, err])


@pytest.fixture
def output(capfd, caplog):
    caplog.set_level(logging.DEBUG)
    found = Output(capfd, caplog)
    stop = events.subscribe(found.note)
    yield found
    stop()
    forget_incarnations()


def assert_secret(text, *secrets):
    assert len(text) > 100
    for secret in secrets:
        for form in (secret, quote(secret, safe=""), quote(secret), secret.partition("/")[2]):
            assert not form or form not in text


def drive(output, url, settings):
    """Every door: each may fail, none may tell."""

    def save():
        with CheckpointManager(url, settings) as checkpoints:
            output.note(checkpoints)
            checkpoints.save(1, STATE)

    def load():
        with CheckpointManager(url, settings) as checkpoints:
            checkpoints.load(STATE)

    options = settings.storage_options
    output.note(settings)
    output.attempt(save)
    output.attempt(load)
    output.attempt(lambda: preflight(url, settings))
    output.attempt(
        lambda: dcp.save(
            STATE, storage_writer=Writer(url, step=2, storage_options=options), no_dist=True
        )
    )
    output.attempt(
        lambda: dcp.load(STATE, storage_reader=Reader(url, storage_options=options), no_dist=True)
    )
    pairs = [f"--storage-option={name}={json.dumps(value)}" for name, value in options.items()]
    for verb in ("ls", "inspect", "verify"):
        assert output.command(verb, "--debug", url, *pairs) != 0


@pytest.mark.parametrize(
    "url",
    [
        f"s3://KEYID:{SECRET}@bucket/run",
        f"s3://KEYID:{SECRET.partition('/')[0]}@bucket/run",
        f"s3a://KEYID:{SECRET}@bucket",
        f"ftp://user:{SECRET}@host/run",
        f"memory://user:{SECRET}@host/run",
        f"memory://run?sig={SECRET}",
        f"s3://bucket/run?token={SECRET}",
        f"s3://bucket/run#{SECRET}",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_shown(output, url):
    drive(output, url, Settings())
    assert any(isinstance(error, ConfigurationError) for error in output.errors)
    assert "not shown" in str(output.errors[0])
    assert_secret(output.collected(), SECRET)


def test_access_points_are_no_credentials():
    arn = "arn:aws:s3:us-east-1:123456789012:accesspoint"
    assert open_store(f"s3://{arn}/run").url == f"s3://{arn}/run"


@pytest.mark.s3
def test_wrong_credentials_in_options_are_not_shown(output, s3_server, bucket):
    options = {**s3_server.storage_options, "secret": SECRET, "token": TOKEN}
    settings = Settings(storage_options=options, mode=SaveMode.BLOCKING)
    drive(output, f"s3://{bucket}/run", settings)
    assert len(output.errors) == 4
    assert_secret(output.collected(), SECRET, TOKEN)


@pytest.mark.s3
def test_wrong_credentials_in_the_environment_are_not_shown(output, s3_server, bucket, monkeypatch):
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    drive(output, f"s3://{bucket}/run", Settings(mode=SaveMode.BLOCKING))
    assert len(output.errors) == 4
    assert_secret(output.collected(), SECRET, TOKEN)


def test_endpoints_that_do_not_answer_show_no_secret(output):
    (nobody,) = free_ports(1)
    options = {"endpoint_url": f"http://127.0.0.1:{nobody}", "key": "KEYID", "secret": SECRET}
    settings = Settings(storage_options=options, retry=IMPATIENT, mode=SaveMode.BLOCKING)

    def save():
        with CheckpointManager("s3://bucket/run", settings) as checkpoints:
            checkpoints.save(1, STATE)

    output.attempt(save)
    output.attempt(lambda: preflight("s3://bucket/run", settings))
    assert_secret(output.collected(), SECRET)


@pytest.mark.parametrize("place", ["endpoint_url", "client_kwargs", "AWS_ENDPOINT_URL_S3"])
def test_a_secret_in_the_endpoint_is_refused_and_not_shown(output, place, monkeypatch):
    endpoint = f"http://KEYID:{SECRET}@127.0.0.1:9"
    options = {"endpoint_url": endpoint, "client_kwargs": {"endpoint_url": endpoint}}
    if place.startswith("AWS"):
        monkeypatch.setenv(place, endpoint)
    settings = Settings(
        storage_options={place: options[place]} if place in options else {}, mode=SaveMode.BLOCKING
    )
    drive(output, "s3://bucket/run", settings)
    assert any(getattr(error, "option", "") == place for error in output.errors)
    assert_secret(output.collected(), SECRET)


def test_a_storage_option_without_its_name_is_not_repeated(output, tmp_path):
    assert output.command("ls", tmp_path, "--storage-option", SECRET) == 2
    assert_secret(output.collected() + " " * 100, SECRET)


@pytest.mark.s3
def test_a_run_that_works_writes_and_says_nothing_of_its_credentials(output, s3_server):
    name = f"b-{uuid.uuid4().hex}"
    s3_server.make_bucket(name)
    grant = {"Effect": "Allow", "Principal": "*", "Action": "s3:*"}
    grant["Resource"] = [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"]
    policy = json.dumps({"Version": "2012-10-17", "Statement": [grant]})
    client = s3_server.client()
    client.put_bucket_policy(Bucket=name, Policy=policy)
    options = s3_server.job_options
    settings = Settings(storage_options=options, mode=SaveMode.BLOCKING, max_checkpoint_keep=1)
    preflight(f"s3://{name}/run", settings).require()
    for step in (1, 2):
        with CheckpointManager(f"s3://{name}/run", settings) as checkpoints:
            output.note(checkpoints.resume(dict(STATE)))
            output.note(checkpoints.save(step, STATE).result())
            output.note(checkpoints.history())
    pairs = [f"--storage-option={key}={json.dumps(value)}" for key, value in options.items()]
    assert output.command("verify", f"s3://{name}/run", "--debug", *pairs) == 0
    keys = [o["Key"] for o in client.list_objects_v2(Bucket=name)["Contents"]]
    assert any(key.endswith("manifest.json") for key in keys)
    objects = [client.get_object(Bucket=name, Key=key)["Body"].read() for key in keys]
    stored = b"\n".join(objects).decode("latin-1")
    assert_secret("\n".join([*keys, stored, output.collected()]), options["secret"], options["key"])
