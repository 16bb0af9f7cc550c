"""Whatever a document says, a reader answers with an error of ours, within bounds."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_resume.errors import DcpResumeError
from tests.support.damage import little_memory

from .foreign import FOREIGN
from .mutations import mutated_bytes, mutated_json, settings_of
from .targets import TARGETS

SETTINGS = settings_of(150)
JSON = ["log-record", "log-behind-others", "manifest", "catalog", "leaves", "raw", "weight-index"]


def feed(name: str, data: bytes) -> None:
    with little_memory(), contextlib.suppress(DcpResumeError):
        TARGETS[name].feed(data)


@pytest.mark.parametrize("name", [n for n in TARGETS if n not in ("raw", "log-behind-others")])
def test_what_is_well_formed_is_taken(name):
    TARGETS[name].feed(TARGETS[name].seeds()[0])


@pytest.mark.parametrize("name", TARGETS)
def test_changed_bytes(name):
    @(settings_of(60) if name in FOREIGN else SETTINGS)
    @given(st.sampled_from(TARGETS[name].seeds()).flatmap(mutated_bytes))
    def check(data):
        feed(name, data)

    check()


@pytest.mark.parametrize("name", JSON)
def test_changed_fields(name):
    @SETTINGS
    @given(st.sampled_from(TARGETS[name].seeds()).flatmap(mutated_json))
    def check(document):
        feed(name, json.dumps(document).encode() + b"\n")

    check()
