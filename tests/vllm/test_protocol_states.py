"""Questions about pause, sleep and waking, asked of the double and of a real vLLM: what the double answers is what vLLM answers."""

from __future__ import annotations

import http.client

from tests.vllm.peer import Peer, finish_of, ids_of, meanwhile


def test_a_pause_that_waits_lets_replies_end(peer: Peer) -> None:
    with meanwhile(peer, 40) as events:
        assert peer.post("/pause", mode="wait") == {"status": "paused"}
    assert len(ids_of(events)) == 40 and finish_of(events) == ["length"]
    assert peer.asleep() == (True, True), "merely paused, and it calls that sleeping"
    assert peer.sleep_state()["awake"] == 1.0
    with meanwhile(peer, 5, queued=True) as queued:
        assert peer.post("/reset_prefix_cache") == {"success": True}
        assert queued == []
        assert peer.post("/resume") == {"status": "resumed"}
    assert finish_of(queued) == ["length"]
    assert peer.asleep() == (False, False)


def test_a_pause_aborts_if_it_is_not_told_otherwise(peer: Peer) -> None:
    with meanwhile(peer, 1500) as events:
        peer.post("/pause")
    assert finish_of(events) == ["abort"] and len(ids_of(events)) < 1500


def test_a_pause_that_keeps(peer: Peer) -> None:
    with meanwhile(peer, 60) as events:
        peer.post("/pause", mode="keep")
        peer.post("/resume")
    assert len(ids_of(events)) == 60 and finish_of(events) == ["length"]


def test_sleep_waits_and_waking_up_takes_both_halves(peer: Peer) -> None:
    with meanwhile(peer, 40) as events:
        assert peer.post("/sleep", level="1", mode="wait") == {"status": "sleeping", "level": 1}
    assert finish_of(events) == ["length"] and len(ids_of(events)) == 40
    assert peer.asleep() == (True, True)
    assert peer.sleep_state() == {"awake": 0.0, "weights_offloaded": 1.0, "discard_all": 0.0}
    with meanwhile(peer, 5, queued=True) as queued:
        assert peer.post("/sleep", level="1", mode="wait") == {"status": "sleeping", "level": 1}, "again, and those in the queue stay"
        assert peer.post("/wake_up", tags="weights") == {"status": "sleeping", "tags": ["weights"]}
        assert peer.post("/wake_up", tags="weights") == {"status": "sleeping", "tags": ["weights"]}, "nothing left of that"
        assert peer.asleep() == (True, True) and peer.sleep_state()["awake"] == 0.0
        assert queued == []
        assert peer.post("/wake_up", tags="kv_cache") == {"status": "awake", "tags": ["kv_cache"]}
    assert finish_of(queued) == ["length"]
    assert peer.asleep() == (False, False) and peer.sleep_state()["awake"] == 1.0
    assert peer.post("/wake_up") == {"status": "awake", "tags": None}, "awake already"


def test_a_second_sleep_aborts_those_in_the_queue_and_their_streams_end_without_a_reason(peer: Peer) -> None:
    peer.post("/sleep", level="1", mode="wait")
    with meanwhile(peer, 5, queued=True) as queued:
        peer.post("/sleep", level="1")
    assert ids_of(queued) == [] and finish_of(queued) == []
    assert queued[0]["prompt_token_ids"] != []


def test_resume_does_not_wake(peer: Peer) -> None:
    peer.post("/sleep", level="1", mode="wait")
    peer.post("/resume")
    assert peer.asleep() == (True, False)
    assert peer.sleep_state()["weights_offloaded"] == 1.0


def test_a_call_that_breaks_inside_ends_its_connection_too(peer: Peer) -> None:
    """So the next request on a connection that was kept meets a reset, and must be sent again."""
    url = peer.http.base_url
    connection = http.client.HTTPConnection(url.host, url.port or 80, timeout=10)
    connection.request("POST", "/release_kv_cache_memory")
    answer = connection.getresponse()
    assert answer.status == 500 and answer.getheader("connection") is None
    answer.read()
    assert connection.sock.recv(1) == b""
    connection.close()


def test_dropping_the_kv_cache_alone(peer: Peer) -> None:
    def refused() -> str:
        return str(peer.post("/release_kv_cache_memory", None, 500)["error"]["message"])

    assert "release_kv_cache_memory() requires a completed pause first" in refused()
    peer.post("/sleep", level="1", mode="wait")
    assert "release_kv_cache_memory() requires all executor memory to be resident" in refused()
    peer.post("/wake_up")
    peer.post("/pause", mode="wait")
    assert "Selective discard is not supported on CPU." in refused()
    peer.post("/resume")
    assert peer.asleep() == (True, False), "it failed, and counts as asleep all the same"
    assert peer.post("/wake_up", tags="kv_cache") == {"status": "awake", "tags": ["kv_cache"]}
