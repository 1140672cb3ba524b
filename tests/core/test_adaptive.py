"""The adaptive controller: skips as much as the target allows, and no more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastercache_core.actions import Action
from fastercache_core.clock import Clock, Evaluation, Window
from fastercache_core.controllers.adaptive import (
    FLOOR,
    FLOOR_NOISY,
    FLOOR_UNCORRECTED,
    LONGEST_REUSE,
    AdaptiveSettings,
    floor,
)
from fastercache_core.features.probe import LATER, WAIT, Probe
from fastercache_core.protocols import Controller, RunContext, Signals
from fastercache_core.solvers import SOLVERS, Solver
from support import grids

STEPS = 30
EULER, UNCORRECTED = SOLVERS["sample_euler"], Solver()
Error = float | tuple[float, ...]


@dataclass
class Known:
    """What the controller sees of a signal: how many values it has, and the error of its last forecast, [batch]."""

    error: Tensor
    known: int = 3


def signal(*errors: float) -> Known:
    return Known(torch.tensor(errors))


def probed(error: float, deep: bool = True) -> Probe:
    """A Probe of features that gave this error for each evaluation of their age."""
    probe = Probe()
    probe.observe(Evaluation(0, 1.0, 0.0, False), torch.tensor([error]), 1, deep)
    return probe


def controller(
    target: float = 42.0, solver: Solver = EULER, late: bool = False, predicts: bool = True, **settings: Any
) -> Controller:
    context = RunContext(lambda percent: 1 - percent, solver, (), late, predicts)
    return AdaptiveSettings(target, **settings).controller(context)


def sample(*args: Any, **settings: Any) -> str:
    """One letter for every evaluation of a run; see `run`."""
    return run(*args, **settings)[0]


def run(
    error: Callable[[int], Error] | None,
    target: float = 42.0,
    solver: Solver = EULER,
    steps: int = STEPS,
    probe: Probe | None = None,
    sigmas: Sequence[float] = (),
    **settings: Any,
) -> tuple[str, float | None]:
    """One letter for every evaluation of a run at `sigmas`, even ones where none are given, and what it spent.

    error(ordinal): of the latent's slope, by a forecast for the next evaluation, a float or one for each picture;
    it grows with the gap. None: nothing can be predicted.
    """
    chooses, clock, done = controller(target, solver, **settings), Clock(sigmas or grids.even(steps)), ""

    def known(ordinal: int) -> Signals:
        gap = len(done) - done.rfind("C", 0, -1) - 1 if "C" in done[:-1] else 1
        now = error(ordinal) if error else ()
        output = signal(*(e * gap for e in (now if isinstance(now, tuple) else (now,)))) if error else None
        return Signals(output, [], probe) if ordinal > 1 else Signals(None, [])

    for ordinal in range(len(clock.grid)):
        evaluation = clock.tick(clock.grid[ordinal])
        action = chooses.choose(evaluation, known(ordinal)).action
        chooses.took(evaluation, action)
        done += action.letter
    return done, chooses.finish(known(len(done)))


def gaps(letters: str) -> list[int]:
    """Lengths of the gaps, in order."""
    return [b - a for a, b in pairwise(i for i, letter in enumerate(letters) if letter == "C")]


def cost(letters: str) -> float:
    return letters.count("C") / len(letters)


def spent(letters: str, error: Callable[[int], float]) -> float:
    """The sum of squared errors of all gaps of a run with even sigmas."""
    lengths = gaps(letters)
    return sum((error(end) * gap * gap / STEPS) ** 2 for gap, end in zip(lengths, accumulate(lengths)) if gap > 1)


def budget(target: float, solver: Solver = EULER) -> float:
    return solver.law.budget(target)


# The target


@pytest.mark.parametrize("error", [0.01, 0.05, 0.2])
def test_the_higher_the_target_the_more_is_computed(error: float) -> None:
    costs = [cost(sample(lambda _: error, target)) for target in (30, 35, 40, 45, 50, 55, 60, 65, 80)]
    assert costs == sorted(costs) and costs[0] < 0.5 < costs[-1]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("target", [35, 42])
def test_a_run_tells_what_all_its_gaps_have_spent(target: float, late: bool) -> None:
    letters, total = run(lambda _: 0.05, target, late=late)
    assert letters.count("P") > 3 and total == pytest.approx(spent(letters, lambda _: 0.05)) and total <= budget(target)


def test_a_run_that_skips_nothing_has_spent_nothing() -> None:
    assert run(lambda _: 0.5, 60) == ("C" * STEPS, 0.0)


def test_what_cannot_be_reached_by_skipping_is_sampled_in_full() -> None:
    assert sample(lambda _: 0.5, 60) == "C" * STEPS


def test_the_lowest_target_depends_on_what_the_sampler_makes_of_errors() -> None:
    lowest = {name: floor(solver) for name, solver in SOLVERS.items()}
    assert lowest["sample_euler"] == lowest["sample_dpmpp_2m"] == lowest["sample_res_multistep"] == FLOOR == 30.0
    assert lowest["sample_euler_ancestral"] == lowest["sample_dpmpp_sde"] == FLOOR_NOISY == 36.0
    assert lowest["sample_heun"] == lowest["sample_deis"] == FLOOR_UNCORRECTED == 42.0


@pytest.mark.parametrize("target", [35, 40, 45, 50, 55])
@pytest.mark.parametrize("error", [0.01, 0.05, 0.2])
def test_squared_errors_add_up_to_no_more_than_the_target_allows(error: float, target: float) -> None:
    assert spent(sample(lambda _: error, target), lambda _: error) <= budget(target) * (1 + 1e-6)


@pytest.mark.parametrize("growth, target", [(1.3, 55), (1.4, 45), (1.5, 40), (1.5, 55)])
def test_no_more_is_spent_than_allowed_where_errors_grow_from_gap_to_gap(growth: float, target: float) -> None:
    """Towards the end of a run without guidance they may double with each gap: the last one is known too late."""
    error = lambda n: 0.002 * growth ** max(n - 14, 0)
    letters = sample(error, target)
    assert max(gaps(letters)) > 3 and spent(letters, error) <= 4 * budget(target)


@pytest.mark.parametrize("error", [0.02, 0.05, 0.1])
def test_a_gap_grows_by_one_at_a_time(error: float) -> None:
    lengths = gaps(sample(lambda _: error, 36, steps=50))[:-1]
    assert max(lengths) > 2 and all(after <= before + 1 for before, after in pairwise(lengths))


def test_gaps_are_no_longer_than_allowed() -> None:
    for longest in (2, 3, 6):
        assert max(gaps(sample(lambda _: 1e-6, 30, steps=50, longest=longest))) == longest
    assert max(gaps(sample(lambda _: 1e-6, 42, UNCORRECTED, steps=50))) == 2, "where errors are not corrected"


LTX = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]
UNEVEN = {
    "LTX": LTX,
    "linear_quadratic": grids.linear_quadratic(20),
    "beta": grids.beta(24, 8.0),
    "simple": grids.simple(30, 8.0),
}


@pytest.mark.parametrize("name", list(UNEVEN))
def test_an_error_seen_on_small_steps_is_not_carried_to_far_larger_ones(name: str) -> None:
    sigmas = UNEVEN[name]
    letters = sample(lambda _: 1e-6, sigmas=sigmas)
    computed = [sigma for sigma, letter in zip(sigmas, letters) if letter == "C"]
    spans = [a - b for a, b in pairwise(computed)]
    skipping = [i for i, n in enumerate(gaps(letters)) if n > 1]
    assert skipping and all(spans[i] <= 4.1 * spans[i - 1] for i in skipping)


def held(sigmas: Sequence[float], target: float = 42.0, others: Sequence[Any] = (), **kinds: Any) -> str:
    """One letter for every evaluation until the second computed one, of a run whose every error is small."""
    chooses, clock, done = controller(target, **kinds), Clock(sigmas), ""
    while done.count("C") < 2:
        evaluation = clock.tick(clock.grid[len(done)])
        known = Signals(Known(None, 1), others) if done else Signals(None, [])
        action = chooses.choose(evaluation, known).action
        chooses.took(evaluation, action)
        done += action.letter
    return done


def test_after_the_first_evaluation_only_small_steps_are_skipped() -> None:
    assert held(LTX) == "CPPPC" and held(LTX, 70) == "CC"
    assert held(grids.even(STEPS)) == held(grids.simple(8, 3.0)) == "CC"
    assert held(LTX, others=[Known(None, 1)]) == "CC", "how much guidance makes of an error is not known yet"
    assert held(LTX, window=Window(0.5, 1.0)) == "CC"


def test_where_noise_is_added_steps_are_predicted_only_without_other_branches() -> None:
    noisy = SOLVERS["sample_euler_ancestral"]
    chooses, clock = controller(36.0, noisy), Clock(grids.even(STEPS))
    for others, action in (([], Action.PREDICT), ([signal(1e-4)], Action.ESTIMATE)):
        chooses.reset()
        for _ in range(2):
            evaluation = clock.tick(clock.grid[clock.ordinal + 1])
            chosen = chooses.choose(evaluation, Signals(signal(1e-4), others)).action
            chooses.took(evaluation, chosen)
        assert chosen is action


def test_skipping_stops_when_forecasts_become_bad() -> None:
    letters = sample(lambda ordinal: 0.05 if ordinal < 15 else 5.0, 42)
    assert "P" in letters[:15] and "P" not in letters[20:]


def test_a_bad_beginning_is_waited_for() -> None:
    letters = sample(lambda ordinal: 5.0 if ordinal < 12 else 0.05, 42)
    assert "P" not in letters[:12] and "P" in letters[12:]


def test_the_error_that_a_gap_had_counts_not_the_expected_one() -> None:
    jumpy = lambda ordinal: 0.05 if ordinal < 8 else 1.0 if ordinal < 11 else 0.05
    assert cost(sample(jumpy, 55)) > cost(sample(lambda _: 0.05, 55))


def test_uncorrected_errors_allow_less() -> None:
    assert cost(sample(lambda _: 0.05, 42, UNCORRECTED)) > cost(sample(lambda _: 0.05, 42))


def test_outside_the_window_and_at_the_end_nothing_is_skipped() -> None:
    letters = sample(lambda _: 1e-3, 35, window=Window(0.5, 0.8))
    assert "P" not in letters[:15] + letters[25:] and "P" in letters[15:24]
    assert sample(lambda _: 1e-3, 35)[-1] == "C"


def test_where_steps_may_not_be_predicted_branches_are_estimated() -> None:
    predicted = sample(lambda _: 0.01, 42, UNCORRECTED)
    assert sample(lambda _: 0.01, 42, UNCORRECTED, predicts=False) == predicted.replace("P", "E") != predicted


def test_a_batch_counts_as_a_whole() -> None:
    for target in (36, 42, 50):
        assert sample(lambda _: (0.03, 0.04), target) == sample(lambda _: 0.00125**0.5, target)


def test_errors_of_all_signals_add_up() -> None:
    """For each picture: a run with two signals does what one does whose error is their sum."""

    def letters(signals: Callable[[], list[Known]]) -> str:
        chooses, clock, done = controller(45.0), Clock(grids.even(STEPS)), ""
        for ordinal in range(STEPS):
            evaluation = clock.tick(clock.grid[ordinal])
            output, *others = signals() if ordinal > 1 else [None]
            action = chooses.choose(evaluation, Signals(output, others)).action
            chooses.took(evaluation, action)
            done += action.letter
        return done

    together = letters(lambda: [signal(0.4, 0.2), signal(0.2, 0.2)])
    assert together == letters(lambda: [signal(0.6, 0.4)])
    assert together != letters(lambda: [signal(0.4, 0.2)]) and "P" in together


def test_nothing_is_skipped_before_every_signal_has_two_values() -> None:
    for first, second in ((1, 3), (3, 1)):
        chooses, clock = controller(30.0), Clock(grids.even(STEPS))
        signals = Signals(Known(torch.tensor([1e-6]), first), [Known(torch.tensor([1e-6]), second)])
        for sigma in clock.grid[:5]:
            evaluation = clock.tick(sigma)
            assert chooses.choose(evaluation, signals).action is Action.COMPUTE
            chooses.took(evaluation, Action.COMPUTE)
        assert chooses.choose(clock.tick(0.8), Signals(signal(1e-6), [None])).action is Action.COMPUTE


@pytest.mark.parametrize("bad", [None, 10])
def test_of_two_calls_a_step_the_one_at_a_sigma_visited_before_is_skipped(bad: int | None) -> None:
    """bad: where a forecast was bad once, so that both calls of a step are computed."""
    sigmas = grids.even(STEPS)[:-1]
    chooses, clock = controller(45.0, UNCORRECTED), Clock([*sigmas, 0.0])
    calls, skipped = [sigmas[0], *(s for s in sigmas[1:] for _ in range(2))], []
    for number, sigma in enumerate(calls):
        evaluation = clock.tick(sigma)
        output = signal(0.4 if number == bad else 0.01) if number > 1 else None
        action = chooses.choose(evaluation, Signals(output, [])).action
        chooses.took(evaluation, action)
        skipped += [number] if action is Action.PREDICT else []
    assert len(skipped) > STEPS / 2 and bad not in skipped
    assert all(calls[n] == calls[n - 1] for n in skipped)


# Reading from the device


class OnDevice(torch.Tensor):
    """A tensor that counts how often the host reads values from it, or from what was made of it."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.__bool__):
            OnDevice.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("signals", [1, 3])
