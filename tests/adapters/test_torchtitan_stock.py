"""What is said of checkpoints that torchtitan's own checkpointer wrote."""

from __future__ import annotations

import pytest

from dcp_resume.adapters.torchtitan_stock import newest_first, to_be_imported


def test_checkpoints_come_by_step_and_not_by_spelling():
    names = ["step-500", "step-4000", "step-1000", "step-9.tmp", "hf"]
    assert newest_first(names) == ["step-4000", "step-1000", "step-500"]


@pytest.mark.parametrize(
    ("run", "command"),
    [
        ("/out", "dcp-resume import /out/step-4000 /out --loose model --step 4000"),
        (
            None,
            "dcp-resume import /out/step-4000 RUN --loose model --step 4000, "
            "then set checkpoint.folder to RUN",
        ),
    ],
)
def test_the_error_says_the_command_that_helps(run, command):
    error = to_be_imported("/out/step-4000", run, "checkpoint.folder")
    assert str(error).endswith(command)
