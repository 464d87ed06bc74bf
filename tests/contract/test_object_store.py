"""What every object store must do. A new store joins by a branch in ``store`` and its name in the fixture's params.

The S3 store runs against a real server (``make test-store``), see ``s3_endpoint`` in the conftest.
"""

import errno
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from steadyhelm.data.types import ObjectRef
from steadyhelm.errors import ConfigError, CorruptObjectError, ObjectExistsError, ObjectMissingError, StoreError
from steadyhelm.store import LocalStore, ObjectStore, open_store
from steadyhelm.store.local import STALE_S
from steadyhelm.store.s3 import S3Store
from steadyhelm.testing.memory_store import InjectedCrash, MemoryStore

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of threads
ON_FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.store)])
def store(request, tmp_path) -> ObjectStore:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_uri"))
    return open_store(str(tmp_path / "root"))


def test_a_put_object_reads_back_with_its_size_and_checksum(store):
    ref = store.put("run/a", b"Steadyhelm")
    assert ref == ObjectRef(key="run/a", num_bytes=10, xxh3="6b5edff6bcfe9c3769eba901f67c1a52")
    assert bytes(store.get("run/a")) == b"Steadyhelm"
    assert bytes(store.read(ref)) == b"Steadyhelm"


def test_parts_are_written_one_behind_the_other(store):
    numbers = np.arange(3, dtype=np.int32)
    parts = [b"ab", memoryview(numbers), b"", bytearray(b"c"), memoryview(np.empty(0, np.float32))]
    ref = store.put("run/a", parts)
    assert bytes(store.read(ref)) == b"ab" + bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]) + b"c"
    assert store.put("run/b", store.get("run/a")) == ObjectRef(key="run/b", num_bytes=15, xxh3=ref.xxh3)


def test_thousands_of_parts_make_one_object(store):
    ref = store.put("run/a", [bytes([n % 256]) for n in range(3000)])
    assert bytes(store.read(ref)) == bytes(n % 256 for n in range(3000))


def test_an_empty_object_is_an_object(store):
    ref = store.put("run/empty", b"")
    assert ref == ObjectRef(
        key="run/empty", num_bytes=0, xxh3="99aa06d3014798d86001c324468d497f"
    )  # xxHash's own vector
    assert bytes(store.read(ref)) == b""
    assert store.exists("run/empty")


def test_big_objects_come_back_whole_and_read_only(store):
    data = np.random.default_rng(0).bytes((9 << 20) + 7)
    ref = store.put("run/big", data)
    view = store.read(ref)
    assert view.nbytes == 9437191
    assert view == data
    assert view.readonly
    assert store.get("run/big").readonly


def test_a_plain_put_replaces_and_a_conditional_one_does_not(store):
    store.put("run/a", b"1", if_absent=True)
    with pytest.raises(ObjectExistsError, match="'run/a'"):
        store.put("run/a", b"2", if_absent=True)
    assert bytes(store.get("run/a")) == b"1"
    store.put("run/a", b"3")
    assert bytes(store.get("run/a")) == b"3"
    store.delete("run/a")
    store.put("run/a", b"4", if_absent=True)
    assert bytes(store.get("run/a")) == b"4"


def test_a_missing_object_is_missing(store):
    ref = ObjectRef(key="run/none", num_bytes=1, xxh3="0" * 32)
    store.put("run/folder/a", b"1")
    for key in ("run/none", "run/folder", "run/folder/a/b"):
        assert not store.exists(key)
        with pytest.raises(ObjectMissingError, match=key):
            store.get(key)
        with pytest.raises(ObjectMissingError):
            store.get_range(key, 0, 0)
        store.delete(key)
    with pytest.raises(ObjectMissingError):
        store.read(ref)
    with pytest.raises(ObjectMissingError):
        store.flush(["run/none"])
    assert bytes(store.get("run/folder/a")) == b"1"


def test_flush_takes_objects_in_any_folder(store):
    store.put("run/a/1", b"1")
    store.put("run/b/2", b"2")
    store.flush(["run/a/1", "run/b/2"])
    store.flush([])


def test_bytes_that_do_not_match_the_reference_are_corrupt(store):
    ref = store.put("run/a", b"0123456789")
    store.put("run/a", b"0123456780")
    with pytest.raises(CorruptObjectError, match=r"'run/a' .*checksum .*damaged .*resume goes on"):
        store.read(ref)
    store.put("run/a", b"012345678")
    with pytest.raises(CorruptObjectError, match="9 bytes instead of 10"):
        store.read(ref)


