"""``completion``: a shell completes with the script that it prints."""

from __future__ import annotations

import subprocess

import pytest


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["ver"], {"verify"}),
        (["un"], {"unpin", "unquarantine"}),
        (["verify", "--sa"], {"--sample"}),
        (["completion", ""], {"bash", "zsh", "tcsh"}),
    ],
)
def test_bash_completes_verbs_options_and_choices(call, tmp_path, typed, expected):
    code, script, _ = call("completion", "bash")
    assert code == 0
    (tmp_path / "script").write_text(script)
    words = " ".join(f"'{word}'" for word in ["dcp-resume", *typed])
    program = (
        f"source {tmp_path}/script; COMP_WORDS=({words}); COMP_CWORD={len(typed)}; "
        '_shtab_dcp_resume; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    found = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert {*found.stdout.split()} >= expected
    assert found.stderr == ""


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_scripts_too(call_json, shell):
    code, found = call_json("completion", shell)
    assert code == 0
    assert "dcp-resume" in found["script"]