def test_the_device_is_read_once_for_each_gap(signals: int) -> None:
    OnDevice.reads = 0
    chooses, clock, done = controller(35.0), Clock(grids.even(STEPS)), ""
    for ordinal in range(STEPS):
        evaluation = clock.tick(clock.grid[ordinal])
        output, *others = [Known(torch.tensor([1e-4]).as_subclass(OnDevice)) for _ in range(signals)]
        known = Signals(output, others, probed(5.0, deep=False)) if ordinal > 1 else Signals(None, [])
        action = chooses.choose(evaluation, known).action
        chooses.took(evaluation, action)
        done += action.letter
    decisions = done[1:].count("C") - 1  # after each computed evaluation but the first and the last
    assert OnDevice.reads == decisions < 14


def test_beside_a_compiled_model_decisions_follow_from_what_was_known_a_gap_ago() -> None:
    early = lambda ordinal: 0.05 if ordinal < 15 else 5.0
    assert "P" in sample(early, 42, late=True)[:15] and "P" not in sample(early, 42, late=True)[22:]
    assert sample(early, 42, late=True) != sample(early, 42)
    now, late = sample(lambda _: 0.03, 56), sample(lambda _: 0.03, 56, late=True)
    assert late.count("C") > now.count("C"), "and begins that much later"


