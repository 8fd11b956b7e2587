"""Dicts, shared by clients: a key can be put by one of them only."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import modal
import pytest

from tests.modal_server.server import ModalDouble

pytestmark = pytest.mark.integration


def test_of_two_clients_one_puts_if_absent(tmp_path: Path) -> None:
    with ModalDouble(tmp_path) as server, ThreadPoolExecutor() as pool:
        shared = [modal.Dict.from_name("leases", create_if_missing=True, client=server.client()) for _ in range(2)]
        for epoch in range(5):
            won = list(pool.map(lambda entry, key=epoch: entry[1].put(("a", key), entry[0], skip_if_exists=True), enumerate(shared)))
            assert sorted(won) == [False, True]
            assert shared[0]["a", epoch] == won.index(True)
        assert server.unimplemented == []


def test_a_dict_does_what_dicts_do(tmp_path: Path) -> None:
    with ModalDouble(tmp_path) as server:
        entries = modal.Dict.from_name("d", create_if_missing=True, client=server.client())
        entries.update(a=1, b=None)
        entries["c", 1] = {"deep": [1]}
        assert entries.len() == 3 and entries["c", 1] == {"deep": [1]} and entries.get("b", 7) is None and entries.get("x", 7) == 7
        assert dict(entries.items()) == {"a": 1, "b": None, ("c", 1): {"deep": [1]}}
        assert set(entries.keys()) == {"a", "b", ("c", 1)} and sorted(map(str, entries.values())) == ["1", "None", "{'deep': [1]}"]
        assert entries.pop("a") == 1 and not entries.contains("a")
        with pytest.raises(KeyError):
            entries.pop("a")
        entries.clear()
        assert entries.len() == 0
        with pytest.raises(modal.exception.NotFoundError, match="nowhere"):
            modal.Dict.from_name("nowhere", client=server.client()).len()
        assert server.unimplemented == []
