import os

import pytest
from steadyhelm.errors import CorruptObjectError, ObjectMissingError, StoreError
from steadyhelm.store import read_all
from steadyhelm.store.folders import fetch_folder, put_folder
from steadyhelm.store.images import MAX_PENDING, get_image, put_image, putting_images
from steadyhelm.testing.memory_store import MemoryStore

# sha256 of b"abc", from FIPS 180-2
ABC = "images/ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_comes_back_file_by_file(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_bytes(b"{}")
    (source / "sub" / "weights.bin").write_bytes(b"w" * 100_000)
    (source / "empty").write_bytes(b"")
    store = MemoryStore()
    refs = put_folder(store, "run/model", source)
    assert [ref.key for ref in refs] == ["run/model/config.json", "run/model/empty", "run/model/sub/weights.bin"]
    target = tmp_path / "target"
    fetch_folder(store, refs, "run/model", target)
    fetch_folder(store, refs, "run/model", target)
    found = {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert found == {"config.json": b"{}", "sub/weights.bin": b"w" * 100_000, "empty": b""}


def test_a_damaged_object_is_not_written(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"123")
    store = MemoryStore()
    refs = put_folder(store, "run/model", source)
    store.damage("run/model/a", flip_bit=3)
    with pytest.raises(CorruptObjectError, match="run/model/a"):
        fetch_folder(store, refs, "run/model", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    with pytest.raises(CorruptObjectError, match="not under 'run/other'"):
        fetch_folder(store, refs, "run/other", tmp_path / "target")


def test_what_is_no_folder_of_files_is_refused(tmp_path):
    store = MemoryStore()
    with pytest.raises(StoreError, match="not a folder"):
        put_folder(store, "run/model", tmp_path / "none")
    with pytest.raises(StoreError, match="no file in it"):
        put_folder(store, "run/model", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="neither a file nor a folder"):
        put_folder(store, "run/model", tmp_path)


def test_an_image_is_stored_once_under_its_hash():
    store = MemoryStore()
    assert [put_image(store, b"abc") for _ in range(3)] == [ABC] * 3
    assert store.puts == [ABC]
    assert get_image(store, ABC) == b"abc"


def test_a_damaged_image_is_found_and_mended_by_the_next_put():
    store = MemoryStore()
    put_image(store, b"abc")
    store.damage(ABC, keep_bytes=2)
    with pytest.raises(CorruptObjectError, match="SHA-256"):
        get_image(store, ABC)
    put_image(store, b"abc")
    assert get_image(store, ABC) == b"abc"
    with pytest.raises(ObjectMissingError):
        get_image(store, "images/" + "0" * 64)


def test_many_images_are_put_side_by_side_and_are_all_there_behind():
    store = MemoryStore()
    data = [b"%d" % number for number in range(MAX_PENDING + 100)]
    with putting_images(store) as put:
        keys = [put(image) for image in data]
    assert [get_image(store, key) for key in keys] == data


@pytest.mark.parametrize("nth", [1, MAX_PENDING])
def test_an_image_that_cannot_be_put_ends_the_putting(nth):
    store = MemoryStore()
    store.fail("images/*", nth=nth, error=StoreError("full"))
    with pytest.raises(StoreError, match="full"), putting_images(store) as put:
        list(map(put, (b"%d" % number for number in range(nth + 2))))


def test_objects_that_are_read_side_by_side_come_in_order_and_verified():
    store = MemoryStore()
    refs = [store.put(f"run/{number}", b"%d" % number) for number in range(50)]
    assert [bytes(data) for data in read_all(store, refs)] == [b"%d" % number for number in range(50)]
    assert read_all(store, []) == []
    store.damage("run/30", flip_bit=0)
    with pytest.raises(CorruptObjectError, match="run/30"):
        read_all(store, refs)