def test_beside_a_compiled_model_what_was_on_its_way_is_forgotten_at_a_change() -> None:
    chooses, clock = controller(36.0, late=True), Clock(grids.even(10))
    chosen = []
    for ordinal in range(6):
        evaluation = clock.tick(clock.grid[ordinal])
        if ordinal == 3:
            chooses.reset()
        chosen.append(chooses.choose(evaluation, Signals(signal(0.001) if ordinal else None, [])).action)
        chooses.took(evaluation, Action.COMPUTE)
    assert chosen == [Action.COMPUTE, Action.COMPUTE, Action.PREDICT] * 2


# Features


def test_where_forecasts_are_bad_good_features_are_reused() -> None:
    letters = sample(lambda _: 5.0, 36, UNCORRECTED, probe=probed(0.02))
    assert "P" not in letters and letters.count("R") > STEPS / 3 and "R" * LONGEST_REUSE not in letters
    assert sample(None, 36, UNCORRECTED, probe=probed(0.02)) == letters, "also where nothing can be predicted at all"


def test_bad_features_are_not_reused() -> None:
    assert sample(lambda _: 5.0, 42, UNCORRECTED, probe=probed(5.0)) == "C" * STEPS
    assert sample(lambda _: 5.0, 42, UNCORRECTED, probe=Probe()) == "C" * STEPS, "nor those that were never probed"


