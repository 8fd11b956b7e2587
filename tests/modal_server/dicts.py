"""Modal's Dicts: shared keys and values, both opaque bytes, with put-if-absent."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from tests.modal_server.names import Names
from tests.modal_server.rpc import Caller, Ids, Streaming, Unary, not_found


class Dicts:
    """Each Dict under its id; a key is what the client made of it."""

    def __init__(self, ids: Ids) -> None:
        self.names = Names("Dict", lambda: ids.new("di"))
        self._dicts: dict[str, dict[bytes, bytes]] = {}

    def rpcs(self) -> dict[str, Unary]:
        return {
            "DictGetOrCreate": self._get_or_create,
            "DictGetById": self._get_by_id,
            "DictList": self._list,
            "DictDelete": self._delete,
            "DictHeartbeat": self._heartbeat,
            "DictGet": self._get,
            "DictContains": self._contains,
            "DictUpdate": self._update,
            "DictPop": self._pop,
            "DictLen": self._len,
            "DictClear": self._clear,
        }

    def streams(self) -> dict[str, Streaming]:
        return {"DictContents": self._contents}

    def _of(self, dict_id: str) -> dict[bytes, bytes]:
        if dict_id not in self._dicts:
            raise not_found(f"Dict {dict_id} not found")
        return self._dicts[dict_id]

    async def _get_or_create(self, request: pb.DictGetOrCreateRequest, caller: Caller) -> pb.DictGetOrCreateResponse:
        dict_id = self.names.get_or_create(request.environment_name, request.deployment_name, request.object_creation_type)
        self._dicts.setdefault(dict_id, {entry.key: entry.value for entry in request.data})
        return pb.DictGetOrCreateResponse(dict_id=dict_id, metadata=pb.DictMetadata(name=request.deployment_name))

    async def _get_by_id(self, request: pb.DictGetByIdRequest, caller: Caller) -> pb.DictGetByIdResponse:
        self._of(request.dict_id)
        return pb.DictGetByIdResponse(dict_id=request.dict_id, metadata=pb.DictMetadata(name=self.names.name_of(request.dict_id)))

    async def _list(self, request: pb.DictListRequest, caller: Caller) -> pb.DictListResponse:
        known = self.names.within(request.environment_name)
        infos = [pb.DictListResponse.DictInfo(name=name, dict_id=dict_id, created_at=time.time()) for name, dict_id in known.items()]
        return pb.DictListResponse(dicts=infos, environment_name=request.environment_name)

    async def _delete(self, request: pb.DictDeleteRequest, caller: Caller) -> Empty:
        self._of(request.dict_id)
        del self._dicts[request.dict_id]
        self.names.forget(request.dict_id)
        return Empty()

    async def _heartbeat(self, request: pb.DictHeartbeatRequest, caller: Caller) -> Empty:
        return Empty()

    async def _get(self, request: pb.DictGetRequest, caller: Caller) -> pb.DictGetResponse:
        value = self._of(request.dict_id).get(request.key)
        return pb.DictGetResponse(found=value is not None, value=value)

    async def _contains(self, request: pb.DictContainsRequest, caller: Caller) -> pb.DictContainsResponse:
        return pb.DictContainsResponse(found=request.key in self._of(request.dict_id))

    async def _update(self, request: pb.DictUpdateRequest, caller: Caller) -> pb.DictUpdateResponse:
        entries = self._of(request.dict_id)
        if request.if_not_exists and any(update.key in entries for update in request.updates):
            return pb.DictUpdateResponse(created=False)
        created = any(update.key not in entries for update in request.updates)
        entries.update({update.key: update.value for update in request.updates})
        return pb.DictUpdateResponse(created=created)

    async def _pop(self, request: pb.DictPopRequest, caller: Caller) -> pb.DictPopResponse:
        value = self._of(request.dict_id).pop(request.key, None)
        return pb.DictPopResponse(found=value is not None, value=value)

    async def _len(self, request: pb.DictLenRequest, caller: Caller) -> pb.DictLenResponse:
        return pb.DictLenResponse(len=len(self._of(request.dict_id)))

    async def _clear(self, request: pb.DictClearRequest, caller: Caller) -> Empty:
        self._of(request.dict_id).clear()
        return Empty()

    async def _contents(self, request: pb.DictContentsRequest, caller: Caller) -> AsyncIterator[pb.DictEntry]:
        for key, value in list(self._of(request.dict_id).items()):
            yield pb.DictEntry(key=key if request.keys else b"", value=value if request.values else b"")
