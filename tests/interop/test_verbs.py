"""The verbs ``import`` and ``export``: JSON, exit codes, S3."""

from __future__ import annotations

import json

import pytest
import torch

from dcp_resume.cli.main import main
from tests.interop.peers import assert_equal


def test_a_file_becomes_a_run_and_a_file_again(tmp_path, capsys):
    state = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    torch.save(state, tmp_path / "it.pth")
    run = str(tmp_path / "run")
    assert main(["import", str(tmp_path / "it.pth"), run, "--step", "9", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["format"], document["step"], document["num_tensors"]) == ("torch", 9, 2)
    out = str(tmp_path / "out.pth")
    arguments = ["export", run, out, "--format", "torch", "--part", "model"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["out.pth"]
    assert_equal(torch.load(out, weights_only=True), state)
    assert main(arguments) == 2
    assert "replaces nothing" in capsys.readouterr().err
    assert main(["verify", run, "--tensors"]) == 0


def test_what_is_refused_is_said_and_told_by_the_exit_code(tmp_path, capsys):
    (tmp_path / "it").write_text("no checkpoint at all")
    assert main(["import", str(tmp_path / "it"), str(tmp_path / "run"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "ForeignFormat"
    assert not (tmp_path / "run").exists()


@pytest.mark.s3
def test_all_of_it_in_a_bucket(bucket, s3_server, tmp_path, capsys):
    torch.save({"a": torch.randn(3, 4)}, tmp_path / "it.pth")
    given = s3_server.storage_options.items()
    options = [f"--storage-option={key}={json.dumps(value)}" for key, value in given]
    run, target = f"s3://{bucket}/run", f"s3://{bucket}/out/dcp"
    assert main(["import", str(tmp_path / "it.pth"), run, *options]) == 0
    assert main(["export", run, target, "--format", "dcp", "--part", "model", *options]) == 0
    assert main(["import", target, str(tmp_path / "back"), *options]) == 0
    capsys.readouterr()
    assert main(["diff", run, str(tmp_path / "back"), *options]) == 0
    theirs = [option.replace("--storage", "--target-storage") for option in options]
    out = str(tmp_path / "out.pth")
    assert main(["import", str(tmp_path / "it.pth"), f"{run}-2", *theirs]) == 0
    assert main(["diff", str(tmp_path / "back"), f"{run}-2", *theirs]) == 0
    assert main(["export", str(tmp_path / "back"), f"{target}-2", "--format=dcp", *theirs]) == 0
    wrong = [option.replace("testtest", "wrong") for option in theirs]
    assert main(["export", run, f"{target}-3", "--format=dcp", *options, *wrong]) != 0
    assert main(["export", f"{run}-2", out, "--format=torch", *options]) == 0
    assert main(["materialize", run, *options, *theirs]) == 2
    assert "--into" in capsys.readouterr().err