def test_ranges_are_exact_or_refused(store):
    store.put("run/a", b"0123456789")
    assert store.get_range("run/a", 0, 10) == b"0123456789"
    assert store.get_range("run/a", 3, 4) == b"3456"
    assert store.get_range("run/a", 10, 0) == b""
    for start, length in ((3, 8), (11, 0), (-1, 2), (0, -1)):
        with pytest.raises(StoreError, match="has 10 bytes"):
            store.get_range("run/a", start, length)


def test_listing_is_sorted_by_bytes_across_folders_and_takes_any_prefix(store):
    keys = ["r/a", "r/a-b/1", "r/a.b", "r/ab/c", "r/ab/c-d/e", "r/é", "r2/z", "r/B", "r/a0"]
    for key in keys:
        store.put(key, b"x")
    assert list(store.list("")) == ["r/B", "r/a", "r/a-b/1", "r/a.b", "r/a0", "r/ab/c", "r/ab/c-d/e", "r/é", "r2/z"]
    assert list(store.list("r/a")) == ["r/a", "r/a-b/1", "r/a.b", "r/a0", "r/ab/c", "r/ab/c-d/e"]
    assert list(store.list("r/ab/")) == ["r/ab/c", "r/ab/c-d/e"]
    assert list(store.list("r/ab/c-")) == ["r/ab/c-d/e"]
    assert list(store.list("r2")) == ["r2/z"]
    assert list(store.list("none/")) == []
    assert list(store.list("r/a/b")) == []


def test_a_deleted_object_is_gone_and_its_view_stays_valid(store):
    small, big = b"1" * 1000, b"2" * (5 << 20)
    store.put("run/deep/small", small)
    store.put("run/deep/big", big)
    views = store.get("run/deep/small"), store.get("run/deep/big")
    store.delete("run/deep/small")
    store.delete("run/deep/big")
    store.delete("run/deep/big")
    assert list(store.list("")) == []
    assert views == (small, big)
    store.put("run/deep", b"a key now, a folder before")


def test_a_view_of_a_replaced_object_keeps_the_old_bytes(store):
    store.put("run/a", b"1" * (5 << 20))
    view = store.get("run/a")
    store.put("run/a", b"2" * (5 << 20))
    assert view == b"1" * (5 << 20)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "..",
        "a/../b",
        "./a",
        "a/.",
        "a\0b",
        "a\nb",
        "a\\b",
        ".hidden/a",
        "a/" + "b" * 256,
        "a/" * 512 + "b",
        "a/\udc80",
    ],
)
def test_strings_that_are_no_keys_are_refused(store, key):
    for call in (
        lambda: store.put(key, b"x"),
        lambda: store.get(key),
        lambda: store.get_range(key, 0, 1),
        lambda: store.exists(key),
        lambda: store.delete(key),
        lambda: store.flush([key]),
    ):
        with pytest.raises(StoreError, match="cannot be the key"):
            call()
    if key and not key.endswith("/"):
        with pytest.raises(StoreError, match="cannot be the key"):
            list(store.list(key))


def test_keys_may_hold_dots_spaces_and_letters_of_any_script(store):
    for key in ("run/model/.gitattributes", "run/a b+c=d@e.json", "run/数字", "run/..a"):
        store.put(key, b"x")
        assert list(store.list(key)) == [key]


def test_no_key_is_a_folder_of_another(store):
    if isinstance(store, S3Store) and "STEADYHELM_TEST_S3_ENDPOINT" in os.environ:
        pytest.skip("most S3 servers have no folders and take both keys")
    store.put("run/a", b"1")
    for if_absent in (False, True):
        with pytest.raises(StoreError, match="another key"):
            store.put("run/a/b", b"2", if_absent=if_absent)
        with pytest.raises(StoreError, match="another key") as raised:
            store.put("run", b"3", if_absent=if_absent)
        assert not isinstance(raised.value, ObjectExistsError)
    assert list(store.list("")) == ["run/a"]


def test_of_eight_racing_threads_one_creates(store):
    for turn in range(30):
        barrier = threading.Barrier(8)

        def create(writer, turn=turn, barrier=barrier):
            barrier.wait()
            try:
                store.put(f"run/{turn}", bytes([writer]) * 1000, if_absent=True)
            except ObjectExistsError:
                return None
            return writer

        with ThreadPoolExecutor(8) as pool:
            winners = [writer for writer in pool.map(create, range(8)) if writer is not None]
        assert len(winners) == 1
        assert bytes(store.get(f"run/{turn}")) == bytes(winners) * 1000


