"""What every store must do, sentence by sentence of ``ObjectStore``; one subclass per backend.

The suite checks effects from outside, by ``outside_*``, which share no code with the store.
"""

from __future__ import annotations

import random
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from dcp_resume.errors import ConfigurationError, KeyExists, KeyNotFound, ShortRead, StorageError
from dcp_resume.storage import (
    ByteRange,
    ObjectInfo,
    ObjectStore,
    RangeRead,
    check_exclusive_create,
    read_each,
)

_BAD_KEYS = (
    *("", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "a/./b", ".hidden", "a/.tmp-x"),
    *("a b", "ä", "a\\b", "a\n", "a#b", "a?b", "a%2fb", "a*"),
)
_RACERS = 8


def views(*parts: bytes) -> list[memoryview]:
    return [memoryview(part) for part in parts]


def reads(size: int, *ranges: tuple[int, int]) -> list[RangeRead]:
    """Reads into one common memory of ``size`` bytes, each at the place of its range."""
    memory = memoryview(bytearray(size))
    return [RangeRead(ByteRange(*bounds), memory[slice(*bounds)]) for bounds in ranges]


class ObjectStoreContract:
    race_rounds = 25
    large_bytes = 3_000_000

    @abstractmethod
    def outside_keys(self) -> dict[str, int]:
        """Every object and every visible leftover in the store, with its size."""

    @abstractmethod
    def outside_read(self, key: str) -> bytes: ...

    @abstractmethod
    def outside_put(self, name: str, content: bytes) -> None:
        """Put an object there that need not have a key of ours."""

    @abstractmethod
    def leave_unfinished(self, key: str) -> None:
        """Leave behind what a writer leaves that was killed while it wrote ``key``."""

    # --- create ---

    def test_create_stores_exactly_the_bytes(self, store: ObjectStore):
        store.create("log/000000000001.json", b"{}")
        assert self.outside_read("log/000000000001.json") == b"{}"
        assert self.outside_keys() == {"log/000000000001.json": 2}

    def test_second_create_is_refused_and_changes_nothing(self, store: ObjectStore):
        store.create("k", b"first")
        with pytest.raises(KeyExists, match="'k'") as caught:
            store.create("k", b"second")
        assert (caught.value.key, caught.value.url) == ("k", store.url)
        assert self.outside_read("k") == b"first"
        assert list(store.unfinished("")) == []

    def test_create_refuses_a_key_that_was_written(self, store: ObjectStore):
        store.write("k", views(b"w"))
        with pytest.raises(KeyExists):
            store.create("k", b"c")

    def test_create_again_after_delete(self, store: ObjectStore):
        store.create("d/k", b"1")
        store.delete(["d/k"])
        store.create("d/k", b"2")
        assert self.outside_read("d/k") == b"2"

    def test_empty_create_is_exclusive_too(self, store: ObjectStore):
        store.create("empty", b"")
        with pytest.raises(KeyExists):
            store.create("empty", b"")
        assert self.outside_keys() == {"empty": 0}

    def test_racing_creates_have_one_winner(self, store: ObjectStore):
        with ThreadPoolExecutor(_RACERS) as pool:
            for turn in range(self.race_rounds):
                key = f"race/{turn}"
                gate = threading.Barrier(_RACERS)

                def contend(name: int, key: str = key, gate: threading.Barrier = gate) -> bytes:
                    content = b"%d" % name * 1000
                    gate.wait()
                    try:
                        store.create(key, content)
                    except KeyExists:
                        return b""
                    return content

                winners = [content for content in pool.map(contend, range(_RACERS)) if content]
                assert winners == [self.outside_read(key)], f"round {turn}"

    def test_probe_accepts_the_store_and_cleans_up(self, store: ObjectStore):
        check_exclusive_create(store, "probe/")
        assert self.outside_keys() == {}

    # --- write ---

    def test_write_joins_its_buffers(self, store: ObjectStore):
        parts = views(b"ab", b"", b"c", b"", b"defg")
        assert store.write("d/e/f", parts) == 7
        assert self.outside_read("d/e/f") == b"abcdefg"

    def test_write_of_nothing_makes_an_empty_object(self, store: ObjectStore):
        assert store.write("none", []) == 0
        assert store.write("empty", views(b"", b"")) == 0
        assert self.outside_keys() == {"none": 0, "empty": 0}
        assert store.read("empty", max_bytes=0) == b""
        assert store.size("none") == 0

    def test_write_replaces(self, store: ObjectStore):
        store.write("k", views(b"long content"))
        store.write("k", views(b"new"))
        assert self.outside_read("k") == b"new"

    @pytest.mark.parametrize("share", [1, 50])
    def test_write_uses_up_buffers_that_share_one_memory(self, store: ObjectStore, share: int):
        content = random.Random(3).randbytes(self.large_bytes // share)
        memory = bytearray(len(content) // 7 + 1)

        def windows():
            for start in range(0, len(content), len(memory)):
                piece = content[start : start + len(memory)]
                memory[: len(piece)] = piece
                yield memoryview(memory)[: len(piece)]
                memory[:] = bytes(len(memory))

        assert store.write("k", windows(), size=len(content)) == len(content)
        assert self.outside_read("k") == content

    @pytest.mark.parametrize("found", [0, 1, 3])
    def test_write_refuses_another_size_than_announced(self, store: ObjectStore, found: int):
        with pytest.raises(ValueError, match=r"bytes"):
            store.write("k", iter(views(b"a" * found)), size=2)
        assert self.outside_keys() == {}

    def test_write_passes_on_what_its_buffers_raise(self, store: ObjectStore):
        def windows():
            yield memoryview(b"a")
            raise LookupError("no more")

        with pytest.raises(LookupError, match="no more"):
            store.write("k", windows(), size=2)
        assert self.outside_keys() == {}

    def test_large_write_from_many_odd_buffers_and_back(self, store: ObjectStore):
        generator = random.Random(7)
        content = generator.randbytes(self.large_bytes)
        parts, done = [], 0
        while done < len(content):  # more buffers than IOV_MAX, of sizes that fit nothing
            size = generator.choice((1, 7, 997, 4099, self.large_bytes // 50 + 1))
            parts.append(memoryview(content)[done : done + size])
            done += size
        assert store.write("large", parts) == len(content)
        assert self.outside_read("large") == content
        cuts = sorted(generator.sample(range(1, len(content)), 40))
        bounds = list(zip([0, *cuts], [*cuts, len(content)], strict=True))
        generator.shuffle(bounds)
        wanted = reads(len(content), *bounds)
        store.read_into("large", wanted)
        for read in wanted:
            assert bytes(read.into) == content[read.byte_range.start : read.byte_range.stop]
        whole = reads(len(content), (0, len(content)))
        store.read_into("large", whole)
        assert whole[0].into == content
        assert list(store.unfinished("")) == []

    def test_readers_never_see_a_part_of_an_overwrite(self, store: ObjectStore):
        contents = [bytes([letter]) * 200_000 for letter in b"ab"]
        store.write("k", views(contents[0]))
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(
                lambda: [store.write("k", views(contents[turn % 2])) for turn in range(10)]
            )
            while not writing.done():
                assert store.read("k", max_bytes=200_000) in contents
            writing.result()

    # --- read ---

    @pytest.mark.parametrize("key", ["absent", "d/absent", "d"])
    def test_absent_key(self, store: ObjectStore, key: str):
        store.write("d/k", views(b"x"))
        with pytest.raises(KeyNotFound) as caught:
            store.read(key, max_bytes=10)
        assert caught.value.key == key
        with pytest.raises(KeyNotFound):
            store.size(key)
        with pytest.raises(KeyNotFound):
            store.read_into(key, reads(1, (0, 1)))

    def test_read_up_to_a_limit(self, store: ObjectStore):
        store.write("k", views(b"12345"))
        assert store.read("k", max_bytes=5) == b"12345"
        with pytest.raises(ShortRead) as caught:
            store.read("k", max_bytes=4)
        assert caught.value.found_bytes == 5
        assert store.read("k", max_bytes=99) == b"12345"

    def test_read_into_touching_overlapping_and_empty_ranges(self, store: ObjectStore):
        content = bytes(range(100))
        store.write("k", views(content))
        ranges = [(90, 100), (0, 10), (10, 20), (5, 15), (50, 50), (100, 100), (99, 100), (0, 10)]
        wanted = [RangeRead(ByteRange(*b), memoryview(bytearray(b[1] - b[0]))) for b in ranges]
        store.read_into("k", wanted)
        for read in wanted:
            assert read.into == content[read.byte_range.start : read.byte_range.stop]
        store.read_into("k", [])

    def test_one_memory_serves_ranges_that_are_read_one_by_one(self, store: ObjectStore):
        store.write("k", views(b"0123456789"))
        memory = memoryview(bytearray(4))
        found: list[bytes] = []

        def requests() -> Iterator[RangeRead]:
            for start, stop in ((6, 10), (0, 3), (3, 3), (2, 6)):
                into = memory[: stop - start]
                yield RangeRead(ByteRange(start, stop), into)
                found.append(bytes(into))

        read_each(store, "k", requests())
        assert found == [b"6789", b"012", b"", b"2345"]
        with pytest.raises(ShortRead):
            read_each(store, "k", [RangeRead(ByteRange(8, 12), memory)])
        with pytest.raises(KeyNotFound):
            read_each(store, "absent", [RangeRead(ByteRange(0, 4), memory)])

    @pytest.mark.parametrize("bounds", [(4, 6), (5, 6), (50, 60), (0, 6)])
    def test_range_past_the_end(self, store: ObjectStore, bounds: tuple[int, int]):
        store.write("k", views(b"12345"))
        with pytest.raises(ShortRead) as caught:
            store.read_into("k", reads(60, (0, 2), bounds))
        assert caught.value.found_bytes < caught.value.expected_bytes

    def test_size_follows_a_change_from_outside(self, store: ObjectStore):
        store.write("k", views(b"1"))
        assert store.size("k") == 1
        self.outside_put("k", b"12345")
        assert store.size("k") == 5
        assert store.read("k", max_bytes=5) == b"12345"

    # --- list ---

    def test_list_is_a_sorted_flat_keyspace(self, store: ObjectStore):
        keys = ["B", "a-b/x", "a.b/y", "a.c", "a/x", "a/x-1", "a/x0", "a/y/z/1", "a0", "ab"]
        for key in reversed(keys):
            store.write(key, views(key.encode()))

        def listed(prefix: str, start_after: str = "") -> list[str]:
            return [info.key for info in store.list(prefix, start_after=start_after)]

        assert listed("") == keys
        for prefix in ("a", "a/", "a/x", "a/y", "a/y/z/", "a.", "a-b/x", "zz", "zz/", "a/x/", "B"):
            assert listed(prefix) == [key for key in keys if key.startswith(prefix)], prefix
        for after in (*keys, "a", "a-", "a/", "a/x-0", "zz", "A", "a/y"):
            assert listed("", after) == [key for key in keys if key > after], after
            inside = [key for key in keys if key > after and key.startswith("a/")]
            assert listed("a/", after) == inside, after

    def test_list_tells_size_and_age(self, store: ObjectStore):
        before_s = time.time()
        store.write("k", views(b"123"))
        (info,) = store.list("")
        assert (info.key, info.size) == ("k", 3)
        assert before_s - 5 < info.modified_s < time.time() + 5

    def test_list_sees_changes_from_outside(self, store: ObjectStore):
        assert list(store.list("log/")) == []
        self.outside_put("log/1", b"1")
        assert [info.key for info in store.list("log/")] == ["log/1"]
        store.delete(["log/1"])
        assert list(store.list("log/")) == []

    def test_list_passes_over_foreign_names(self, store: ObjectStore):
        store.write("d/k", views(b"1"))
        self.outside_put("d/not a key", b"2")
        assert [info.key for info in store.list("")] == ["d/k"]

    def test_list_of_many(self, store: ObjectStore):
        keys = [f"d/{number:05d}" for number in range(1050)]
        with ThreadPoolExecutor(_RACERS) as pool:
            list(pool.map(lambda key: self.outside_put(key, b""), keys))
        assert [info.key for info in store.list("d/")] == keys
        store.delete(keys)
        assert self.outside_keys() == {}

    # --- delete ---

    def test_delete_takes_absent_keys_and_leaves_the_rest(self, store: ObjectStore):
        for key in ("a/1", "a/2", "b/1"):
            store.write(key, views(b"x"))
        store.delete(key for key in ("a/1", "a/absent", "absent/absent", "b/1", "a"))
        assert self.outside_keys() == {"a/2": 1}
        store.delete([])

    def test_writes_survive_deletes_around_them(self, store: ObjectStore):
        """Pruned directories must not fail a write that is under way in them."""
        stop = threading.Event()

        def churn() -> None:
            while not stop.is_set():
                store.write("d/e/churn", views(b"x"))
                store.delete(["d/e/churn"])

        with ThreadPoolExecutor(2) as pool:
            churning = pool.submit(churn)
            try:
                for turn in range(20):
                    store.prepare("d/e")
                    store.create("d/e/k", b"%d" % turn)
                    assert store.read("d/e/k", max_bytes=9) == b"%d" % turn
                    store.delete(["d/e/k"])
            finally:
                stop.set()
            churning.result()
        assert self.outside_keys() == {}

    # --- prepare, unfinished, discard ---

    @pytest.mark.parametrize("prefix", ["", "p", "p/q/", "p/q/r"])
    def test_prepare_makes_no_object(self, store: ObjectStore, prefix: str):
        store.prepare(prefix)
        store.prepare(prefix)
        assert list(store.list("")) == []
        store.write("p/q/r/k", views(b"1"))

    def test_unfinished_and_discard(self, store: ObjectStore):
        store.write("a/1/k", views(b"kept"))
        for key in ("a/1/x", "a/2/x", "b/x"):
            self.leave_unfinished(key)
        if not list(store.unfinished("")):
            pytest.skip("this backend leaves nothing unfinished")
        assert [info.key for info in store.list("")] == ["a/1/k"]
        assert len(list(store.unfinished(""))) == 3
        assert len(list(store.unfinished("a/"))) == 2
        (info,) = store.unfinished("a/1/")
        assert abs(info.modified_s - time.time()) < 10
        store.discard([info, info])
        store.discard([info])
        assert len(list(store.unfinished(""))) == 2
        assert self.outside_read("a/1/k") == b"kept"
        store.discard(store.unfinished(""))
        assert list(store.unfinished("")) == []

    def test_discard_takes_nothing_else(self, store: ObjectStore):
        store.write("k", views(b"kept"))
        with pytest.raises(ValueError, match="'k'"):
            store.discard([ObjectInfo("k", 4, 0.0)])
        assert self.outside_read("k") == b"kept"

    # --- keys, closing ---

    @pytest.mark.parametrize("key", _BAD_KEYS)
    def test_bad_keys_touch_nothing(self, store: ObjectStore, key: str):
        calls = [
            lambda: store.create(key, b""),
            lambda: store.write(key, []),
            lambda: store.read(key, max_bytes=1),
            lambda: store.read_into(key, []),
            lambda: store.size(key),
            lambda: store.delete(["fine", key]),
        ]
        store.write("fine", [])
        for call in calls:
            with pytest.raises(ConfigurationError):
                call()
        assert self.outside_keys() == {"fine": 0}

    @pytest.mark.parametrize("prefix", ["/", "..", "../", "a//", "a/../", "./", "a b"])
    def test_bad_prefixes(self, store: ObjectStore, prefix: str):
        for call in (store.list, store.unfinished, store.prepare):
            with pytest.raises(ConfigurationError):
                call(prefix)
        with pytest.raises(ConfigurationError):
            store.list("", start_after=prefix)

    def test_nothing_works_after_close(self, store: ObjectStore):
        store.write("k", [])
        store.close()
        store.close()
        calls = [
            lambda: store.create("k2", b""),
            lambda: store.write("k2", []),
            lambda: store.read("k", max_bytes=1),
            lambda: store.read_into("k", []),
            lambda: store.size("k"),
            lambda: list(store.list("")),
            lambda: store.delete(["k"]),
            lambda: store.prepare("p"),
            lambda: list(store.unfinished("")),
        ]
        for call in calls:
            with pytest.raises(StorageError, match="closed"):
                call()

    def test_satisfies_the_protocol(self, store: ObjectStore):
        assert isinstance(store, ObjectStore)
