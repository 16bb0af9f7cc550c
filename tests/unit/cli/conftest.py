"""A run of three steps for the verbs to work on."""

from __future__ import annotations

import json
import shutil

import pytest

from dcp_resume.cli.main import main
from tests.support.saved_run import save_steps


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "a"
    save_steps(root, [10, 20, 30])
    return root


@pytest.fixture
def run(whole_run, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(whole_run, tmp_path / "run")


@pytest.fixture
def call(capsys):
    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def call_json(call):
    def call_json(*words):
        code, out, _ = call(*words, "--json")
        return code, json.loads(out)

    return call_json