def test_readers_never_see_a_part_of_an_object(store):
    """Four objects are replaced over and over; whoever reads sees one writer's bytes, whole."""
    size, stop, seen = 300_000, threading.Event(), []

    def read():
        while not stop.is_set():
            for key in store.list("run/"):
                data = bytes(store.get(key))
                seen.append((len(data), len(set(data))))

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        ends = time.monotonic() + 60
        for turn in itertools.count():
            store.put(f"run/{turn % 4}", bytes([turn % 256]) * size)
            if turn >= 79 and (len(seen) >= 8 or time.monotonic() > ends):  # on a busy machine readers start late
                break
        stop.set()
        for reader in readers:
            reader.result()
    assert set(seen) == {(size, 1)}


def test_a_full_store_says_so_and_keeps_what_it_has(store, tmp_path):
    if isinstance(store, MemoryStore):
        store.capacity_bytes = 1 << 20
        _fill(store)
        return
    if isinstance(store, S3Store):
        pytest.skip("how a full server answers is a test of s3 faults")
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system needs mount")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        _fill(LocalStore(folder))
        assert list((folder / ".staging").iterdir()) == []
    finally:
        subprocess.run(["umount", folder], check=True)


def _fill(store):
    ref = store.put("run/first", b"1" * 500_000)
    for if_absent in (False, True):
        with pytest.raises(StoreError, match=r"'run/second'.* full: free some space"):
            store.put("run/second", b"2" * 700_000, if_absent=if_absent)
    assert list(store.list("")) == ["run/first"]
    assert len(store.read(ref)) == 500_000
    store.put("run/third", b"3" * 100_000)


def test_of_eight_racing_processes_one_creates(tmp_path):
    results, start = ON_FORK.SimpleQueue(), ON_FORK.Barrier(8)

    def create(writer):
        store = open_store(str(tmp_path))
        won = []
        for turn in range(20):
            start.wait(30)
            try:
                store.put(f"run/{turn}", bytes([writer]) * 1000, if_absent=True)
                won.append(turn)
            except ObjectExistsError:
                pass
        results.put((writer, won))

    writers = [ON_FORK.Process(target=create, args=(n,)) for n in range(8)]
    for writer in writers:
        writer.start()
    outcome = dict(results.get() for _ in writers)
    for writer in writers:
        writer.join(30)
    assert sorted(turn for won in outcome.values() for turn in won) == list(range(20))
    store = open_store(str(tmp_path))
    for writer, won in outcome.items():
        assert all(bytes(store.get(f"run/{turn}")) == bytes([writer]) * 1000 for turn in won)


def test_a_killed_writer_leaves_whole_objects_and_old_left_overs_go_away(tmp_path):
    size = 8 << 20

    def write():
        store = LocalStore(tmp_path)
        for turn in range(1000):
            store.put(f"run/{turn % 3}", bytes([turn % 256]) * size)

    for delay in (0.05, 0.08, 0.11, 0.2):
        writer = ON_FORK.Process(target=write)
        writer.start()
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(30)
        store = LocalStore(tmp_path)
        for key in store.list(""):
            assert key.startswith("run/")
            data = store.get(key)
            assert data.nbytes == size
            assert data == bytes([data[0]]) * size
    (tmp_path / ".staging").mkdir(exist_ok=True)
    old = tmp_path / ".staging" / "other-1-0-0"
    old.write_bytes(b"x")
    young = tmp_path / ".staging" / "other-2-0-0"
    young.write_bytes(b"x")
    os.utime(old, (time.time() - STALE_S - 10,) * 2)
    LocalStore(tmp_path)
    assert not old.exists()
    assert young.exists()


def test_a_writer_whose_staged_file_was_cleaned_away_stages_it_again(tmp_path):
    class Sleepy(LocalStore):
        """Sleeps after staging for so long that a clean-up takes the file and its folders."""

        slept = False

        def _name(self, staged, path, *, if_absent):
            if not self.slept:
                self.slept = True
                staged.unlink()
                shutil.rmtree(self.root)
            super()._name(staged, path, if_absent=if_absent)

    store = Sleepy(tmp_path / "root")
    ref = store.put("run/a", b"123", if_absent=True)
    assert bytes(store.read(ref)) == b"123"
    assert list((tmp_path / "root" / ".staging").iterdir()) == []