def test_deep_features_are_reused_rather_than_only_the_negative_pass_skipped() -> None:
    skipping = sample(lambda _: 0.01, 42, UNCORRECTED, predicts=False)
    assert "E" in skipping
    deep = sample(lambda _: 0.01, 42, UNCORRECTED, probe=probed(0.01), predicts=False)
    assert "R" in deep and "E" not in deep
    shallow = sample(lambda _: 0.01, 42, UNCORRECTED, probe=probed(0.01, deep=False), predicts=False)
    assert shallow == skipping


def test_the_higher_the_target_the_fewer_features_are_reused() -> None:
    counts = [sample(None, target, UNCORRECTED, probe=probed(0.03)).count("R") for target in (36, 42, 48, 54)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def follow(errors: Sequence[float], filled: Sequence[Action], target: float = 36.0) -> list[Action]:
    """What is chosen at every evaluation of a run without forecasts whose features have these errors, one for each
    evaluation of their age, where `filled` was done in place of the first choices."""
    chooses, clock, chosen = controller(target, UNCORRECTED), Clock(grids.even(10)), []
    for ordinal, error in enumerate(errors):
        evaluation = clock.tick(clock.grid[ordinal])
        chosen.append(chooses.choose(evaluation, Signals(None, [], probed(error))).action)
        chooses.took(evaluation, filled[ordinal] if ordinal < len(filled) else chosen[-1])
    return chosen


def test_what_features_did_is_taken_from_the_budget() -> None:
    """Features two evaluations old over a span of 0.2, with an error of 0.3 each: (0.3 * 2 * 0.2)^2 of 0.01."""
    reused = [Action.COMPUTE, Action.REUSE, Action.COMPUTE]
    after = follow([0.1, 0.1, 0.1, 0.3, *[0.02] * 5], reused)[4:]
    assert set(after) == {Action.COMPUTE}, "nothing is left of the budget, however good features are now"
    assert Action.REUSE in follow([0.1, 0.1, 0.1, 0.1, *[0.02] * 5], reused)[4:], "a third of the error costs a ninth"


def test_an_error_of_features_counts_with_their_age_over_the_span_of_the_gap() -> None:
    """(0.1 * 2 * 0.2)^2 = 0.0016: with a budget just below nothing is left, with one just above there is."""
    reused = [Action.COMPUTE, Action.REUSE, Action.COMPUTE]
    errors = [0.02, 0.02, 0.1, 0.1, *[1e-4] * 5]
    target = lambda left: UNCORRECTED.law.low - 10 * torch.log10(torch.tensor(left)).item()
    enough, too_little = (follow(errors, reused, target(left))[4:] for left in (0.0016 * 1.01, 0.0016 * 0.99))
    assert Action.REUSE in enough and set(too_little) == {Action.COMPUTE}


def test_a_window_that_was_away_spent_nothing() -> None:
    """A window of a long video comes back after some evaluations: they were not skipped in it."""
    chooses, clock, at = controller(36.0, UNCORRECTED), Clock(grids.even(10)), []
    for ordinal in range(9):
        evaluation = clock.tick(clock.grid[ordinal])
        if ordinal in (1, 2):
            continue
        probe = Probe() if ordinal < 4 else probed(5.0 if ordinal == 4 else 0.02)
        at.append(chooses.choose(evaluation, Signals(None, [], probe)).action)
        chooses.took(evaluation, at[-1])
    assert Action.REUSE in at[2:]


def test_after_a_change_nothing_is_skipped_by_what_was_known_before() -> None:
    for known, action in (
        (Signals(None, [], probed(0.01)), Action.REUSE),
        (Signals(signal(0.001), []), Action.PREDICT),
    ):
        chooses, clock = controller(36.0, UNCORRECTED), Clock(grids.even(10))
        first, second, third, fourth = map(clock.tick, clock.grid[:4])
        chooses.took(first, Action.COMPUTE)
        assert chooses.choose(second, known).action is action
        chooses.reset()
        assert chooses.choose(third, known).action is Action.COMPUTE
        chooses.took(third, Action.COMPUTE)
        unknown = Signals(known.output and Known(torch.tensor([0.001]), 1), [], known.probe and Probe())
        assert chooses.choose(fourth, unknown).action is Action.COMPUTE


def test_features_are_probed_more_and_more_seldom() -> None:
    probe, clock, at = Probe(), Clock(grids.even(50)), []
    for sigma in clock.grid:
        evaluation = clock.tick(sigma)
        if probe.due(evaluation):
            at.append(evaluation.ordinal)
            probe.observe(evaluation, torch.tensor([0.2]), 2, True)
    assert at == [0, WAIT, WAIT + WAIT * LATER]
    assert probe.error is not None and probe.error.item() == pytest.approx(0.1), "of one evaluation of age"
    assert probe.deep
    probe.observe(evaluation, torch.tensor([0.2]), 1, False)
    assert not probe.deep


def test_where_steps_grow_features_are_probed_again_and_trusted_less() -> None:
    """Features that were a step of 0.02 old say nothing of steps of 0.1."""
    grid = [*(1 - 0.02 * i for i in range(11)), *(0.8 - 0.1 * i for i in range(1, 8)), 0.0]
    probe, clock = Probe(), Clock(grid)
    due = []
    for sigma in clock.grid[:12]:
        evaluation = clock.tick(sigma)
        if probe.due(evaluation):
            due.append(evaluation.ordinal)
            probe.observe(evaluation, torch.tensor([0.2]), 1, True)
    assert due == [0, WAIT, 10], "where the step is five times as long"
    small = probed(0.05)
    small.step = 0.02
    letters = sample(None, 36, UNCORRECTED, probe=small, sigmas=grid)
    assert "R" in letters[:10] and "R" not in letters[11:]


def test_no_probe_is_paid_for_where_the_output_changes_too_much_or_features_were_too_bad() -> None:
    for unlikely in (True, False):
        chooses, clock, probe = controller(42.0, UNCORRECTED), Clock(grids.even(20)), Probe()
        first, second = clock.tick(clock.grid[0]), clock.tick(clock.grid[1])
        chooses.took(first, Action.COMPUTE)
        probe.changed(first, torch.tensor([50.0 if unlikely else 0.01]))
        chooses.choose(second, Signals(None, [], probe))
        assert probe.due(second) is not unlikely
        probe.observe(second, torch.tensor([5.0]), 1, True)
        chooses.took(second, Action.COMPUTE)
        third = [clock.tick(sigma) for sigma in clock.grid[2:12]]
        chooses.choose(third[0], Signals(None, [], probe))
        assert not any(probe.due(evaluation) for evaluation in third)


def test_the_last_evaluation_is_never_probed_and_a_reset_probes_at_once() -> None:
    clock, probe = Clock([1.0, 0.5, 0.0]), probed(0.1)
    first, last = clock.tick(1.0), clock.tick(0.5)
    assert not probe.due(first) and not Probe().due(last)
    probe.reset()
    assert probe.due(first) and probe.error is None
