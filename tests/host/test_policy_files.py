"""Policies as files: written whole, read only from their own folders."""

import os
import threading
from dataclasses import replace

import folder_paths
import pytest
from fastercache_pack.fastercache_core.actions import COMPUTE, Action, Step
from fastercache_pack.fastercache_core.calibration.policy import Point, Policy, Setup
from fastercache_pack.nodes.policy import FasterCachePolicyLoad, FasterCachePolicySave, policy_files

STEPS = (COMPUTE, Step(Action.PREDICT), COMPUTE)
POLICY = Policy(Setup("SD3", "euler", "simple", 3, 4.5), (1.0, 0.6, 0.3), (Point(0.01, STEPS),))
UNSAFE = [
    "",
    ".",
    "..",
    "../policy",
    "a/b",
    "a\\b",
    "/etc/passwd",
    "C:\\policy",
    ".hidden",
    "con",
    "NUL.txt",
    "COM\u00b9",
    "a\0b",
    "a\nb",
    "policy ",
    "x" * 200,
    "~root",
]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("output", "input"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda folder=tmp_path / name: str(folder))
    return tmp_path


def save(name, policy=POLICY):
    return FasterCachePolicySave.execute(policy, name).result[0]


def load(name):
    return FasterCachePolicyLoad.execute(name).result[0]


def test_what_is_saved_is_loaded_and_listed(folders):
    path = save("SD3 30 steps")
    assert path == str(folders / "output" / "fastercache" / "SD3 30 steps.json")
    assert policy_files() == ["SD3 30 steps.json"] and load("SD3 30 steps.json") == POLICY
    assert load("SD3 30 steps") == POLICY, "the ending may be left out"
    assert os.listdir(folders / "output" / "fastercache") == ["SD3 30 steps.json"]


def test_a_name_in_any_language_is_fine(folders):
    save("\u7b56\u7565-1")
    assert load("\u7b56\u7565-1") == POLICY


def test_a_letter_and_its_accent_are_one_name_however_they_are_written(folders):
    save("cafe\u0301")
    assert policy_files() == ["caf\u00e9.json"] and load("cafe\u0301") == load("caf\u00e9") == POLICY


@pytest.mark.parametrize("name", ["\u7b56" * 100, "a folder", "read only"])
def test_what_cannot_be_written_is_said_in_one_sentence(folders, name, monkeypatch):
    """A name that is too long for the file system, a folder of that name, a disk that takes nothing."""
    (folders / "output" / "fastercache" / "a folder.json").mkdir(parents=True)
    if name == "read only":
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(
        ValueError, match=f"^FasterCachePolicySave: filename is '{name[:10]}.* cannot be written: .+[.]$"
    ):
        save(name)
    assert isinstance(FasterCachePolicyLoad.validate_inputs(name), str)
    assert os.listdir(folders / "output" / "fastercache") == ["a folder.json"], "nothing half written is left"


def test_two_processes_that_save_one_policy_leave_it_whole(folders):
    """Whoever is last; and nobody reads half of one."""
    policies = [replace(POLICY, setup=replace(POLICY.setup, model="x" * 400 * i)) for i in range(2)]
    save("shared", policies[0])
    savers = [threading.Thread(target=lambda p=p: [save("shared", p) for _ in range(100)]) for p in policies]
    for saver in savers:
        saver.start()
    read = [load("shared") for _ in range(100)]
    for saver in savers:
        saver.join()
    assert all(policy in policies for policy in read) and load("shared") in policies
    assert os.listdir(folders / "output" / "fastercache") == ["shared.json"]


def test_files_put_into_the_input_folder_are_found_too(folders):
    (folders / "input" / "fastercache").mkdir()
    os.replace(save("given"), folders / "input" / "fastercache" / "given.json")
    assert policy_files() == ["given.json"] and load("given") == POLICY


@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_could_lead_elsewhere_is_refused(folders, name):
    with pytest.raises(ValueError, match="FasterCachePolicySave: filename"):
        save(name)
    assert isinstance(FasterCachePolicyLoad.validate_inputs(name), str)


def test_a_link_out_of_the_folder_is_not_followed(folders):
    save("real")
    (folders / "secret.json").write_text("{}")
    link = folders / "output" / "fastercache" / "link.json"
    link.symlink_to(folders / "secret.json")
    for act in (load, save):
        with pytest.raises(ValueError, match="link"):
            act("link")
    assert (folders / "secret.json").read_text() == "{}"


def test_a_missing_file_is_named(folders):
    assert "there is no file 'lost'" in FasterCachePolicyLoad.validate_inputs("lost")


def test_a_file_that_is_no_policy_is_refused(folders):
    path = save("broken")
    with open(path, "w") as file:
        file.write('{"format": "something else"}')
    with pytest.raises(
        ValueError, match=r"^FasterCachePolicyLoad: filename is 'broken'\. This is not a policy of FasterCache\.$"
    ):
        load("broken")


def test_a_changed_file_is_read_again(folders):
    path = save("policy")
    before = FasterCachePolicyLoad.fingerprint_inputs("policy")
    os.utime(path, (1, 1))
    assert FasterCachePolicyLoad.fingerprint_inputs("policy") != before
