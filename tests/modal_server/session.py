"""What every client asks first."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from tests.modal_server.names import ENVIRONMENT
from tests.modal_server.rpc import Caller, Unary


class Session:
    """Greetings, short-lived tokens and environments, of which there are as many as anybody names."""

    def rpcs(self) -> dict[str, Unary]:
        return {
            "ClientHello": self._hello,
            "AuthTokenGet": self._token,
            "EnvironmentGetOrCreate": self._environment,
            "WorkspaceNameLookup": self._workspace,
        }

    async def _hello(self, request: Empty, caller: Caller) -> pb.ClientHelloResponse:
        return pb.ClientHelloResponse()

    async def _token(self, request: pb.AuthTokenGetRequest, caller: Caller) -> pb.AuthTokenGetResponse:
        head, claims = _part({"alg": "none"}), _part({"exp": time.time() + 3600})
        return pb.AuthTokenGetResponse(token=f"{head}.{claims}.none")

    async def _environment(self, request: pb.EnvironmentGetOrCreateRequest, caller: Caller) -> pb.EnvironmentGetOrCreateResponse:
        name = request.deployment_name or ENVIRONMENT
        settings = pb.EnvironmentSettings(image_builder_version="2025.06")
        return pb.EnvironmentGetOrCreateResponse(environment_id=f"en-{name}", metadata=pb.EnvironmentMetadata(name=name, settings=settings))

    async def _workspace(self, request: Empty, caller: Caller) -> pb.WorkspaceNameLookupResponse:
        return pb.WorkspaceNameLookupResponse(workspace_name="double", username="double")


def _part(value: Mapping[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")
