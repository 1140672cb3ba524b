"""What the device gave is read at once, or, where the host must not wait, one read later."""

import pytest
import torch
from torch import Tensor

from fastercache_core import readback
from fastercache_core.readback import Readback


def test_values_are_read_at_once() -> None:
    assert Readback().read(torch.tensor([4.0, 5.0]), "now") == ([4.0, 5.0], "now")


def test_late_reads_give_what_was_known_a_read_ago() -> None:
    late = Readback(late=True)
    assert late.read(torch.tensor([1.0]), "first") == (None, None)
    assert late.read(torch.tensor([2.0]), "second") == ([1.0], "first")
    assert late.read(torch.tensor([3.0]), "third") == ([2.0], "second")


def test_what_is_on_its_way_does_not_change_with_the_tensor_it_came_from() -> None:
    late, values = Readback(late=True), torch.tensor([1.0])
    late.read(values, "first")
    values.fill_(9.0)
    assert late.read(values, "second") == ([1.0], "first")


def test_only_the_values_of_the_read_before_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    late, waited = Readback(late=True), []

    class Arrival:
        def __init__(self, value: float) -> None:
            self.value = value

        def synchronize(self) -> None:
            waited.append(self.value)

    def begin_copy(values: Tensor) -> tuple[Tensor, Arrival]:
        return values, Arrival(values.item())

    monkeypatch.setattr(readback, "begin_copy", begin_copy)
    assert late.read(torch.tensor([1.0]), "first") == (None, None) and not waited
    assert late.read(torch.tensor([2.0]), "second") == ([1.0], "first") and waited == [1.0]
    late.reset()
    assert late.read(torch.tensor([3.0]), "third") == (None, None) and waited == [1.0]
