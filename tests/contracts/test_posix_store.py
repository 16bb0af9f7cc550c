"""A directory keeps the contract; what only file systems can get wrong is below it."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

import pytest

from dcp_resume.errors import (
    KeyExists,
    KeyNotFound,
    OutcomeUnknown,
    StorageDenied,
    StorageError,
    StorageFull,
    UnsupportedStore,
)
from dcp_resume.storage import open_store, posix_files
from dcp_resume.storage.posix_store import PosixStore
from tests.contracts.object_store import ObjectStoreContract, views


class TestPosixStore(ObjectStoreContract):
    race_rounds = 100

    @pytest.fixture(autouse=True)
    def _root(self, tmp_path: Path):
        self.root = tmp_path / "root" / "below"

    @pytest.fixture
    def store(self):
        return open_store(f"file://{self.root}")

    def outside_keys(self):
        return {
            str(path.relative_to(self.root)): path.stat().st_size
            for path in self.root.rglob("*")
            if path.is_file()
        }

    def outside_read(self, key):
        return (self.root / key).read_bytes()

    def outside_put(self, name, content):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(content)

    def leave_unfinished(self, key):
        self.outside_put(f"{Path(key).parent}/.tmp-{secrets.token_hex(8)}", b"half")


@pytest.fixture
def store(tmp_path: Path) -> PosixStore:
    return PosixStore(tmp_path / "root")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def fail(code: int):
    def failing(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return failing


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_reading_an_absent_root_creates_nothing(store, root):
    assert list(store.list("")) == []
    assert list(store.unfinished("")) == []
    with pytest.raises(KeyNotFound):
        store.size("k")
    store.delete(["d/k"])
    store.close()
    assert not root.exists()


def test_prepare_syncs_the_parent_of_every_new_directory(store, root, monkeypatch):
    synced = []
    monkeypatch.setattr(posix_files, "fsync_directory", synced.append)
    store.prepare("a/b/")
    assert synced == [str(root.parent), str(root), str(root / "a")]
    assert (root / "a" / "b").is_dir()


def test_delete_prunes_empty_directories_but_not_the_root(store, root):
    store.write("a/b/c/k", [])
    store.write("a/k", [])
    store.delete(["a/b/c/k"])
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == ["a", "a/k"]
    store.delete(["a/k"])
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("write", [PosixStore.create, lambda s, k, d: s.write(k, views(d))])
@pytest.mark.parametrize(
    ("call", "code", "kind"),
    [
        ("writev", errno.ENOSPC, StorageFull),
        ("writev", errno.EDQUOT, StorageFull),
        ("fsync", errno.EIO, StorageError),
        ("open", errno.EROFS, StorageDenied),
        ("open", errno.EACCES, StorageDenied),
    ],
)
def test_failed_write_leaves_nothing(store, root, monkeypatch, write, call, code, kind):
    store.prepare("")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail(code))
        with pytest.raises(kind, match="'k'"):
            write(store, "k", b"content")
    assert leftovers(root) == []


def test_failed_fsync_is_not_repeated(store, monkeypatch):
    calls = []

    def failing(descriptor):
        calls.append(descriptor)
        raise OSError(errno.EIO, "I/O error")

    store.prepare("")
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError):
        store.write("k", views(b"x"))
    assert len(calls) == 1


def test_short_writes_are_continued(store, root, monkeypatch):
    whole = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, batch: whole(fd, [batch[0][:3]]))
    assert store.write("k", views(b"abcdefgh", b"", b"ij", b"klmno")) == 15
    assert (root / "k").read_bytes() == b"abcdefghijklmno"


def test_short_reads_are_continued(store, monkeypatch):
    store.write("k", views(b"abcdefgh"))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: whole(fd, [into[0][:3]], at))
    assert store.read("k", max_bytes=8) == b"abcdefgh"


def test_create_without_hard_links(store, root, monkeypatch):
    monkeypatch.setattr(os, "link", fail(errno.EPERM))
    store.create("k", b"first")
    with pytest.raises(KeyExists):
        store.create("k", b"second")
    assert [path.read_bytes() for path in leftovers(root)] == [b"first"]


def test_create_without_any_exclusive_operation(store, root, monkeypatch):
    monkeypatch.setattr(os, "link", fail(errno.ENOTSUP))
    monkeypatch.setattr(posix_files.ctypes, "CDLL", lambda *_args, **_kwargs: object())
    with pytest.raises(UnsupportedStore, match="hard links"):
        store.create("k", b"first")
    assert leftovers(root) == []


def test_nfs_that_denies_its_own_link_is_believed_by_the_link_count(store, root, monkeypatch):
    link = os.link

    def repeated(source, target, **options):
        link(source, target, **options)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", repeated)
    store.create("k", b"ours")
    assert [path.read_bytes() for path in leftovers(root)] == [b"ours"]


def test_create_whose_directory_cannot_be_synced_is_of_unknown_outcome(store, monkeypatch):
    store.prepare("")
    monkeypatch.setattr(posix_files, "fsync_directory", fail(errno.EIO))
    with pytest.raises(OutcomeUnknown, match="'k'"):
        store.create("k", b"x")


def test_killed_between_link_and_unlink_shows_and_can_be_discarded(store, root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail(errno.EIO))
        store.create("d/k", b"x")
    (leftover,) = store.unfinished("d/")
    store.discard([leftover])
    assert [info.key for info in store.list("")] == ["d/k"]
    assert leftovers(root) == [root / "d" / "k"]


def test_links_out_of_the_root_are_not_listed(store, root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "k").write_bytes(b"x")
    store.write("a", [])
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "file").symlink_to(tmp_path / "elsewhere" / "k")
    assert [info.key for info in store.list("")] == ["a"]


def test_no_link_below_the_root_is_followed(store, root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "empty").mkdir(parents=True)
    (elsewhere / "k").write_bytes(b"theirs")
    store.write("a", [])
    (root / "out").symlink_to(elsewhere)
    (root / "file").symlink_to(elsewhere / "k")
    (root / "deep").mkdir()
    (root / "deep" / "out").symlink_to(elsewhere)
    for key in ("out/k", "deep/out/k"):
        for action in (
            lambda key: store.read(key, max_bytes=9),
            store.size,
            lambda key: store.write(key, [memoryview(b"ours")]),
            lambda key: store.create(key, b"ours"),
            lambda key: store.create(f"{key}-new", b"ours"),
            lambda key: store.prepare(key.removesuffix("k") + "new"),
            lambda key: store.delete([key]),
            lambda key: store.delete([key.removesuffix("k") + "empty/absent"]),
        ):
            with pytest.raises(StorageDenied, match="symbolic link"):
                action(key)
    with pytest.raises(KeyNotFound, match="symbolic link"):
        store.read("file", max_bytes=9)
    store.write("file", [memoryview(b"ours")])  # takes the link's place
    assert (root / "file").read_bytes() == b"ours"
    assert {p.name: p.is_file() and p.read_bytes() for p in elsewhere.iterdir()} == {
        "k": b"theirs",
        "empty": False,
    }


def test_the_root_itself_may_be_a_link(store, root, tmp_path):
    store.write("d/k", [memoryview(b"x")])
    (tmp_path / "link").symlink_to(root)
    again = PosixStore(tmp_path / "link")
    assert again.read("d/k", max_bytes=1) == b"x"
    again.delete(["d/k"])
    assert leftovers(root) == []


def test_every_failing_delete_is_tried(store, root, monkeypatch):
    for key in ("a", "b", "c"):
        store.write(key, [])
    unlink = os.unlink

    def picky(path):
        if path.endswith("/a"):
            raise OSError(errno.EACCES, "Permission denied")
        unlink(path)

    monkeypatch.setattr(os, "unlink", picky)
    with pytest.raises(StorageDenied, match="'a'"):
        store.delete(["a", "b", "c"])
    assert leftovers(root) == [root / "a"]
