"""The scheduler: starts containers for waiting inputs, hands them out, and ends containers that idle, fail or are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from tests.modal_server import processes
from tests.modal_server.apps import Apps
from tests.modal_server.calls import Calls, Input
from tests.modal_server.faults import Faults
from tests.modal_server.functions import Deployed, Functions
from tests.modal_server.launch import Launcher
from tests.modal_server.rpc import Caller, Ids, Unary, not_found

TIMEOUT = pb.GenericResult.GENERIC_STATUS_TIMEOUT
INIT_FAILURE = pb.GenericResult.GENERIC_STATUS_INIT_FAILURE
HEARTBEAT_S = 14.9  # the SDK waits 15.1 s for the answer, and asks again after 15 s
POLL_S = 20.0
TICK_S = 0.2
MOST_CONTAINERS = 8
DEFAULT_START_S = 300.0


@dataclass
class Container:
    """One container, from its start to its end."""

    task_id: str
    function: Deployed
    started_at: float = field(default_factory=time.time)
    process: asyncio.subprocess.Process | None = None
    running: dict[str, Input] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    ready: bool = False
    # It gets no more inputs, and ends once those that it has are done.
    retired: bool = False
    # Its machine was wanted elsewhere: what it ran begins anew on another.
    preempted: bool = False
    served: int = 0
    idle_since: float = field(default_factory=time.monotonic)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def kill(self) -> None:
        """At once, with everything it started."""
        self.retired = True
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGKILL)


class Containers:
    """See `Scheduler`."""

    def __init__(self, ids: Ids, functions: Functions, calls: Calls, apps: Apps, faults: Faults, launcher: Launcher) -> None:
        self._ids, self._functions, self._calls = ids, functions, calls
        self._apps, self._faults, self._launcher = apps, faults, launcher
        self.all: dict[str, Container] = {}
        self._waiting: defaultdict[str, deque[Input]] = defaultdict(deque)
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        calls.schedule_with(self)
        apps.watch(self.replace, self.stop_app, lambda app_id: len(self.live(app_id=app_id)))

    def rpcs(self) -> dict[str, Unary]:
        return {
            "ContainerHello": self._hello,
            "ContainerHeartbeat": self._heartbeat,
            "ContainerCheckpoint": self._checkpoint,
            "ContainerStop": self._stop,
            "FunctionGetInputs": self._get_inputs,
            "FunctionPutOutputs": self._put_outputs,
            "FunctionGetDynamicConcurrency": self._concurrency,
            "FunctionGetCurrentStats": self._stats,
            "TaskResult": self._task_result,
            "TaskList": self._list,
        }

    def live(self, app_id: str = "", function_id: str = "") -> list[Container]:
        """The containers that have not ended, of an app or a function (all its variants)."""
        return [
            container
            for container in self.all.values()
            if not container.ended.is_set()
            and app_id in {"", container.function.app_id}
            and function_id in {"", container.function.id, container.function.base_id}
        ]

    def open_files(self, task_id: str) -> set[processes.File]:
        """Those that this container holds open."""
        process = self.all[task_id].process
        return set() if process is None else processes.open_files(process.pid)

    def run_forever(self) -> None:
        """Looks now and then for work that no call announces: idle containers, and faults that are over."""
        self._spawn(self._tick())

    async def stop_all(self) -> None:
        """Every container, at once."""
        for task in self._tasks:
            if task.get_name() == "tick":
                task.cancel()
        for container in self.live():
            container.kill()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def enqueue(self, entry: Input) -> None:
        self._waiting[entry.call.function_id].append(entry)
        self._scale(entry.call.function_id)
        await self._notify()

    async def cancel(self, entry: Input, kill: bool) -> None:
        with contextlib.suppress(ValueError):
            self._waiting[entry.call.function_id].remove(entry)
        for container in self.live():
            if entry.id in container.running:
                container.cancelled.append(entry.id)
                if kill:
                    container.kill()
        await self._notify()

    async def replace(self, app_id: str) -> None:
        """The app was deployed anew: the next inputs get new containers."""
        for container in self.live(app_id=app_id):
            container.retired = True
        await self._notify()

    async def stop_app(self, app_id: str) -> None:
        """Its containers end, and what waits or runs is terminated."""
        terminated = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_TERMINATED, exception="the app was stopped")
        for function in self._functions.of_app(app_id):
            for entry in self._take_waiting(function.id):
                await self._calls.finish(entry, terminated)
        for container in self.live(app_id=app_id):
            for entry in list(container.running.values()):
                await self._calls.finish(entry, terminated)
            container.kill()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _spawn(self, work: asyncio._CoroutineLike[None], name: str = "tick") -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for function_id in [function_id for function_id, waiting in self._waiting.items() if waiting]:
                self._scale(function_id)
            for container in self.live():
                window = self._launcher.scaledown_s or container.function.scaledown_s
                if container.ready and not container.running and time.monotonic() - container.idle_since > window:
                    container.retired = True
            await self._notify()

    def _scale(self, function_id: str) -> None:
        if self._faults.no_containers:
            return
        function = self._functions.get(function_id)
        serving = [c for c in self.live() if c.function.id == function_id and not c.retired]
        busy = len(self._waiting[function_id]) + sum(len(container.running) for container in serving)
        wanted = min(-(-busy // function.concurrency), function.max_containers or MOST_CONTAINERS)
        for _ in range(wanted - len(serving)):
            container = Container(self._ids.new("ta"), function)
            self.all[container.task_id] = container
            self._spawn(self._run(container), name=container.task_id)

    async def _run(self, container: Container) -> None:
        app = self._apps.get(container.function.app_id)
        patience = container.function.definition.startup_timeout_secs or container.function.definition.timeout_secs
        failure = ""
        try:
            container.process = await self._launcher.start(
                container.task_id, container.function, self._apps.layout(app.id), app.environment
            )
            late = asyncio.get_running_loop().call_later(patience or DEFAULT_START_S, self._give_up, container)
            await container.process.wait()
            late.cancel()
        except OSError as exc:
            failure = f"the container cannot be made here: {exc}"
        finally:
            container.ended.set()
        await self._clear_up(container, failure)

    def _give_up(self, container: Container) -> None:
        if not container.ready:
            container.kill()
            container.retired = False  # it has failed: nobody asked it to go

    async def _clear_up(self, container: Container, failure: str) -> None:
        """What becomes of the inputs of a container that ended, and of those that it never got to."""
        waiting = self._waiting[container.function.id]
        unfinished = [entry for entry in container.running.values() if not entry.done]
        if container.preempted:
            waiting.extendleft(reversed(unfinished))
        else:
            for entry in unfinished:
                await self._calls.finish(entry, self._faults.crash, task_id=container.task_id)
        if not container.ready and not container.retired:
            text = failure or f"the container ended before it was ready:\n{self._launcher.log(container.task_id)[-2000:]}"
            await self._fail_waiting(container.function.id, pb.GenericResult(status=INIT_FAILURE, exception=text))
        if waiting:
            self._scale(container.function.id)

    def _take_waiting(self, function_id: str) -> list[Input]:
        waiting = list(self._waiting[function_id])
        self._waiting[function_id].clear()
        return waiting

    async def _fail_waiting(self, function_id: str, result: pb.GenericResult) -> None:
        for entry in self._take_waiting(function_id):
            await self._calls.finish(entry, result)

    def _of(self, caller: Caller) -> Container:
        container = self.all.get(caller.task_id or "")
        if container is None:
            raise not_found(f"Task {caller.task_id} not found")
        return container

    async def _hello(self, request: Empty, caller: Caller) -> Empty:
        return Empty()

    async def _heartbeat(self, request: pb.ContainerHeartbeatRequest, caller: Caller) -> pb.ContainerHeartbeatResponse:
        container = self._of(caller)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S), self._changed:
                await self._changed.wait_for(lambda: bool(container.cancelled))
        if not container.cancelled:
            return pb.ContainerHeartbeatResponse()
        cancelled, container.cancelled = container.cancelled, []
        return pb.ContainerHeartbeatResponse(cancel_input_event=pb.CancelInputEvent(input_ids=cancelled))

    async def _checkpoint(self, request: pb.ContainerCheckpointRequest, caller: Caller) -> Empty:
        """As if it had been restored at once."""
        container = self._of(caller)
        self._launcher.restore(container.task_id)
        return Empty()

    async def _stop(self, request: pb.ContainerStopRequest, caller: Caller) -> pb.ContainerStopResponse:
        container = self.all[request.task_id]
        container.retired = True
        if not request.graceful:
            container.kill()
        await self._notify()
        return pb.ContainerStopResponse()

    async def _get_inputs(self, request: pb.FunctionGetInputsRequest, caller: Caller) -> pb.FunctionGetInputsResponse:
        container = self._of(caller)
        if not container.ready:
            container.ready, container.idle_since = True, time.monotonic()
        waiting = self._waiting[container.function.id]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S), self._changed:
                await self._changed.wait_for(lambda: container.retired or bool(waiting))
        if container.retired:
            return pb.FunctionGetInputsResponse(inputs=[pb.FunctionGetInputsItem(kill_switch=True)])
        if not waiting:
            return pb.FunctionGetInputsResponse()
        return pb.FunctionGetInputsResponse(inputs=[self._hand_over(waiting.popleft(), container)])

    def _hand_over(self, entry: Input, container: Container) -> pb.FunctionGetInputsItem:
        container.running[entry.id] = entry
        container.served += 1
        message = pb.FunctionInput()
        message.CopyFrom(entry.message)
        definition = container.function.definition
        if definition.max_inputs and container.served >= definition.max_inputs:
            message.final_input = container.retired = True
        if definition.timeout_secs:
            asyncio.get_running_loop().call_later(definition.timeout_secs, self._time_out, entry, container)
        return pb.FunctionGetInputsItem(
            input_id=entry.id,
            input=message,
            function_call_id=entry.call.id,
            function_call_invocation_type=entry.call.kind,
            function_map_idx=entry.index,
        )

    def _time_out(self, entry: Input, container: Container) -> None:
        if not entry.done:
            text = f"Task's current input {entry.id} hit its timeout of {container.function.definition.timeout_secs}s"
            self._spawn(self._end_late(entry, container, text), name=entry.id)

    async def _end_late(self, entry: Input, container: Container, text: str) -> None:
        await self._calls.finish(entry, pb.GenericResult(status=TIMEOUT, exception=text))
        container.kill()

    async def _put_outputs(self, request: pb.FunctionPutOutputsRequest, caller: Caller) -> Empty:
        container = self._of(caller)
        for output in request.outputs:
            if entry := container.running.pop(output.input_id, None):
                await self._calls.finish(entry, output.result, output.data_format, container.task_id)
        container.idle_since = time.monotonic()
        return Empty()

    async def _concurrency(
        self, request: pb.FunctionGetDynamicConcurrencyRequest, caller: Caller
    ) -> pb.FunctionGetDynamicConcurrencyResponse:
        return pb.FunctionGetDynamicConcurrencyResponse(concurrency=request.max_concurrency)

    async def _stats(self, request: pb.FunctionGetCurrentStatsRequest, caller: Caller) -> pb.FunctionStats:
        app_id = self._functions.get(request.function_id).app_id
        variants = [f.id for f in self._functions.of_app(app_id) if request.function_id in {f.id, f.base_id}]
        containers = self.live(function_id=request.function_id)
        return pb.FunctionStats(
            backlog=sum(len(self._waiting[variant]) for variant in variants),
            num_total_tasks=len(containers),
            num_running_inputs=sum(len(container.running) for container in containers),
        )

    async def _task_result(self, request: pb.TaskResultRequest, caller: Caller) -> Empty:
        """It failed to start: so does what waits for it, or it would fail for ever."""
        container = self._of(caller)
        container.retired = True
        await self._fail_waiting(container.function.id, request.result)
        return Empty()

    async def _list(self, request: pb.TaskListRequest, caller: Caller) -> pb.TaskListResponse:
        tasks = [
            pb.TaskStats(
                task_id=container.task_id,
                app_id=container.function.app_id,
                app_description=self._apps.get(container.function.app_id).name,
                started_at=container.started_at,
                enqueued_at=container.started_at,
            )
            for container in self.live(app_id=request.app_id)
        ]
        return pb.TaskListResponse(tasks=tasks)
