"""The server that demo and tests start: what it says when it fails, and that nothing stays behind."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from testbed.server import ROOT, Host, HostError

PARENT = """
import time
from testbed.server import ROOT, Host
with Host(nodes={"measure": ROOT / "benchmarks" / "nodes"}) as host:
    print(host.port, host.folder, flush=True)
    time.sleep(600)
"""


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_every_node_is_there(host):
    """With the name that the page shows."""
    texts = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert texts
    assert {id: host.object_info(id)["display_name"] for id in texts} == {
        id: text["display_name"] for id, text in texts.items()
    }


def test_a_node_folder_that_does_not_load_is_shown_with_its_reason(tmp_path):
    (tmp_path / "__init__.py").write_text("import a_module_that_is_missing")
    broken = Host(nodes={"broken": tmp_path})
    with pytest.raises(HostError, match="No module named 'a_module_that_is_missing'"):
        broken.__enter__()
    assert not listens(broken.port) and not broken.folder.exists()


def test_a_server_that_does_not_start_shows_its_log(tmp_path, monkeypatch):
    (tmp_path / "main.py").write_text("raise SystemExit('the database is missing')")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(HostError, match="the database is missing"):
        Host(nodes={}).__enter__()


def test_the_server_ends_with_the_process_that_started_it():
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        port, folder = parent.stdout.readline().split()
        assert listens(int(port))
        parent.kill()
    deadline = time.monotonic() + 10
    while listens(int(port)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not listens(int(port)) and not Path(folder).exists()
