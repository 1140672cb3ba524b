"""The real ComfyUI server, headless on a free port, with this pack and the test bed's nodes.

    with Host() as host:
        outputs = host.run(workflow)   # an API-format graph; {node id: what it shows}

Everything that the server writes goes to a scratch folder that is deleted at the end, and the
user's own ComfyUI (COMFYUI_PATH) stays untouched: nodes and models are announced through an
extra paths file.
"""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
NODES = {
    "ComfyUI-FasterCache": ROOT,
    "fastercache_testbed": ROOT / "testbed" / "nodes",
    "fastercache_benchmarks": ROOT / "benchmarks" / "nodes",
}
TRAINED = ROOT / "testbed" / "models"
MODELS = tuple(TRAINED / name for name in ("emoji_mmdit", "emoji_mmdit_turbo8", "emoji_wan"))  # for UNETLoader
LORAS = tuple(TRAINED / name for name in ("emoji_mmdit_turbo4", "emoji_wan_guided"))
START_SECONDS = 180
FAILED_NODE = re.compile(r"Cannot import|IMPORT FAILED|Error while calling comfy_entrypoint|did not return|Skip ")

# Runs the server for as long as the other end of its standard input is open, then deletes the scratch
# folder: however the process that started it ends, nothing stays behind.
LIFELINE = """
import os, runpy, shutil, sys, threading
folder, sys.argv = sys.argv[1], sys.argv[2:]
def watch():
    os.read(0, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
threading.Thread(target=watch, daemon=True).start()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class HostError(Exception):
    """The server, or a node in it, failed; the message is meant for a person."""


@contextlib.contextmanager
def plain_errors():
    """End the program with a message, not a traceback, on Ctrl-C and when the host reports an error."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
    except HostError as error:
        sys.exit(str(error))


def comfyui_path():
    """The ComfyUI tree in use: COMFYUI_PATH, else the one that dev.py fetches."""
    return Path(os.environ.get("COMFYUI_PATH") or ROOT / ".cache" / "comfyui").resolve()


def free_port():
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link_folder(link, target):
    """Make `link` stand for the folder `target`; on Windows a junction, which needs no rights."""
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def rejection(body):
    """One readable message for what the server's answer to a graph complains about; "" for nothing."""
    lines = ["{message} {details}".format(**body["error"]).strip()] if "error" in body else []
    for node_id, node in body.get("node_errors", {}).items():
        lines += [
            "{} (node {}): {}: {}".format(node["class_type"], node_id, error["message"], error["details"])
            for error in node["errors"]
        ]
    return "\n".join(lines)


