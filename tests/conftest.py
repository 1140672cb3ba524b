"""For all tests: ComfyUI's modules for tests in this process, and a real server for the others."""

import sys

import pytest

from testbed.server import Host, comfyui_path


def import_comfyui():
    """Make `import comfy` find ComfyUI, set to run on the CPU as if started with --cpu."""
    if not (comfyui_path() / "main.py").is_file():
        pytest.exit(f"There is no ComfyUI at {comfyui_path()}; `python dev.py test` fetches it.", 1)
    sys.path.insert(0, str(comfyui_path()))
    import comfy.options

    comfy.options.enable_args_parsing()
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.cli_args

    sys.argv = arguments
    import utils.extra_config  # noqa: F401  (ComfyUI's nodes.py later hides its own `utils` package)


import_comfyui()


@pytest.fixture(scope="session")
def host():
    """A running ComfyUI with the pack and the test bed's nodes, shared by all tests."""
    with Host() as running:
        yield running
