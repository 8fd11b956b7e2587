"""A double of Modal's control plane, on the protocol that ships in the SDK's own wheel: the SDK runs against it as it is.

    with ModalDouble(tmp_path, env={"HF_HUB_OFFLINE": "1"}) as server:   # from tests.modal_server.server
        server.modal("deploy", "-m", "claas.training.engine.modal_app", env={...})
        client = server.client()
        worker = modal.Cls.from_name("claas", "DistillWorker", client=client)()
        answer = await worker.distill.remote.aio(request)

In one process several servers live side by side: give `client=server.client()` to whatever takes it (`Cls.from_name`,
`Volume.from_name`, `Dict.from_name`, `Secret.from_name`, `FunctionCall.from_id`, `App.deploy`); what hangs on such an object
keeps its client. `modal.Client.from_env()` (where no client is given) reads MODAL_SERVER_URL at its first use and stays with
that server for the whole process, so code under test takes a client, or runs in a process with `server.environment()`. The
objects at the top of an app's module stay with their first server too: deploy such a module once in a process, or with
`server.modal("deploy", ...)` in a process of its own. `server.client(token_secret="wrong")` is refused.

Containers are processes: the SDK's own entry point, in namespaces of their own, each with a private copy of the Volumes that
it mounts. They see `env=`, the image's ENV lines and their secrets, and nothing else of this machine's environment; the code
they run is what the app added with `add_local_python_source`. There are no GPUs. Where namespaces cannot be made
(`processes.containers_possible()`), nothing starts.

To look at: `server.apps.deployed(name)`, `server.images.commands(image_id)`, `server.functions.get(id).definition`,
`server.volumes.folder(name)`, `server.volumes.commits`, `server.secrets.named(name)`, `server.live_containers(app)`,
`server.logs()`, `server.calls["FunctionMap"]`, `server.unimplemented`. To break: `server.faults` and `server.kill_containers()`.
"""