def test_a_file_that_may_not_grow_is_reported_with_its_limit(tmp_path):
    """The limit on file sizes stands for a full disk where nothing can be mounted: the write ends in the middle."""
    answers = ON_FORK.SimpleQueue()

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            LocalStore(tmp_path).put("run/a", b"1" * 200_000)
            answers.put("no error")
        except StoreError as error:
            answers.put(str(error))

    writer = ON_FORK.Process(target=write)
    writer.start()
    message = answers.get()
    writer.join(30)
    assert "cannot write 'run/a'" in message
    assert "ulimit -f" in message
    assert list(LocalStore(tmp_path).list("")) == []
    assert list((tmp_path / ".staging").iterdir()) == []


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.EROFS, "read-only"), (errno.EACCES, "permission is denied"), (errno.ENOSPC, "disk is full")],
)
def test_each_system_error_is_a_store_error_with_place_and_remedy(tmp_path, code, remedy):
    class Failing(LocalStore):
        def _name(self, staged, path, *, if_absent):
            raise OSError(code, os.strerror(code))

    with pytest.raises(StoreError, match=rf"cannot write 'run/a' in file:///.*{remedy}.*") as raised:
        Failing(tmp_path).put("run/a", b"1")
    assert type(raised.value) is StoreError
    assert list((tmp_path / ".staging").iterdir()) == []


def test_a_folder_that_may_not_be_written_is_reported(tmp_path, tmp_path_factory):
    folder = tmp_path / "root"
    LocalStore(folder).put("run/a", b"1")
    answers = ON_FORK.SimpleQueue()

    def write():
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        store = LocalStore(folder)
        for call in (lambda: store.put("run/b", b"2"), lambda: store.get("run/a"), lambda: store.delete("run/a")):
            try:
                answers.put(bytes(call() or b"").decode())
            except StoreError as error:
                answers.put(str(error))

    base = tmp_path_factory.getbasetemp()
    for parent in (tmp_path, *tmp_path.parents):  # pytest makes its own folders for its user alone
        if parent.is_relative_to(base) or parent.name.startswith("pytest-of-"):
            parent.chmod(0o755)
    for made in (folder, folder / "run", folder / ".staging"):
        made.chmod(0o555)
    writer = ON_FORK.Process(target=write)
    writer.start()
    put, get, delete = answers.get(), answers.get(), answers.get()
    writer.join(30)
    for made in (folder, folder / "run", folder / ".staging"):
        made.chmod(0o755)
    assert "cannot write 'run/b'" in put
    assert "permission is denied" in put
    assert get == "1"
    assert "cannot delete 'run/a'" in delete


def test_a_store_below_a_file_is_reported(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StoreError, match="a file, not a folder"):
        open_store(str(tmp_path / "file")).put("run/a", b"1")


def test_opening_creates_nothing(tmp_path):
    store = open_store(str(tmp_path / "root"))
    assert list(store.list("")) == []
    assert not store.exists("run/a")
    assert not (tmp_path / "root").exists()


def test_uris_name_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store("runs of mine")
    assert store.uri == f"file://{tmp_path}/runs%20of%20mine"
    store.put("run/a", b"1")
    monkeypatch.chdir("/")
    assert bytes(open_store(store.uri).get("run/a")) == b"1"
    assert bytes(open_store(f"file://localhost{tmp_path}/runs%20of%20mine").get("run/a")) == b"1"


@pytest.mark.parametrize("uri", ["", "s3://", "http://host/x", "file://host/x", "file://runs"])
def test_uris_of_other_kinds_are_refused(uri):
    with pytest.raises(ConfigError, match=r"store\.uri"):
        open_store(uri)


def test_injected_faults_strike_before_or_after_the_nth_put():
    store = MemoryStore()
    store.fail("run/log/*", nth=2, when="before")
    store.fail("run/log/*", nth=3, when="after")
    store.put("run/log/1", b"1")
    store.put("run/other", b"x")
    with pytest.raises(InjectedCrash, match="before put 2"):
        store.put("run/log/2", b"2")
    with pytest.raises(InjectedCrash, match="after put 3"):
        store.put("run/log/3", b"3")
    store.put("run/log/4", b"4")
    assert store.puts == ["run/log/1", "run/other", "run/log/3", "run/log/4"]
    other = store.copy()
    other.damage("run/log/4", flip_bit=0)
    assert bytes(other.get("run/log/4")) == b"5"
    assert bytes(store.get("run/log/4")) == b"4"


def test_the_store_imports_without_torch():
    script = (
        "import sys, steadyhelm.store.log, steadyhelm.store.codec, steadyhelm.store.folders, steadyhelm.store.liveness"
    )
    found = subprocess.run(
        [sys.executable, "-c", f"{script}; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert found.stdout == "False\n", found.stderr


def test_a_store_travels_to_another_process(tmp_path):
    store = LocalStore(tmp_path)
    store.put("run/a", b"1")
    with ON_FORK.Pool(1) as pool:
        assert pool.apply(LocalStore.get_range, (store, "run/a", 0, 1)) == b"1"
