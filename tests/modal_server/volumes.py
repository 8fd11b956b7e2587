"""Modal's Volumes, of both versions: a committed state that all see, and a working copy in each container that mounts one.

Commit and reload are the only exchange: a commit publishes the files that changed in this container since it last
looked (so the last write of a file wins), a reload brings what others committed, and fails while a file is open.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

from google.protobuf.empty_pb2 import Empty
from grpclib import Status
from modal_proto import api_pb2 as pb

from tests.modal_server.blobs import BLOCK, Blobs
from tests.modal_server.images import Mounts
from tests.modal_server.names import Names
from tests.modal_server.processes import File
from tests.modal_server.rpc import Caller, Ids, Streaming, Unary, not_found, refuse

Signature = tuple[int, int, int]
_VERSIONS = {1: pb.VOLUME_FS_VERSION_V1, 2: pb.VOLUME_FS_VERSION_V2}


class WorkingCopy:
    """One container's view of a Volume: a folder, and what each file in it was when the container last looked."""

    def __init__(self, committed: Path, folder: Path) -> None:
        self.folder = folder
        self._committed = committed
        folder.mkdir(parents=True)
        self.reload()

    def reload(self) -> None:
        """All that others committed; what this container did not commit is gone."""
        for child in self.folder.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        shutil.copytree(self._committed, self.folder, dirs_exist_ok=True, symlinks=True)
        self._seen = _signatures(self.folder)

    def commit(self) -> list[str]:
        """Publishes the files that changed here, and removes those that were removed here; says which."""
        now = _signatures(self.folder)
        changed = sorted(path for path, signature in now.items() if self._seen.get(path) != signature)
        gone = sorted(set(self._seen) - set(now))
        for path in changed:
            write(self._committed / path, (self.folder / path).read_bytes())
        for path in gone:
            (self._committed / path).unlink(missing_ok=True)
        for folder in {parent for path in gone for parent in Path(path).parents if parent != Path()}:
            if not (self.folder / folder).exists() and (self._committed / folder).is_dir():
                remove_if_empty(self._committed / folder)
        for folder in self.folder.rglob("*"):
            if folder.is_dir():
                (self._committed / folder.relative_to(self.folder)).mkdir(parents=True, exist_ok=True)
        self._seen = now
        return changed + gone

    def files(self) -> set[File]:
        """All the files here, as `processes.open_files` knows them."""
        return {(path.stat().st_ino, path.name) for path in self.folder.rglob("*") if path.is_file()}


