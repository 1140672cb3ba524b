"""The shipped workflows: each has a picture, and a server accepts its API twin."""

import json
from pathlib import Path

import pytest

from testbed.server import HostError

ROOT = Path(__file__).parents[2]
TITLES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
OWN_WEIGHTS = "ckpt_name"


def twin(title):
    return json.loads((ROOT / "tests" / "workflows" / f"{title}.json").read_text())


def test_there_are_workflows_and_each_has_a_twin():
    twins = sorted(path.stem for path in (ROOT / "tests" / "workflows").glob("*.json"))
    assert TITLES and twins == TITLES


@pytest.mark.parametrize("title", TITLES)
def test_it_has_a_small_picture(title):
    assert 10_000 < (ROOT / "workflows" / f"{title}.jpg").stat().st_size <= 150_000


@pytest.mark.parametrize("title", TITLES)
def test_the_server_accepts_all_but_weights_that_are_not_there(host, title):
    prompt = twin(title)
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 4
    own = any(OWN_WEIGHTS in node["inputs"] for node in prompt.values())
    try:
        host.run(prompt)
        assert not own
    except HostError as refused:
        complaints = str(refused).splitlines()[1:]
        assert own and complaints and all(OWN_WEIGHTS in line and "not in list" in line for line in complaints), refused
