"""The object store beside the control plane: payloads, and blocks of files by their content, over plain HTTP."""

from __future__ import annotations

import hashlib

from aiohttp import web
from modal_proto import api_pb2 as pb

from tests.modal_server.rpc import Caller, Ids, Unary, not_found

BLOCK = 8 * 1024 * 1024


class Blobs:
    """Bytes by their name, and blocks by their SHA-256; `url` is set once the port is known."""

    def __init__(self, ids: Ids) -> None:
        self.url = ""
        self.blocks: dict[str, bytes] = {}
        self._ids = ids
        self._blobs: dict[str, bytes] = {}

    def rpcs(self) -> dict[str, Unary]:
        return {"BlobCreate": self._create, "BlobGet": self._get}

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(
            [
                web.put("/block/{name}", self._put_block),
                web.put("/blob/{name}", self._put_blob),
                web.get("/blob/{name}", self._get_blob),
                web.get("/block/{name}", self._get_block),
            ]
        )
        return app

    def read(self, blob_id: str) -> bytes:
        """The bytes that were uploaded under this name."""
        if blob_id not in self._blobs:
            raise not_found(f"no blob {blob_id}")
        return self._blobs[blob_id]

    def keep_blocks(self, data: bytes) -> list[str]:
        """Where the blocks of a file can be had, as it is now: they are never changed."""
        blocks = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
        named = {hashlib.sha256(block).hexdigest(): block for block in blocks}
        self.blocks |= named
        return [f"{self.url}/block/{hashlib.sha256(block).hexdigest()}" for block in blocks]

    async def _create(self, request: pb.BlobCreateRequest, caller: Caller) -> pb.BlobCreateResponse:
        name = self._ids.new("bl")
        url = f"{self.url}/blob/{name}"
        return pb.BlobCreateResponse(blob_id=name, upload_url=url, blob_ids=[name], upload_urls=pb.UploadUrlList(items=[url]))

    async def _get(self, request: pb.BlobGetRequest, caller: Caller) -> pb.BlobGetResponse:
        self.read(request.blob_id)
        return pb.BlobGetResponse(download_url=f"{self.url}/blob/{request.blob_id}")

    async def _put_block(self, request: web.Request) -> web.Response:
        data = await request.read()
        if hashlib.sha256(data).hexdigest() != request.match_info["name"]:
            return web.Response(status=400, text="the block is not what its name says")
        self.blocks[request.match_info["name"]] = data
        return web.Response(text="ok")

    async def _put_blob(self, request: web.Request) -> web.Response:
        data = await request.read()
        self._blobs[request.match_info["name"]] = data
        return web.Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    async def _get_blob(self, request: web.Request) -> web.Response:
        data = self._blobs.get(request.match_info["name"])
        return web.Response(status=404) if data is None else web.Response(body=data)

    async def _get_block(self, request: web.Request) -> web.Response:
        data = self.blocks.get(request.match_info["name"])
        return web.Response(status=404) if data is None else web.Response(body=data)
