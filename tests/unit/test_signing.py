"""What is signed is believed, and nothing else, before a byte of it is parsed."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_resume import (
    Anyone,
    CheckpointManager,
    HmacKey,
    Reader,
    SaveMode,
    Settings,
    SignedBy,
    Signing,
    Writer,
    open_store,
    preflight,
)
from dcp_resume.errors import (
    ConfigurationError,
    CorruptData,
    InvalidCheckpoint,
    InvalidDocument,
    PartialLoad,
    Untrusted,
)
from dcp_resume.format.digests import DigestAlgorithm, digest_bytes, digest_hex, fold
from dcp_resume.manifest.seals import find_seal, seal
from dcp_resume.planning.layout_rules import TargetMesh
from dcp_resume.session.finding import find_checkpoints
from dcp_resume.session.incarnation import forget_incarnations
from dcp_resume.session.marks import pin
from dcp_resume.session.opening import open_checkpoint
from dcp_resume.session.reshard import ReshardOptions, reshard
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.verify import verify_checkpoint
from tests.support.damage import flip

KEY = HmacKey("team-a", b"0123456789abcdef0123456789abcdef")
OTHER = HmacKey("team-b", b"another secret of 32 bytes: 1234")
SIGNING = Signing(KEY, SignedBy(KEY))
SIGNED = Settings(mode=SaveMode.BLOCKING, signing=SIGNING)
READING = Settings(signing=Signing(trust=SignedBy(KEY)))
PLAIN = Settings(mode=SaveMode.BLOCKING)


def state_at(step):
    large = torch.arange(30_000, dtype=torch.float32).reshape(100, 300) + step  # of two blocks
    return {"model": {"w": large, "b": torch.ones(3)}, "data": {"epoch": step}}


def save(root, settings, *steps):
    with CheckpointManager(root, settings) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step))


def load(root, settings, step="latest"):
    state = state_at(0)
    with CheckpointManager(root, settings) as checkpoints:
        found = checkpoints.load(state, step)
    assert torch.equal(state["model"]["w"], state_at(found.step)["model"]["w"])
    return found.step


def attempt_of(root, step):
    (found,) = (root / f"step-{step:08}").iterdir()
    return found


def kinds(caught):
    return {problem.kind for problem in caught.value.problems}


@pytest.fixture
def run(tmp_path):
    save(tmp_path / "run", SIGNED, 1, 2)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _forget():
    yield
    forget_incarnations()


def test_signed_checkpoints_are_loaded_by_those_who_ask_for_signatures_and_by_others(run):
    assert load(run, READING) == 2
    assert load(run, PLAIN, 1) == 1
    both = Settings(signing=Signing(trust=SignedBy(OTHER, KEY)))
    assert load(run, both) == 2
    assert preflight(run, READING).is_ready


def test_every_digest_of_a_signed_checkpoint_is_cryptographic(run):
    manifest = json.loads((attempt_of(run, 2) / "manifest.json").read_bytes())
    catalog = json.loads((attempt_of(run, 2) / "catalog.json").read_bytes())
    records = [json.loads(path.read_bytes()) for path in (run / "log").iterdir()]
    assert manifest["digest"]["algorithm"] == "sha256-128"
    found = json.dumps([manifest, catalog, records])
    assert "xxh3-128:" not in found
    assert found.count('"sha256-128:') >= 6


def test_unsigned_checkpoints_are_refused_where_signatures_are_asked_for(tmp_path):
    save(tmp_path, PLAIN, 1)
    for open_it in (
        lambda: load(tmp_path, READING),
        lambda: CheckpointManager(tmp_path, READING).resume(state_at(0)),
        lambda: CheckpointManager(tmp_path, READING).steps(),
        lambda: find_checkpoints(open_store(str(tmp_path)), "latest", SignedBy(KEY)),
    ):
        with pytest.raises(Untrusted, match="it is not signed") as caught:
            open_it()
        assert kinds(caught) == {"unsigned"}
    report = preflight(tmp_path, READING)
    assert [check.name for check in report.checks if check.verdict.value == "fail"] == ["log"]


def test_other_keys_are_refused(run):
    with pytest.raises(Untrusted, match="expected a signature of hmac-sha256:team-b") as caught:
        load(run, Settings(signing=Signing(trust=SignedBy(OTHER))))
    assert kinds(caught) == {"unknown_key"}
    same_name = HmacKey("team-a", OTHER.secret)
    with pytest.raises(Untrusted) as caught:
        load(run, Settings(signing=Signing(trust=SignedBy(same_name))))
    assert kinds(caught) == {"forged"}


def test_nothing_is_parsed_before_its_origin_is_proved(run):
    """What no parser takes is called untrusted, not malformed."""
    record = run / "log" / "000000000002.json"
    record.write_bytes(seal(b'{"not json, and far too deep": [[[' + b"[" * 9_000 + b"}\n"))
    with pytest.raises(InvalidDocument):
        load(run, PLAIN)
    with pytest.raises(Untrusted, match="000000000002"):
        load(run, READING)
    record.write_bytes(b"\xff\xfe")
    with pytest.raises(Untrusted):
        load(run, READING)


def test_no_bit_of_a_signed_record_can_be_changed_even_with_its_checksum_made_right(run):
    record = run / "log" / "000000000003.json"
    found = find_seal(record.read_bytes())
    signature = found.signature
    for position in range(0, len(found.body), 3):
        body = bytearray(found.body)
        body[position] ^= 1
        record.write_bytes(seal(bytes(body) + b"}\n", lambda _: signature))
        with pytest.raises(Untrusted) as caught:
            RunLog(open_store(str(run)), signing=READING.signing).refresh()
        assert kinds(caught) == {"forged"}


def test_a_record_cannot_be_put_at_another_number_and_a_manifest_cannot_be_a_record(run):
    log = run / "log"
    names = sorted(path.name for path in log.iterdir())
    pinned = (log / names[1]).read_bytes()
    (log / "000000000004.json").write_bytes(pinned)
    with pytest.raises(Untrusted, match="000000000004") as caught:
        load(run, READING)
    assert kinds(caught) == {"forged"}
    (log / "000000000004.json").write_bytes((attempt_of(run, 1) / "manifest.json").read_bytes())
    with pytest.raises(Untrusted, match="000000000004"):
        load(run, READING)


def test_an_older_signed_manifest_does_not_pass_for_a_newer_one(run):
    shutil.copy(attempt_of(run, 1) / "manifest.json", attempt_of(run, 2) / "manifest.json")
    with pytest.raises(InvalidCheckpoint, match=r"manifest\.json") as caught:
        load(run, READING)
    assert kinds(caught) <= {"digest", "size"}


def forge_data(attempt):
    """Change a weight, and make every digest up to the manifest right again, without the key."""
    (path,) = attempt.glob("shard-*model*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    algorithm = DigestAlgorithm.SHA256
    store = open_store(str(attempt))
    opened = open_checkpoint(store, "", None)
    file = next(n for n, f in enumerate(opened.catalog.files) if f.key == path.name)
    bounds = opened.block_bounds(file).tolist()
    blocks = [bytes(data[a:b]) for a, b in itertools.pairwise(bounds)]
    digests = [digest_bytes([block], algorithm) for block in blocks]
    index = (attempt / "chunk-index").read_bytes()
    first = int(opened.blocks.first[file])
    for number, digest in enumerate(digests, first):
        index = index.replace(opened.index.block_digest[number].tobytes(), digest)
    (attempt / "chunk-index").write_bytes(index)
    catalog = json.loads((attempt / "catalog.json").read_bytes())
    catalog["files"][file]["digest"] = fold(b"".join(digests), algorithm)
    (attempt / "catalog.json").write_bytes(json.dumps(catalog).encode())
    manifest = json.loads(find_seal((attempt / "manifest.json").read_bytes()).content)
    for name, key in (("catalog", "catalog.json"), ("chunk_index", "chunk-index")):
        content = (attempt / key).read_bytes()
        manifest[name] |= {"size": len(content), "digest": digest_hex(content, algorithm)}
    manifest["chunk_index"]["block_digests"] = [digest_bytes([index], algorithm).hex()]
    signature = find_seal((attempt / "manifest.json").read_bytes()).signature
    (attempt / "manifest.json").write_bytes(
        seal(json.dumps(manifest).encode() + b"\n", lambda _: signature)
    )


def test_forged_weights_pass_where_anyone_is_believed_and_not_where_a_key_is_asked_for(run):
    copy = shutil.copytree(attempt_of(run, 2), run.parent / "copy")
    store = open_store(str(copy))
    forge_data(copy)
    (located,) = find_checkpoints(store, "latest")
    assert verify_checkpoint(store, located).is_whole
    found = verify_checkpoint(store, located, trust=SignedBy(KEY))
    assert [problem.kind for problem in found.problems] == ["forged"]
    with pytest.raises(Untrusted):
        find_checkpoints(store, "latest", SignedBy(KEY))


def test_damaged_data_of_a_signed_checkpoint_is_found_by_its_blocks(run):
    (path,) = attempt_of(run, 2).glob("shard-*model*.safetensors")
    flip(path, -1)
    with pytest.raises((CorruptData, PartialLoad), match="digest"):
        load(run, READING)


def test_a_directory_that_was_copied_without_its_log_keeps_its_signature(run, tmp_path):
    copy = shutil.copytree(attempt_of(run, 2), tmp_path / "copy")
    state = state_at(0)
    signing = Signing(trust=SignedBy(KEY))
    dcp.load(state, storage_reader=Reader(copy, signing=signing), no_dist=True)
    assert torch.equal(state["model"]["w"], state_at(2)["model"]["w"])
    with pytest.raises(dcp.CheckpointException, match="Untrusted"):
        dcp.load(
            state,
            storage_reader=Reader(copy, signing=Signing(trust=SignedBy(OTHER))),
            no_dist=True,
        )


def test_signed_with_digests_that_can_be_forged_is_refused(run, tmp_path):
    """As if the owner of the key had signed a checkpoint of weak digests by mistake."""
    save(tmp_path / "plain", PLAIN, 1)
    attempt = attempt_of(tmp_path / "plain", 1)
    manifest = find_seal((attempt / "manifest.json").read_bytes()).content
    (attempt / "manifest.json").write_bytes(
        seal(manifest, lambda body: SIGNING.sign("manifest.json", body))
    )
    with pytest.raises(Untrusted) as caught:
        open_checkpoint(open_store(str(attempt)), "", None, trust=SignedBy(KEY))
    assert kinds(caught) == {"weak_digest"}


def test_a_run_that_is_continued_stays_signed(run):
    save(run, SIGNED, 3)
    with CheckpointManager(run, SIGNED) as checkpoints:
        state = state_at(0)
        assert checkpoints.resume(state).step == 3
        checkpoints.save(4, state_at(4))
    assert load(run, READING) == 4


def test_records_that_the_policy_would_refuse_are_not_written(run, tmp_path):
    before = sorted((run / "log").iterdir())
    with pytest.raises(Untrusted, match="our own record"):
        save(run, Settings(mode=SaveMode.BLOCKING, signing=READING.signing), 3)
    with pytest.raises(Untrusted, match="our own record"):
        save(run, Settings(mode=SaveMode.BLOCKING, signing=Signing(OTHER, SignedBy(KEY))), 3)
    assert sorted((run / "log").iterdir()) == before


def test_whoever_writes_unsigned_into_a_signed_run_is_seen(run):
    log = RunLog(open_store(str(run)))
    pin(log, 2)
    with pytest.raises(Untrusted, match="000000000004"):
        load(run, READING)


def test_retention_goes_on_in_a_signed_run(tmp_path):
    settings = Settings(mode=SaveMode.BLOCKING, signing=SIGNING, max_checkpoint_keep=1)
    save(tmp_path, settings, 1, 2, 3)
    with CheckpointManager(tmp_path, READING) as checkpoints:
        assert checkpoints.steps() == [3]


def test_the_door_of_plain_dcp_signs_and_asks(tmp_path):
    root = str(tmp_path)
    dcp.save(state_at(1), storage_writer=Writer(root, step=1, signing=SIGNING), no_dist=True)
    state = state_at(0)
    dcp.load(state, storage_reader=Reader(root, signing=SIGNING), no_dist=True)
    assert torch.equal(state["model"]["w"], state_at(1)["model"]["w"])
    with pytest.raises(dcp.CheckpointException, match="another signing"):
        dcp.save(state_at(2), storage_writer=Writer(root, step=2), no_dist=True)
    forget_incarnations()
    assert load(tmp_path, READING) == 1


def test_reshard_asks_of_its_source_and_signs_its_target(run, tmp_path):
    source, target = open_store(str(run)), open_store(str(tmp_path / "target"))
    (located,) = find_checkpoints(source, "latest", SignedBy(KEY))
    options = ReshardOptions(trust=SignedBy(KEY), signing=Signing(OTHER, SignedBy(OTHER)))
    reshard(source, located, target, TargetMesh.parse("tp=2"), options)
    (written,) = find_checkpoints(target, "latest", SignedBy(OTHER))
    assert verify_checkpoint(target, written, trust=SignedBy(OTHER)).is_whole
    options = ReshardOptions(trust=SignedBy(OTHER))
    with pytest.raises(Untrusted):
        reshard(source, located, target, TargetMesh.parse("tp=2"), options)


def test_keys_show_no_secret_and_must_be_keys():
    assert "0123456789" not in repr(KEY) + repr(SIGNED) + repr(SignedBy(KEY))
    for make in (
        lambda: HmacKey("Team A", bytes(32)),
        lambda: HmacKey("a", b"short"),
        lambda: SignedBy(),
        lambda: SignedBy(KEY, HmacKey("team-a", OTHER.secret)),
    ):
        with pytest.raises(ConfigurationError):
            make()
    assert Anyone() == Signing().trust
    assert HmacKey.generate("a").secret != HmacKey.generate("a").secret