class Host:
    """A running server; use it as a context manager."""

    def __init__(self, nodes=NODES, models=MODELS, threads=1):
        self.nodes, self.models, self.threads = nodes, models, threads
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self._scratch = tempfile.TemporaryDirectory(prefix="fastercache-host-", ignore_cleanup_errors=True)
        self.folder = Path(self._scratch.name).resolve()
        try:
            self._start()
            self._wait_until_up()
            self._check_nodes()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_):
        self._stop()

    def _start(self):
        """Start the server's process."""
        for name in ("custom_nodes", "input", "output", "temp", "user"):
            (self.folder / name).mkdir()
        for name, folder in self.nodes.items():
            link_folder(self.folder / "custom_nodes" / name, folder)
        # PASSIVE: threads that spin while they wait are tens of times slower on a busy machine.
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        with open(self.folder / "server.log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LIFELINE, str(self.folder), "main.py", *self._arguments()],
                cwd=comfyui_path(),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _arguments(self):
        """The server's command line."""
        paths = self.folder / "paths.yaml"  # JSON is YAML
        paths.write_text(
            json.dumps(
                {
                    "fastercache": {
                        "custom_nodes": str(self.folder / "custom_nodes"),
                        "diffusion_models": "\n".join(map(str, self.models)),
                        "loras": "\n".join(map(str, LORAS)),
                    }
                }
            )
        )
        return [
            "--cpu",
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--disable-all-custom-nodes",
            "--whitelist-custom-nodes",
            *self.nodes,
            "--extra-model-paths-config",
            str(paths),
            "--input-directory",
            str(self.folder / "input"),
            "--output-directory",
            str(self.folder / "output"),
            "--temp-directory",
            str(self.folder),
            "--user-directory",
            str(self.folder / "user"),
            "--database-url",
            f"sqlite:///{self.folder / 'comfyui.db'}",
        ]

    def _wait_until_up(self):
        """Return when the server answers; raise with its log when it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise HostError("ComfyUI ended while it was starting. Its log ends with:\n" + self.log_tail())
            with contextlib.suppress(OSError):
                self._get("/system_stats")
                return
            time.sleep(0.2)
        raise HostError(f"ComfyUI was not up after {START_SECONDS} s. Its log ends with:\n" + self.log_tail())

    def _check_nodes(self):
        """Raise with the log up to the failure when one of our node folders did not import."""
        lines = self.log.splitlines()
        folder = str(self.folder / "custom_nodes")
        failed = [i for i, line in enumerate(lines) if folder in line and FAILED_NODE.search(line)]
        if failed:
            raise HostError("A folder of nodes could not be loaded:\n" + "\n".join(lines[: failed[0] + 1][-25:]))

    def _stop(self):
        """End the server and delete its scratch folder."""
        if hasattr(self, "process"):
            self.process.stdin.close()  # the lifeline
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._scratch.cleanup()

    @property
    def log(self):
        """All that the server has written to its log so far."""
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines=40):
        """The last lines of the server's log."""
        return "\n".join(self.log.splitlines()[-lines:])

    def _get(self, path):
        """The body of a GET request."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=60) as reply:
            return reply.read()

    def object_info(self, node_id):
        """What the server says about a node: its inputs, outputs and texts."""
        return json.loads(self._get(f"/object_info/{node_id}"))[node_id]

    def image(self, ref):
        """The bytes of a file that a node saved; `ref` is {"filename", "subfolder", "type"}."""
        return self._get("/view?" + urllib.parse.urlencode(ref))

    def run(self, workflow, on_progress=None):
        """Run an API-format graph and return {node id: what it shows}.

        `on_progress(value, maximum)` is called while a node reports its progress.
        """
        return asyncio.run(self._run(workflow, on_progress))

    async def _run(self, workflow, on_progress):
        client = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession(self.url) as session,
            session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as events,
        ):
            async with session.post("/prompt", json={"prompt": workflow, "client_id": client}) as reply:
                body = await reply.json()
            if rejection(body):  # the server would still run the parts of the graph that are right
                await session.post("/queue", json={"delete": [body.get("prompt_id")]})
                await session.post("/interrupt")
                raise HostError(rejection(body))
            return await self._follow(events, body["prompt_id"], on_progress)

    async def _follow(self, events, prompt_id, on_progress):
        """Read the server's events until the prompt is done."""
        outputs = {}
        async for message in events:
            event = json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else {"type": "", "data": {}}
            kind, data = event["type"], event["data"]
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "progress" and on_progress:
                on_progress(data["value"], data["max"])
            elif kind == "executed":
                outputs[data["node"]] = data["output"]
            elif kind == "execution_success":
                return outputs
            elif kind == "execution_error":
                raise HostError("{node_type} (node {node_id}): {exception_message}".format(**data))
            elif kind == "execution_interrupted":
                raise HostError("The run was interrupted.")
        raise HostError("ComfyUI ended during a run. Its log ends with:\n" + self.log_tail())


def main():
    """Run the server for a browser until Ctrl-C."""
    with plain_errors(), Host(threads=os.cpu_count()) as host:
        print(f"ComfyUI with this pack: {host.url}   (Ctrl-C ends it)", flush=True)
        host.process.wait()


if __name__ == "__main__":
    main()
