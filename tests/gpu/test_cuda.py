"""What only a CUDA device shows: copies beside the computation, late results, and the same steps as on a CPU.

python dev.py test gpu
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastercache_core.clock import Clock, Interval
from fastercache_core.controllers.adaptive import AdaptiveSettings
from fastercache_core.controllers.interval import IntervalSettings
from fastercache_core.controllers.planned import MixSettings
from fastercache_core.features.reuse import REUSE_WEIGHTS, ReuseCache, ReuseSettings
from fastercache_core.features.storage import DTYPES, LEAVING, Storage, StorageSettings, Stored
from fastercache_core.readback import Readback
from support.engine import Model, Run, Sampling, all_on
from support.grids import even

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

TOLERANCE = 1e-4  # relative: sums run in another order
PINNED = 2**30
# {name: (settings, an action that must occur)}
CONTROLLERS = {
    "adaptive": (all_on(AdaptiveSettings(42.0), "hedged"), "P"),
    "interval": (all_on(IntervalSettings(Interval(2), Interval(2))), "P"),
    "tolerance": (all_on(IntervalSettings(estimate=Interval(2), tolerance=16e-3)), "E"),
    "features": (all_on(MixSettings(2, "features"), reuse=True), "R"),
    "mixing": (all_on(MixSettings(3, "paper"), "hold", reuse=True), "M"),
}


def run_on(device: str, controller: str, late: bool) -> Run:
    """A run of 30 steps whose tensors are on `device`."""
    model = Model()
    model.noise, model.start, model.turn, *model.changes = (
        x.to(device) for x in (model.noise, model.start, model.turn, *model.changes)
    )
    return Sampling(model, late=late).run(CONTROLLERS[controller][0])


def busy(milliseconds: float = 50.0) -> None:
    """Give the device work for some time, at some two million cycles a millisecond."""
    torch.cuda._sleep(int(milliseconds * 2e6))


def fields(count: int, *shape: int) -> list[Tensor]:
    """Noise on the CPU, the same on every machine."""
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)))


def close(a: Tensor, b: Tensor) -> bool:
    """True where `a` is `b` within TOLERANCE."""
    return bool((a.cpu() - b.cpu()).norm() <= TOLERANCE * b.norm())


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_skipped_steps_are_those_of_the_cpu(controller: str, late: bool) -> None:
    ours, expected = (run_on(device, controller, late) for device in (DEVICE, "cpu"))
    assert ours.letters == expected.letters and CONTROLLERS[controller][1] in ours.letters
    assert close(ours.latent, expected.latent)


def test_a_late_read_gives_the_values_before_and_never_waits_for_what_runs() -> None:
    readback, values = Readback(late=True), torch.arange(3.0, device=DEVICE)
    assert readback.read(values, "first") == (None, None)
    assert readback.read(values + 1, "second") == ([0.0, 1.0, 2.0], "first")
    torch.cuda.synchronize()
    busy()
    assert readback.read(values, "third") == ([1.0, 2.0, 3.0], "second")
    assert not torch.cuda.current_stream().query(), "it waited for the device"


def test_a_read_at_once_gives_the_values_themselves() -> None:
    assert Readback().read(torch.arange(2.0, device=DEVICE), "now") == ([0.0, 1.0], "now")


def put_away(storage: Storage, features: Sequence[Tensor]) -> list[Stored]:
    """Features put to rest while the device is busy; each is overwritten at once."""
    places = []
    for feature in features:
        busy(5.0)
        x = feature.to(DEVICE)
        places.append(storage.put(x))
        x.zero_()
    return places


@pytest.mark.parametrize("limit", [0, PINNED], ids=["pageable", "pinned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_leave_and_come_back_beside_the_computation(dtype: str, limit: int) -> None:
    features = fields(6, 2, 64, 256)
    beside, away = (Storage(StorageSettings(dtype=dtype, device=device)) for device in (None, "cpu"))
    away.pinned_limit = limit
    places = put_away(away, features)
    assert len(away.tensors()) <= LEAVING
    assert all(place.data.device.type == "cpu" and place.data.is_pinned() == bool(limit) for place in places)
    for place, following, feature in zip(places, [*places[1:], None], features):
        if following:
            away.expect(following)
        back = away.get(place)
        assert back.device.type == DEVICE
        assert torch.equal(back, beside.get(beside.put(feature.to(DEVICE))))
        away.drop(place)
    away.settle()
    assert away.tensors() == []


def test_memory_of_a_feature_on_its_way_is_not_handed_out_again() -> None:
    """The computation waits for a copy before the memory that it reads from is used for something else."""
    storage = Storage(StorageSettings(device="cpu"))
    storage.pinned_limit = PINNED
    places = put_away(storage, [torch.full((256, 1024), float(i)) for i in range(20)])
    storage.settle()
    torch.cuda.synchronize()
    assert [place.data.unique().tolist() for place in places] == [[float(i)] for i in range(20)]


@pytest.mark.parametrize("at_rest", [None, "cpu"])
@pytest.mark.parametrize("weight", REUSE_WEIGHTS)
def test_reused_features_are_those_of_the_cpu(weight: str, at_rest: str | None) -> None:
    ours, expected = (reused(weight, device, at_rest) for device in (DEVICE, "cpu"))
    assert len(ours) == len(expected) > 5
    assert all(close(a, b) for a, b in zip(ours, expected))


def reused(weight: str, device: str, at_rest: str | None) -> list[Tensor]:
    """What a feature of two branches is predicted to be wherever it may be reused in a run."""
    settings = ReuseSettings({"self": Interval(2)}, weight, storage=StorageSettings(device=at_rest))
    cache, sigmas = ReuseCache(settings, lambda percent: 1 - percent), even(20)
    clock, site, branches = Clock(sigmas), ("self", 0), ["cond", "uncond"]
    a, b = (x.to(device) for x in fields(2, 4, 16, 32))
    predicted = []
    for sigma in sigmas[:-1]:
        cache.begin(clock.tick(sigma))
        if "self" in cache.reusable(branches):
            [feature] = cache.recall(site, branches)
            predicted.append(feature)
        else:
            cache.begin_record(branches, {"self"})
            cache.store(site, branches, (a * sigma**2 + b,))
    return predicted


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
def test_features_on_a_second_gpu_come_back_as_they_were() -> None:
    storage, [feature] = Storage(StorageSettings(device="cuda:1")), fields(1, 2, 64, 256)
    place = storage.put(feature.to(DEVICE))
    assert place.data.device == torch.device("cuda:1")
    assert torch.equal(storage.get(place).cpu(), feature)
