"""Functions and classes of apps: their definitions, the variants that parameters make of them, and their web addresses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from google.protobuf.json_format import MessageToDict, ParseDict
from modal_proto import api_pb2 as pb

from tests.modal_server.rpc import Caller, Ids, Unary, not_found


@dataclass
class Deployed:
    """One function: its definition, the app it belongs to, and the parameters it is bound to."""

    id: str
    app_id: str
    definition: pb.Function
    base_id: str
    parameters: bytes = b""

    @property
    def concurrency(self) -> int:
        """Inputs that one container takes at a time."""
        return max(1, self.definition.max_concurrent_inputs, self.definition.target_concurrent_inputs)

    @property
    def max_containers(self) -> int:
        """0 where nothing limits them."""
        return self.definition.autoscaler_settings.max_containers or self.definition.concurrency_limit

    @property
    def scaledown_s(self) -> float:
        """How long a container waits for its next input."""
        return self.definition.autoscaler_settings.scaledown_window or self.definition.task_idle_timeout_secs or 60


# Opens a web front for a function, or one of its methods, and says where it is.
OpenFront = Callable[[str, str], Awaitable[str]]


class Functions:
    """Each function under its id."""

    def __init__(self, ids: Ids, open_front: OpenFront) -> None:
        self._ids = ids
        self._open_front = open_front
        self._functions: dict[str, Deployed] = {}
        self._bound: dict[tuple[str, bytes], str] = {}
        self._fronts: dict[tuple[str, str], str] = {}

    def rpcs(self) -> dict[str, Unary]:
        return {
            "FunctionPrecreate": self._precreate,
            "FunctionCreate": self._create,
            "FunctionGetById": self._get_by_id,
            "FunctionBindParams": self._bind,
            "ClassCreate": self._create_class,
        }

    def get(self, function_id: str) -> Deployed:
        if function_id not in self._functions:
            raise not_found(f"Function {function_id} not found")
        return self._functions[function_id]

    def of_app(self, app_id: str) -> list[Deployed]:
        return [function for function in self._functions.values() if function.app_id == app_id]

    def metadata(self, function_id: str) -> pb.FunctionHandleMetadata:
        """What the SDK knows of a function that it looked up."""
        function = self.get(function_id)
        definition = function.definition
        return pb.FunctionHandleMetadata(
            function_name=definition.function_name,
            function_type=definition.function_type,
            web_url=definition.web_url,
            class_parameter_info=definition.class_parameter_info,
            definition_id=f"de-{function_id}",
            function_schema=definition.function_schema,
            app_id=function.app_id,
            base_function_id=function.base_id if function.base_id != function_id else "",
            supported_input_formats=definition.supported_input_formats,
            supported_output_formats=definition.supported_output_formats,
            method_handle_metadata={
                name: pb.FunctionHandleMetadata(
                    function_name=method.function_name,
                    function_type=method.function_type,
                    is_method=True,
                    use_method_name=name,
                    function_schema=method.function_schema,
                    supported_input_formats=method.supported_input_formats,
                    supported_output_formats=method.supported_output_formats,
                    web_url=method.web_url,
                    app_id=function.app_id,
                )
                for name, method in definition.method_definitions.items()
            },
        )

    def data(self, function_id: str) -> pb.FunctionData:
        """The definition as newer answers carry it: the fields both messages have, and the definition as its only rank."""
        definition = self.get(function_id).definition
        shared = MessageToDict(definition, preserving_proto_field_name=True)
        data = pb.FunctionData()
        ParseDict(shared, data, ignore_unknown_fields=True)
        data.ranked_functions.append(pb.FunctionData.RankedFunction(rank=0, function=definition))
        return data

    async def _precreate(self, request: pb.FunctionPrecreateRequest, caller: Caller) -> pb.FunctionPrecreateResponse:
        function_id = request.existing_function_id or self._ids.new("fu")
        definition = pb.Function(
            function_name=request.function_name,
            function_type=request.function_type,
            method_definitions=request.method_definitions,
            function_schema=request.function_schema,
            webhook_config=request.webhook_config,
            supported_input_formats=request.supported_input_formats,
            supported_output_formats=request.supported_output_formats,
        )
        if function_id not in self._functions:
            self._functions[function_id] = Deployed(function_id, request.app_id, definition, function_id)
        await self._address(function_id, self._functions[function_id].definition)
        return pb.FunctionPrecreateResponse(function_id=function_id, handle_metadata=self.metadata(function_id))

    async def _create(self, request: pb.FunctionCreateRequest, caller: Caller) -> pb.FunctionCreateResponse:
        function_id = request.existing_function_id or self._ids.new("fu")
        definition = pb.Function()
        definition.CopyFrom(request.function)
        if not request.HasField("function"):
            definition.CopyFrom(request.function_data.ranked_functions[0].function)
        await self._address(function_id, definition)
        self._functions[function_id] = Deployed(function_id, request.app_id, definition, function_id)
        self._bound = {key: bound for key, bound in self._bound.items() if key[0] != function_id}
        return pb.FunctionCreateResponse(
            function_id=function_id, function=definition, function_data=self.data(function_id), handle_metadata=self.metadata(function_id)
        )

    async def _address(self, function_id: str, definition: pb.Function) -> None:
        if definition.webhook_config.type:
            definition.web_url = await self._front(function_id, "")
        for name, method in definition.method_definitions.items():
            if method.webhook_config.type:
                method.web_url = await self._front(function_id, name)

    async def _front(self, function_id: str, method: str) -> str:
        if (function_id, method) not in self._fronts:
            self._fronts[function_id, method] = await self._open_front(function_id, method)
        return self._fronts[function_id, method]

    async def _get_by_id(self, request: pb.FunctionGetByIdRequest, caller: Caller) -> pb.FunctionGetByIdResponse:
        function_id = request.function_id
        return pb.FunctionGetByIdResponse(function=self.data(function_id), handle_metadata=self.metadata(function_id))

    async def _bind(self, request: pb.FunctionBindParamsRequest, caller: Caller) -> pb.FunctionBindParamsResponse:
        key = request.function_id, request.SerializeToString(deterministic=True)
        base = self.get(request.function_id)
        if key not in self._bound:
            bound_id = self._ids.new("fu")
            self._functions[bound_id] = Deployed(bound_id, base.app_id, base.definition, base.id, request.serialized_params)
            self._bound[key] = bound_id
        bound_id = self._bound[key]
        return pb.FunctionBindParamsResponse(bound_function_id=bound_id, handle_metadata=self.metadata(bound_id))

    async def _create_class(self, request: pb.ClassCreateRequest, caller: Caller) -> pb.ClassCreateResponse:
        return pb.ClassCreateResponse(class_id=self._ids.new("cs"), handle_metadata=pb.ClassHandleMetadata())
