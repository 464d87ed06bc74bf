import time

import pytest
from steadyhelm.errors import ObjectExistsError, StoreError
from steadyhelm.store import LocalStore
from steadyhelm.store.probe import require_one_winner
from steadyhelm.testing.memory_store import MemoryStore


class Ignorant(MemoryStore):
    """Takes every put, as a server does that does not know If-None-Match."""

    def put(self, key, data, *, if_absent=False):
        return super().put(key, data)


class Racy(MemoryStore):
    """Looks first and writes then, as a server without a lock does."""

    def put(self, key, data, *, if_absent=False):
        if if_absent and self.exists(key):
            raise ObjectExistsError(key)
        time.sleep(0.001)
        return super().put(key, data)


class Forgetful(MemoryStore):
    """One writer wins, but the last one's bytes stay."""

    def put(self, key, data, *, if_absent=False):
        try:
            return super().put(key, data, if_absent=if_absent)
        except ObjectExistsError:
            super().put(key, data)
            raise


def test_a_store_that_keeps_its_word_passes_and_nothing_stays_behind():
    store = MemoryStore()
    require_one_winner(store, "run")
    assert len(store.puts) == 20
    assert list(store.list("")) == []


@pytest.mark.parametrize("kind", [Ignorant, Racy])
def test_a_store_that_lets_several_writers_win_is_refused_with_what_to_use_instead(kind):
    store = kind()
    with pytest.raises(StoreError, match=r"[2-8] of 8 writers created the same object.*use a server that keeps it"):
        require_one_winner(store, "run")
    assert list(store.list("")) == []


def test_a_store_that_keeps_other_bytes_than_the_winners_is_refused():
    with pytest.raises(StoreError, match="does not hold"):
        require_one_winner(Forgetful(), "run")


def test_an_error_of_the_store_is_told_as_it_is():
    store = MemoryStore(capacity_bytes=0)
    with pytest.raises(StoreError, match="the disk is full"):
        require_one_winner(store, "run")


def test_a_folder_is_not_probed(tmp_path):
    require_one_winner(LocalStore(tmp_path / "root"), "run")
    assert not (tmp_path / "root").exists()
