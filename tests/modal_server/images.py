"""Images, local files and secrets: recorded as the app declares them; nothing is built.

Containers run this machine's Python. Of an image they see its `ENV` lines and the files added from here.
"""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from tests.modal_server.blobs import Blobs
from tests.modal_server.names import Names
from tests.modal_server.rpc import Caller, Ids, Streaming, Unary, not_found

ROOT = PurePosixPath("/root")


class Images:
    """Each layer under its id, with the Dockerfile commands that would build it."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids
        self._by_content: dict[bytes, str] = {}
        self._layers: dict[str, pb.Image] = {}

    def rpcs(self) -> dict[str, Unary]:
        return {"ImageGetOrCreate": self._get_or_create, "ImageFromId": self._from_id}

    def streams(self) -> dict[str, Streaming]:
        return {"ImageJoinStreaming": self._join}

    def layers(self, image_id: str) -> list[pb.Image]:
        """All the layers of an image, the lowest first."""
        if not image_id:
            return []
        image = self._layers[image_id]
        below = [layer for base in image.base_images for layer in self.layers(base.image_id)]
        return [*below, image]

    def commands(self, image_id: str) -> list[str]:
        """The Dockerfile commands of all its layers, in the order they would run."""
        return [command for layer in self.layers(image_id) for command in layer.dockerfile_commands]

    def environment(self, image_id: str) -> dict[str, str]:
        """What its `ENV` lines set."""
        lines = [command.removeprefix("ENV ") for command in self.commands(image_id) if command.startswith("ENV ")]
        pairs = [pair.partition("=") for line in lines for pair in shlex.split(line)]
        return {name: value for name, _, value in pairs}

    async def _get_or_create(self, request: pb.ImageGetOrCreateRequest, caller: Caller) -> pb.ImageGetOrCreateResponse:
        content = request.image.SerializeToString(deterministic=True)
        image_id = self._by_content.setdefault(content, self._ids.new("im"))
        self._layers[image_id] = request.image
        metadata = pb.ImageMetadata(image_builder_version=request.builder_version)
        return pb.ImageGetOrCreateResponse(image_id=image_id, result=_built(), metadata=metadata)

    async def _from_id(self, request: pb.ImageFromIdRequest, caller: Caller) -> pb.ImageFromIdResponse:
        if request.image_id not in self._layers:
            raise not_found(f"Image {request.image_id} not found")
        return pb.ImageFromIdResponse(image_id=request.image_id)

    async def _join(self, request: pb.ImageJoinStreamingRequest, caller: Caller) -> AsyncIterator[pb.ImageJoinStreamingResponse]:
        yield pb.ImageJoinStreamingResponse(result=_built())


class Mounts:
    """Local files that an app brings along, by their SHA-256."""

    def __init__(self, ids: Ids, blobs: Blobs) -> None:
        self._ids = ids
        self._blobs = blobs
        self._files: dict[str, bytes] = {}
        self._mounts: dict[str, dict[str, str]] = {}

    def rpcs(self) -> dict[str, Unary]:
        return {"MountGetOrCreate": self._get_or_create, "MountBatchedCheckExistence": self._check, "MountPutFile": self._put}

    def write(self, mount_id: str, folder: Path) -> None:
        """Those of its files that belong under /root, into this folder instead."""
        for name, digest in self._mounts.get(mount_id, {}).items():
            if PurePosixPath(name).is_relative_to(ROOT):
                path = folder / PurePosixPath(name).relative_to(ROOT)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self._files[digest])

    def content(self, digest: str) -> bytes:
        """The file with this SHA-256."""
        return self._files[digest]

    def metadata(self, mount_id: str) -> pb.MountHandleMetadata:
        listing = repr(sorted(self._mounts.get(mount_id, {}).items()))
        return pb.MountHandleMetadata(content_checksum_sha256_hex=hashlib.sha256(listing.encode()).hexdigest())

    async def _get_or_create(self, request: pb.MountGetOrCreateRequest, caller: Caller) -> pb.MountGetOrCreateResponse:
        mount_id = self._ids.new("mo")
        self._mounts[mount_id] = {file.filename: file.sha256_hex for file in request.files}
        return pb.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=self.metadata(mount_id))

    async def _check(self, request: pb.MountBatchedCheckExistenceRequest, caller: Caller) -> pb.MountBatchedCheckExistenceResponse:
        missing = [digest for digest in request.sha256_hex_hashes if digest not in self._files]
        return pb.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def _put(self, request: pb.MountPutFileRequest, caller: Caller) -> pb.MountPutFileResponse:
        if request.WhichOneof("data_oneof"):
            data = self._blobs.read(request.data_blob_id) if request.data_blob_id else request.data
            self._files[request.sha256_hex] = data
        return pb.MountPutFileResponse(exists=request.sha256_hex in self._files)


class Secrets:
    """Variables by the id of their secret."""

    def __init__(self, ids: Ids) -> None:
        self.names = Names("Secret", lambda: ids.new("st"))
        self._values: dict[str, dict[str, str]] = {}

    def rpcs(self) -> dict[str, Unary]:
        return {
            "SecretGetOrCreate": self._get_or_create,
            "SecretUpdate": self._update,
            "SecretGetInfo": self._info,
            "SecretList": self._list,
            "SecretDelete": self._delete,
        }

    def environment(self, secret_id: str) -> dict[str, str]:
        """What a container with this secret sees."""
        return dict(self._values.get(secret_id, {}))

    def named(self, name: str, environment: str = "") -> dict[str, str] | None:
        """The values of a secret, for tests to look at."""
        secret_id = self.names.get(environment, name)
        return None if secret_id is None else self.environment(secret_id)

    async def _get_or_create(self, request: pb.SecretGetOrCreateRequest, caller: Caller) -> pb.SecretGetOrCreateResponse:
        secret_id = self.names.get_or_create(request.environment_name, request.deployment_name, request.object_creation_type)
        if secret_id not in self._values or request.object_creation_type == pb.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS:
            self._values[secret_id] = dict(request.env_dict)
        if lacking := sorted(set(request.required_keys) - set(self._values[secret_id])):
            raise not_found(f"Secret '{request.deployment_name}' is missing key(s): {', '.join(lacking)}")
        return pb.SecretGetOrCreateResponse(secret_id=secret_id, metadata=self._metadata(secret_id))

    async def _update(self, request: pb.SecretUpdateRequest, caller: Caller) -> Empty:
        self._values[request.secret_id].update({update.key: update.value for update in request.updates})
        return Empty()

    async def _info(self, request: pb.SecretGetInfoRequest, caller: Caller) -> pb.SecretGetInfoResponse:
        return pb.SecretGetInfoResponse(metadata=self._metadata(request.secret_id))

    async def _list(self, request: pb.SecretListRequest, caller: Caller) -> pb.SecretListResponse:
        known = self.names.within(request.environment_name)
        items = [
            pb.SecretListItem(label=name, secret_id=secret_id, created_at=time.time(), metadata=self._metadata(secret_id))
            for name, secret_id in known.items()
        ]
        return pb.SecretListResponse(items=items, environment_name=request.environment_name)

    async def _delete(self, request: pb.SecretDeleteRequest, caller: Caller) -> Empty:
        self._values.pop(request.secret_id, None)
        self.names.forget(request.secret_id)
        return Empty()

    def _metadata(self, secret_id: str) -> pb.SecretMetadata:
        return pb.SecretMetadata(name=self.names.name_of(secret_id), keys=sorted(self._values.get(secret_id, {})))


def _built() -> pb.GenericResult:
    return pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_SUCCESS)
