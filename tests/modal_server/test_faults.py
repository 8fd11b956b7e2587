"""What can go wrong on demand, as the SDK sees it."""

from __future__ import annotations

import time
from pathlib import Path

import modal
import pytest
from grpclib import Status
from modal_proto import api_pb2 as pb

from tests.modal_server.processes import MountPoints
from tests.modal_server.server import ModalDouble
from tests.modal_server.waiting import until

pytestmark = pytest.mark.integration


def test_a_wrong_token_is_refused(server: ModalDouble) -> None:
    with pytest.raises(modal.exception.AuthError, match="Token"):
        modal.Cls.from_name("sample", "Worker", client=server.client(token_secret="wrong"))().describe.remote("x")
    printed = server.modal("app", "list", env=server.environment(token_secret="wrong"), check=False)
    assert "Token" in printed


def test_a_blip_is_survived(server: ModalDouble, worker: modal.cls.Obj) -> None:
    server.faults.unavailable("FunctionMap", times=2)
    before = server.calls["FunctionMap"]
    assert worker.echo.remote(b"x") == b"x"
    assert server.calls["FunctionMap"] - before == 3


def test_a_lost_answer_was_done_all_the_same(server: ModalDouble, client: modal.Client) -> None:
    entries = modal.Dict.from_name("lossy", create_if_missing=True, client=client)
    server.faults.lose_answer("DictUpdate")
    assert entries.put("key", 1, skip_if_exists=True) is False and entries["key"] == 1


def test_no_credit_is_said_in_modals_words(server: ModalDouble, worker: modal.cls.Obj) -> None:
    server.faults.refuse("FunctionMap", Status.RESOURCE_EXHAUSTED, "Workspace spend limit reached")
    with pytest.raises(modal.exception.ResourceExhaustedError, match="spend limit"):
        worker.echo.remote(b"x")
    assert worker.echo.remote(b"y") == b"y"


def test_a_result_is_whatever_the_test_says(server: ModalDouble, worker: modal.cls.Obj) -> None:
    server.faults.result(pb.GenericResult.GENERIC_STATUS_TIMEOUT, "too long")
    with pytest.raises(modal.exception.FunctionTimeoutError, match="too long"):
        worker.echo.remote(b"x")
    server.faults.result(pb.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE, "ours to mend")
    with pytest.raises(modal.exception.InternalFailure, match="ours to mend"):
        worker.echo.spawn(b"x").get(timeout=10)
    server.faults.result(pb.GenericResult.GENERIC_STATUS_KERNEL_OOM_KILL, "out of memory")
    with pytest.raises(modal.exception.RemoteError, match="out of memory"):
        worker.echo.remote(b"x")


def test_a_container_killed_in_the_middle_fails_its_input(server: ModalDouble, client: modal.Client, worker: modal.cls.Obj) -> None:
    begun = modal.Dict.from_name("sample-dict", create_if_missing=True, client=client)
    call = worker.sleep.spawn(300, "kill")
    until(lambda: begun.contains("kill"))
    assert server.kill_containers("sample") >= 1
    with pytest.raises(modal.exception.InternalFailure, match="unexpectedly"):
        call.get(timeout=10)
    assert worker.echo.remote(b"again") == b"again"


def test_a_preempted_input_begins_anew(server: ModalDouble, client: modal.Client, worker: modal.cls.Obj) -> None:
    begun = modal.Dict.from_name("sample-dict", create_if_missing=True, client=client)
    call = worker.sleep.spawn(2, "preempt")
    until(lambda: begun.contains("preempt"))
    first = begun["preempt"]
    assert server.preempt_containers("sample") >= 1
    assert call.get(timeout=30) == "slept" and begun["preempt"] != first


def test_a_container_may_end_itself(server: ModalDouble, worker: modal.cls.Obj) -> None:
    server.faults.crash = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_KERNEL_OOM_KILL, exception="killed: out of memory")
    with pytest.raises(modal.exception.RemoteError, match="out of memory"):
        worker.die.spawn().get(timeout=20)


def test_no_container_comes_until_there_is_room(server: ModalDouble, worker: modal.cls.Obj) -> None:
    server.kill_containers("sample")
    server.faults.no_containers = True
    call = worker.echo.spawn(b"patience")
    with pytest.raises(TimeoutError):
        call.get(timeout=0.5)
    assert worker.echo.get_current_stats().backlog == 1 and not server.live_containers("sample")
    server.faults.no_containers = False
    assert call.get(timeout=30) == b"patience"


def test_answers_come_late(server: ModalDouble, worker: modal.cls.Obj) -> None:
    worker.echo.remote(b"warm")
    server.faults.delay("FunctionMap", 0.7)
    begun = time.monotonic()
    worker.echo.remote(b"x")
    assert time.monotonic() - begun > 0.7


def test_outputs_expire(server: ModalDouble, worker: modal.cls.Obj) -> None:
    call = worker.echo.spawn(b"x")
    assert call.get(timeout=20) == b"x"
    server.faults.outputs_expired = True
    with pytest.raises(modal.exception.OutputExpiredError):
        call.get(timeout=0)


def test_a_container_that_cannot_start_fails_what_waits_for_it(tmp_path: Path) -> None:
    with ModalDouble(tmp_path, env={"SAMPLE_BROKEN": "1"}) as server:
        server.modal("deploy", "-m", "tests.modal_server.sample_app", env={"SAMPLE_MOUNT": str(tmp_path / "mount")})
        with pytest.raises(ValueError, match="broken"):
            modal.Cls.from_name("sample", "Worker", client=server.client())().echo.remote(b"x")


def test_a_container_that_is_not_ready_in_time_fails_what_waits_for_it(client: modal.Client) -> None:
    with pytest.raises(modal.exception.RemoteError, match="before it was ready"):
        modal.Cls.from_name("sample", "Stuck", client=client)().answer.remote()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with ModalDouble(tmp_path, env={"SAMPLE_CHILD": "1"}) as server:
        server.modal("deploy", "-m", "tests.modal_server.sample_app", env={"SAMPLE_MOUNT": str(tmp_path / "mount")})
        worker = modal.Cls.from_name("sample", "Worker", client=server.client())()
        worker.echo.remote(b"x")
        processes = [entry for entry in Path("/proc").glob("[0-9]*") if _runs_in(entry, tmp_path)]
        assert len(processes) >= 3
    until(lambda: not any(_runs_in(process, tmp_path) for process in processes))
    assert not (tmp_path / "mount").exists()


def test_two_doubles_do_not_mount_on_the_same_place(tmp_path: Path) -> None:
    first, second, place = MountPoints(), MountPoints(), tmp_path / "mount" / "adapters"
    first.ensure(place)
    first.ensure(place)
    with pytest.raises(FileExistsError):
        second.ensure(place)
    second.remove()
    assert place.is_dir()
    first.remove()
    assert not place.parent.exists()


def _runs_in(process: Path, folder: Path) -> bool:
    try:
        return (process / "cwd").readlink().is_relative_to(folder)
    except OSError:
        return False