class Volumes:
    """Each Volume under its id: a folder with its committed state."""

    def __init__(self, ids: Ids, blobs: Blobs, mounts: Mounts, folder: Path, version: int) -> None:
        self.names = Names("Volume", lambda: ids.new("vo"))
        self.commits: list[tuple[str, list[str]]] = []
        # Modal says only that a reload may commit what was not: by default it is gone here.
        self.reload_commits = False
        self._folder = folder
        self._blobs, self._mounts = blobs, mounts
        self._default = _VERSIONS[version]
        self._versions: dict[str, pb.VolumeFsVersion.ValueType] = {}
        self._copies: dict[tuple[str, str], WorkingCopy] = {}
        self._open_files: Callable[[str], set[File]] = lambda _: set()

    def watch_open_files(self, of_task: Callable[[str], set[File]]) -> None:
        """How the files that a container holds open are known."""
        self._open_files = of_task

    def rpcs(self) -> dict[str, Unary]:
        return {
            "VolumeGetOrCreate": self._get_or_create,
            "VolumeGetById": self._get_by_id,
            "VolumeList": self._list,
            "VolumeDelete": self._delete,
            "VolumeHeartbeat": self._heartbeat,
            "VolumeCommit": self._commit,
            "VolumeReload": self._reload,
            "VolumeGetFile2": self._get_file,
            "VolumePutFiles2": self._put_files,
            "VolumeRemoveFile2": self._remove_file,
            "VolumeCopyFiles2": self._copy_files,
            "VolumePutFiles": self._put_files_1,
            "VolumeRemoveFile": self._remove_file,
            "VolumeCopyFiles": self._copy_files,
        }

    def streams(self) -> dict[str, Streaming]:
        return {"VolumeListFiles2": self._list_files, "VolumeListFiles": self._list_files_1}

    def folder(self, name: str, environment: str = "") -> Path:
        """The committed state of the Volume of this name, for tests to look at."""
        volume_id = self.names.get(environment, name)
        assert volume_id is not None, f"no Volume {name}"
        return self._store(volume_id)

    def mount(self, volume_id: str, task_id: str, folder: Path) -> Path:
        """A working copy for this container."""
        self._copies[task_id, volume_id] = WorkingCopy(self._store(volume_id), folder)
        return folder

    def metadata(self, volume_id: str) -> pb.VolumeMetadata:
        return pb.VolumeMetadata(version=self._versions[volume_id], name=self.names.name_of(volume_id))

    def _store(self, volume_id: str) -> Path:
        folder = self._folder / volume_id
        if not folder.is_dir():
            raise not_found(f"Volume {volume_id} not found")
        return folder

    def _path(self, volume_id: str, path: str) -> Path:
        store = self._store(volume_id)
        found = Path(os.path.normpath(store / path.strip("/")))
        if found != store and store not in found.parents:
            raise refuse(Status.INVALID_ARGUMENT, f"the path {path} leaves the Volume")
        return found

    def _existing(self, volume_id: str, path: str) -> Path:
        found = self._path(volume_id, path)
        if not found.exists():
            raise not_found(f"{path}: No such file or directory")
        return found

    async def _get_or_create(self, request: pb.VolumeGetOrCreateRequest, caller: Caller) -> pb.VolumeGetOrCreateResponse:
        volume_id = self.names.get_or_create(request.environment_name, request.deployment_name, request.object_creation_type)
        self._versions.setdefault(volume_id, request.version or self._default)
        (self._folder / volume_id).mkdir(parents=True, exist_ok=True)
        metadata = self.metadata(volume_id)
        return pb.VolumeGetOrCreateResponse(volume_id=volume_id, version=metadata.version, metadata=metadata)

    async def _get_by_id(self, request: pb.VolumeGetByIdRequest, caller: Caller) -> pb.VolumeGetByIdResponse:
        self._store(request.volume_id)
        return pb.VolumeGetByIdResponse(volume_id=request.volume_id, metadata=self.metadata(request.volume_id))

    async def _list(self, request: pb.VolumeListRequest, caller: Caller) -> pb.VolumeListResponse:
        known = self.names.within(request.environment_name)
        items = [pb.VolumeListItem(label=name, volume_id=v, created_at=time.time(), metadata=self.metadata(v)) for name, v in known.items()]
        return pb.VolumeListResponse(items=items, environment_name=request.environment_name)

    async def _delete(self, request: pb.VolumeDeleteRequest, caller: Caller) -> Empty:
        shutil.rmtree(self._store(request.volume_id))
        self.names.forget(request.volume_id)
        return Empty()

    async def _heartbeat(self, request: pb.VolumeHeartbeatRequest, caller: Caller) -> Empty:
        return Empty()

    def _copy_of(self, caller: Caller, volume_id: str, what: str) -> WorkingCopy:
        copy = self._copies.get((caller.task_id or "", volume_id))
        if copy is None:
            raise refuse(Status.FAILED_PRECONDITION, f"{what} can only be called from a running function that mounts the Volume")
        return copy

    async def _commit(self, request: pb.VolumeCommitRequest, caller: Caller) -> pb.VolumeCommitResponse:
        self._store(request.volume_id)
        changed = self._copy_of(caller, request.volume_id, "commit()").commit()
        self.commits.append((str(caller.task_id), changed))
        return pb.VolumeCommitResponse(skip_reload=self._versions[request.volume_id] == pb.VOLUME_FS_VERSION_V2)

    async def _reload(self, request: pb.VolumeReloadRequest, caller: Caller) -> Empty:
        self._store(request.volume_id)
        copy = self._copy_of(caller, request.volume_id, "reload()")
        if held := self._open_files(str(caller.task_id)) & copy.files():
            names = ", ".join(sorted(name for _, name in held))
            raise refuse(Status.FAILED_PRECONDITION, f"there are open files preventing the operation: {names}")
        if self.reload_commits:
            self.commits.append((str(caller.task_id), copy.commit()))
        copy.reload()
        return Empty()

    async def _list_files(self, request: pb.VolumeListFiles2Request, caller: Caller) -> AsyncIterator[pb.VolumeListFiles2Response]:
        yield pb.VolumeListFiles2Response(entries=self._entries(request.volume_id, request.path, request.recursive))

    async def _list_files_1(self, request: pb.VolumeListFilesRequest, caller: Caller) -> AsyncIterator[pb.VolumeListFilesResponse]:
        yield pb.VolumeListFilesResponse(entries=self._entries(request.volume_id, request.path, request.recursive))

    def _entries(self, volume_id: str, path: str, recursive: bool) -> list[pb.FileEntry]:
        root, store = self._existing(volume_id, path), self._store(volume_id)
        return [_entry(found, store) for found in _listed(root, recursive)]

    async def _get_file(self, request: pb.VolumeGetFile2Request, caller: Caller) -> pb.VolumeGetFile2Response:
        path = self._existing(request.volume_id, request.path)
        if not path.is_file():
            raise not_found(f"{request.path} is not a file")
        data = path.read_bytes()
        return pb.VolumeGetFile2Response(get_urls=self._blobs.keep_blocks(data), size=len(data), start=0, len=len(data))

    async def _put_files(self, request: pb.VolumePutFiles2Request, caller: Caller) -> pb.VolumePutFiles2Response:
        paths = self._targets(request.volume_id, [file.path for file in request.files], request.disallow_overwrite_existing_files)
        missing = [
            pb.VolumePutFiles2Response.MissingBlock(file_index=i, block_index=j, put_url=f"{self._blobs.url}/block/{digest}")
            for i, file in enumerate(request.files)
            for j, digest in enumerate(block.contents_sha256.hex() for block in file.blocks)
            if digest not in self._blobs.blocks
        ]
        if not missing:
            for path, file in zip(paths, request.files, strict=True):
                blocks = [self._blobs.blocks[block.contents_sha256.hex()].ljust(BLOCK, b"\0") for block in file.blocks]
                write(path, b"".join(blocks)[: file.size])
        return pb.VolumePutFiles2Response(missing_blocks=missing)

    async def _put_files_1(self, request: pb.VolumePutFilesRequest, caller: Caller) -> Empty:
        names = [file.filename for file in request.files]
        paths = self._targets(request.volume_id, names, request.disallow_overwrite_existing_files)
        for path, file in zip(paths, request.files, strict=True):
            write(path, self._mounts.content(file.sha256_hex))
        return Empty()

    def _targets(self, volume_id: str, names: list[str], new: bool) -> list[Path]:
        paths = [self._path(volume_id, name) for name in names]
        if new and (there := next((path for path in paths if path.exists()), None)):
            raise refuse(Status.ALREADY_EXISTS, f"{there.name} already exists")
        return paths

    async def _remove_file(self, request: pb.VolumeRemoveFile2Request, caller: Caller) -> Empty:
        path = self._existing(request.volume_id, request.path)
        if path.is_dir() and not request.recursive:
            raise refuse(Status.INVALID_ARGUMENT, f"{request.path} is a directory: remove it recursively")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return Empty()

    async def _copy_files(self, request: pb.VolumeCopyFiles2Request, caller: Caller) -> Empty:
        target = self._path(request.volume_id, request.dst_path)
        for source in (self._existing(request.volume_id, path) for path in request.src_paths):
            to = target / source.name if target.is_dir() or len(request.src_paths) > 1 else target
            if source.is_dir():
                shutil.copytree(source, to, dirs_exist_ok=True)
            else:
                write(to, source.read_bytes())
        return Empty()


def write(path: Path, data: bytes) -> None:
    """The whole file at once: nobody sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    half.write_bytes(data)
    half.replace(path)


def remove_if_empty(folder: Path) -> None:
    """Nothing happens to a folder that holds something."""
    if not any(folder.iterdir()):
        folder.rmdir()


def _signatures(folder: Path) -> dict[str, Signature]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): _signature(path) for path in files}


def _signature(path: Path) -> Signature:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _listed(root: Path, recursive: bool) -> Iterable[Path]:
    if root.is_file():
        return [root]
    return sorted(path for path in (root.rglob("*") if recursive else root.iterdir()) if not path.name.endswith(".half"))


def _entry(path: Path, store: Path) -> pb.FileEntry:
    stat = path.stat()
    kind = pb.FileEntry.DIRECTORY if path.is_dir() else pb.FileEntry.FILE
    return pb.FileEntry(path=str(path.relative_to(store)), type=kind, size=stat.st_size, mtime=int(stat.st_mtime))
