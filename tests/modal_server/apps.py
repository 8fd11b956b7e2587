"""Apps: deployed under a name, looked up, listed and stopped."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from tests.modal_server.functions import Functions
from tests.modal_server.images import Mounts
from tests.modal_server.names import ENVIRONMENT, Names
from tests.modal_server.rpc import Caller, Ids, Streaming, Unary, not_found
from tests.modal_server.volumes import Volumes


@dataclass
class App:
    """What is published of an app, and what became of it."""

    id: str
    description: str
    environment: str
    state: pb.AppState.ValueType
    name: str = ""
    functions: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    created_at: float = field(default_factory=time.time)
    deployed_at: float = 0.0
    stopped_at: float = 0.0
    versions: int = 0

    def lifecycle(self) -> pb.AppLifecycle:
        return pb.AppLifecycle(
            app_state=self.state,
            created_at=self.created_at,
            deployed_at=self.deployed_at,
            stopped_at=self.stopped_at,
            version=self.versions,
        )


# What happens to the containers of an app that is deployed anew (they end once idle) or stopped (they end).
Retire = Callable[[str], Awaitable[None]]


class Apps:
    """Each app under its id; names lead to deployed ones only."""

    def __init__(self, ids: Ids, functions: Functions, volumes: Volumes, mounts: Mounts) -> None:
        self._ids = ids
        self._functions = functions
        self._volumes = volumes
        self._mounts = mounts
        self._names = Names("App", lambda: ids.new("ap"))
        self._apps: dict[str, App] = {}
        self._replace: Retire | None = None
        self._stop: Retire | None = None
        self._running: Callable[[str], int] = lambda _: 0

    def watch(self, replace: Retire, stop: Retire, running: Callable[[str], int]) -> None:
        """Who runs the containers."""
        self._replace, self._stop, self._running = replace, stop, running

    def rpcs(self) -> dict[str, Unary]:
        return {
            "AppGetByDeploymentName": self._get_by_name,
            "AppGetOrCreate": self._get_or_create,
            "AppCreate": self._create,
            "AppGetLayout": self._get_layout,
            "AppGetLifecycle": self._get_lifecycle,
            "AppGetInfo": self._get_info,
            "AppPublish": self._publish,
            "AppHeartbeat": self._heartbeat,
            "AppClientDisconnect": self._disconnect,
            "AppStop": self._stop_app,
            "AppList": self._list,
            "AppGetTags": self._get_tags,
            "AppSetTags": self._set_tags,
            "ClassGet": self._get_class,
            "FunctionGet": self._get_function,
        }

    def streams(self) -> dict[str, Streaming]:
        return {"AppGetLogs": self._logs}

    def deployed(self, name: str, environment: str = "") -> App | None:
        """The app of this name, for tests to look at."""
        app_id = self._names.get(environment, name)
        return None if app_id is None else self._apps[app_id]

    def get(self, app_id: str) -> App:
        if app_id not in self._apps:
            raise not_found(f"App {app_id} not found")
        return self._apps[app_id]

    def function_id(self, app: str, tag: str, environment: str = "") -> str:
        """The function that has this tag in a deployed app; the methods of a class belong to "Class.*"."""
        return self._find(app, environment).functions[tag]

    def layout(self, app_id: str) -> pb.AppLayout:
        """All objects of an app, as its containers and its next deployment need them."""
        app = self.get(app_id)
        objects: dict[str, pb.Object] = {}
        for function_id in app.functions.values():
            objects[function_id] = pb.Object(object_id=function_id, function_handle_metadata=self._functions.metadata(function_id))
            for dependency in self._functions.get(function_id).definition.object_dependencies:
                objects[dependency.object_id] = self._object(dependency.object_id)
        for class_id in app.classes.values():
            objects[class_id] = pb.Object(object_id=class_id, class_handle_metadata=pb.ClassHandleMetadata())
        return pb.AppLayout(function_ids=app.functions, class_ids=app.classes, objects=list(objects.values()))

    def _object(self, object_id: str) -> pb.Object:
        if object_id.startswith("vo-"):
            return pb.Object(object_id=object_id, volume_metadata=self._volumes.metadata(object_id))
        if object_id.startswith("mo-"):
            return pb.Object(object_id=object_id, mount_handle_metadata=self._mounts.metadata(object_id))
        return pb.Object(object_id=object_id)

    def _find(self, name: str, environment: str) -> App:
        app = self.deployed(name, environment)
        if app is None:
            raise not_found(f"App '{name}' not found in environment '{environment or ENVIRONMENT}'.")
        return app

    def _new(self, description: str, environment: str, state: pb.AppState.ValueType) -> App:
        app = App(self._ids.new("ap"), description, environment or ENVIRONMENT, state)
        self._apps[app.id] = app
        return app

    async def _get_by_name(self, request: pb.AppGetByDeploymentNameRequest, caller: Caller) -> pb.AppGetByDeploymentNameResponse:
        environment = request.environment_name or ENVIRONMENT
        app = self.deployed(request.name, environment)
        if app is not None:
            return pb.AppGetByDeploymentNameResponse(app_id=app.id, environment_name=environment, lifecycle=app.lifecycle())
        former = [old for old in self._apps.values() if (old.name, old.environment) == (request.name, environment)]
        if not former:
            return pb.AppGetByDeploymentNameResponse(environment_name=environment)
        return pb.AppGetByDeploymentNameResponse(
            previous_app_id=former[-1].id, environment_name=environment, lifecycle=former[-1].lifecycle()
        )

    async def _get_or_create(self, request: pb.AppGetOrCreateRequest, caller: Caller) -> pb.AppGetOrCreateResponse:
        app = self.deployed(request.app_name, request.environment_name)
        if app is None and request.object_creation_type == pb.OBJECT_CREATION_TYPE_UNSPECIFIED:
            raise not_found(f"App '{request.app_name}' not found in environment '{request.environment_name or ENVIRONMENT}'.")
        if app is None:
            app = self._new(request.app_name, request.environment_name, pb.APP_STATE_DEPLOYED)
            app.name = request.app_name
            self._names.put(app.environment, app.name, app.id)
        return pb.AppGetOrCreateResponse(app_id=app.id)

    async def _create(self, request: pb.AppCreateRequest, caller: Caller) -> pb.AppCreateResponse:
        app = self._new(request.description, request.environment_name, request.app_state)
        return pb.AppCreateResponse(app_id=app.id, app_page_url=f"https://modal.com/apps/{app.id}")

    async def _get_layout(self, request: pb.AppGetLayoutRequest, caller: Caller) -> pb.AppGetLayoutResponse:
        return pb.AppGetLayoutResponse(app_layout=self.layout(request.app_id))

    async def _get_lifecycle(self, request: pb.AppGetLifecycleRequest, caller: Caller) -> pb.AppGetLifecycleResponse:
        return pb.AppGetLifecycleResponse(lifecycle=self.get(request.app_id).lifecycle())

    async def _get_info(self, request: pb.AppGetInfoRequest, caller: Caller) -> pb.AppGetInfoResponse:
        app = self.get(request.app_id)
        return pb.AppGetInfoResponse(
            info=pb.AppHandleMetadata(description=app.description, lifecycle=app.lifecycle(), functions=app.functions)
        )

    async def _publish(self, request: pb.AppPublishRequest, caller: Caller) -> pb.AppPublishResponse:
        app = self.get(request.app_id)
        app.functions, app.classes = dict(request.function_ids), dict(request.class_ids)
        app.tags = dict(request.tags)
        if request.app_state:
            app.state = request.app_state
        if request.app_state == pb.APP_STATE_DEPLOYED:
            app.name, app.deployed_at, app.versions = request.name, time.time(), app.versions + 1
            self._names.put(app.environment, app.name, app.id)
            if self._replace is not None:
                await self._replace(app.id)
        return pb.AppPublishResponse(url=f"https://modal.com/apps/{app.id}", deployed_at=app.deployed_at)

    async def _heartbeat(self, request: pb.AppHeartbeatRequest, caller: Caller) -> Empty:
        return Empty()

    async def _disconnect(self, request: pb.AppClientDisconnectRequest, caller: Caller) -> Empty:
        if self.get(request.app_id).state != pb.APP_STATE_DEPLOYED:
            await self._end(self.get(request.app_id))
        return Empty()

    async def _stop_app(self, request: pb.AppStopRequest, caller: Caller) -> Empty:
        await self._end(self.get(request.app_id))
        return Empty()

    async def _end(self, app: App) -> None:
        app.state, app.stopped_at = pb.APP_STATE_STOPPED, time.time()
        self._names.forget(app.id)
        if self._stop is not None:
            await self._stop(app.id)

    async def _list(self, request: pb.AppListRequest, caller: Caller) -> pb.AppListResponse:
        wanted = request.environment_name or ENVIRONMENT
        items = [
            pb.AppListResponse.AppListItem(
                app_id=app.id,
                description=app.name or app.description,
                name=app.name,
                state=app.state,
                created_at=app.created_at,
                stopped_at=app.stopped_at,
                n_running_tasks=self._running(app.id),
            )
            for app in self._apps.values()
            if app.environment == wanted
        ]
        return pb.AppListResponse(apps=items)

    async def _get_tags(self, request: pb.AppGetTagsRequest, caller: Caller) -> pb.AppGetTagsResponse:
        return pb.AppGetTagsResponse(tags=self.get(request.app_id).tags)

    async def _set_tags(self, request: pb.AppSetTagsRequest, caller: Caller) -> Empty:
        self.get(request.app_id).tags = dict(request.tags)
        return Empty()

    async def _get_class(self, request: pb.ClassGetRequest, caller: Caller) -> pb.ClassGetResponse:
        app = self._find(request.app_name, request.environment_name)
        if request.object_tag not in app.classes:
            raise not_found(f"Cls '{request.object_tag}' not found in app '{request.app_name}'.")
        return pb.ClassGetResponse(class_id=app.classes[request.object_tag], handle_metadata=pb.ClassHandleMetadata())

    async def _get_function(self, request: pb.FunctionGetRequest, caller: Caller) -> pb.FunctionGetResponse:
        app = self._find(request.app_name, request.environment_name)
        if request.object_tag not in app.functions:
            raise not_found(f"Function '{request.object_tag}' not found in app '{request.app_name}'.")
        function_id = app.functions[request.object_tag]
        return pb.FunctionGetResponse(
            function_id=function_id, handle_metadata=self._functions.metadata(function_id), function=self._functions.data(function_id)
        )

    async def _logs(self, request: pb.AppGetLogsRequest, caller: Caller) -> AsyncIterator[pb.TaskLogsBatch]:
        yield pb.TaskLogsBatch(app_done=True)
