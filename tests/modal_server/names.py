"""Names of Modal's objects, each in its environment, and the rules by which one is found or made."""

from __future__ import annotations

from collections.abc import Callable

from grpclib import Status
from modal_proto import api_pb2 as pb

from tests.modal_server.rpc import not_found, refuse

ENVIRONMENT = "main"


class Names:
    """Which id an object of one kind has by its name; objects without a name have only an id."""

    def __init__(self, kind: str, new: Callable[[], str]) -> None:
        self._kind = kind
        self._new = new
        self._ids: dict[tuple[str, str], str] = {}

    def within(self, environment: str) -> dict[str, str]:
        """Name to id."""
        wanted = environment or ENVIRONMENT
        return {name: object_id for (where, name), object_id in self._ids.items() if where == wanted}

    def name_of(self, object_id: str) -> str:
        return next((name for (_, name), known in self._ids.items() if known == object_id), "")

    def get(self, environment: str, name: str) -> str | None:
        return self._ids.get((environment or ENVIRONMENT, name))

    def put(self, environment: str, name: str, object_id: str) -> None:
        self._ids[environment or ENVIRONMENT, name] = object_id

    def forget(self, object_id: str) -> None:
        self._ids = {key: known for key, known in self._ids.items() if known != object_id}

    def get_or_create(self, environment: str, name: str, how: pb.ObjectCreationType.ValueType) -> str:
        """The id; NOT_FOUND or ALREADY_EXISTS as the way of creation says."""
        if how in {pb.OBJECT_CREATION_TYPE_EPHEMERAL, pb.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP}:
            return self._new()
        known = self.get(environment, name)
        where = environment or ENVIRONMENT
        if known is None:
            if how == pb.OBJECT_CREATION_TYPE_UNSPECIFIED:
                raise not_found(f"{self._kind} '{name}' not found in environment '{where}'.")
            known = self._new()
            self.put(environment, name, known)
        elif how == pb.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise refuse(Status.ALREADY_EXISTS, f"{self._kind} '{name}' already exists in environment '{where}'.")
        return known
