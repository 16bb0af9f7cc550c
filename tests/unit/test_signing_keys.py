"""Ed25519 keys, and keys in the files of the command line."""

from __future__ import annotations

import json

import pytest
import torch

from dcp_resume import CheckpointManager, Ed25519Key, HmacKey, SaveMode, Settings, SignedBy, Signing
from dcp_resume.cli.main import main
from dcp_resume.errors import ConfigurationError, Untrusted
from dcp_resume.manifest.signing import Ed25519PublicKey, message_of

# RFC 8032, section 7.1, test 2.
SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)
KEY = Ed25519Key("job", SECRET)
SHARED = HmacKey("team", bytes(range(32)))


def save(root, signer, trust):
    settings = Settings(mode=SaveMode.BLOCKING, signing=Signing(signer, trust))
    with CheckpointManager(root, settings) as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.ones(4)}})


def test_the_keys_are_those_of_the_standard():
    assert KEY.public_key == Ed25519PublicKey("job", PUBLIC)
    assert KEY.sign(b"\x72").value == SIGNATURE
    assert KEY.public_key.is_genuine(b"\x72", SIGNATURE)
    assert not KEY.public_key.is_genuine(b"\x73", SIGNATURE)
    assert not KEY.public_key.is_genuine(b"\x72", SIGNATURE[:-1])
    assert SECRET.hex() not in repr(KEY)
    assert repr(SECRET) not in repr(KEY)


def test_what_is_signed_says_what_it_is_for():
    assert message_of("manifest.json", b"{") == b"dcp_resume 1\nmanifest.json\n{"


def test_readers_need_only_the_public_key(tmp_path):
    save(tmp_path, KEY, SignedBy(KEY.public_key))
    reading = Settings(signing=Signing(trust=SignedBy(Ed25519PublicKey("job", PUBLIC))))
    with CheckpointManager(tmp_path, reading) as checkpoints:
        assert checkpoints.load({"model": {"w": torch.zeros(4)}}).step == 1
    other = Ed25519Key.generate("job").public_key
    with (
        CheckpointManager(
            tmp_path, Settings(signing=Signing(trust=SignedBy(other)))
        ) as checkpoints,
        pytest.raises(Untrusted),
    ):
        checkpoints.steps()


def test_a_key_of_another_scheme_does_not_pass_for_it(tmp_path):
    save(tmp_path, KEY, SignedBy(KEY.public_key))
    confused = HmacKey("job", PUBLIC)
    with (
        CheckpointManager(
            tmp_path, Settings(signing=Signing(trust=SignedBy(confused)))
        ) as checkpoints,
        pytest.raises(Untrusted, match="hmac-sha256:job"),
    ):
        checkpoints.steps()


@pytest.mark.parametrize("length", [0, 31, 33])
def test_other_lengths_are_no_keys(length):
    for make in (Ed25519Key, Ed25519PublicKey):
        with pytest.raises(ConfigurationError, match="32 raw bytes"):
            make("job", bytes(length))


def test_every_verb_takes_keys(tmp_path, capsys):
    run, copy, keys = tmp_path / "run", tmp_path / "copy", tmp_path / "keys"
    save(run, SHARED, SignedBy(SHARED))
    keys.write_text(f"hmac-sha256 team {SHARED.secret.hex()}\n\n")
    for arguments in (
        ["ls", run],
        ["inspect", run],
        ["verify", run],
        ["doctor", run],
        ["reshard", run, copy, "--to", "tp=2"],
        ["verify", copy],
    ):
        assert main([*map(str, arguments), "--keys", str(keys)]) == 0, arguments
    capsys.readouterr()
    keys.write_text(f"ed25519-public job {PUBLIC.hex()}\nhmac-sha256 team {bytes(32).hex()}\n")
    for verb in ("ls", "inspect", "verify", "doctor"):
        assert main([verb, str(run), "--keys", str(keys), "--json"]) == 1, verb
        document = json.loads(capsys.readouterr().out)
        assert verb == "doctor" or document["error"]["type"] == "Untrusted"


@pytest.mark.parametrize(
    "text",
    ["", "hmac-sha256 team", "rot13 team 00", "hmac-sha256 team 5ec2e7", "ed25519 job 5ec2e7xx"],
)
def test_a_file_of_other_things_is_refused_and_not_shown(tmp_path, capsys, text):
    (tmp_path / "keys").write_text(text)
    assert main(["ls", str(tmp_path), "--keys", str(tmp_path / "keys")]) == 2
    assert "5ec2e7" not in capsys.readouterr().err
    assert main(["ls", str(tmp_path), "--keys", str(tmp_path / "absent")]) == 2
