"""The automatic mode: skips as much as the wanted closeness allows, keeps its rhythm, makes errors good."""
from itertools import accumulate

import pytest
import torch

from fastercache_core import reading as reading_module
from fastercache_core.auto import (LEAST, LEAST_NOISY, LEAST_UNCORRECTED, LONGEST_REUSE, REACHED, AutoSettings,
                                   Foresight, Rhythm, least)
from fastercache_core.clock import Clock, Window
from fastercache_core.measured import make_history
from fastercache_core.reading import Reading
from fastercache_core.trial import DEEP, LATER, WAIT, Trial

STEPS = 30


def sample(error, closeness=42.0, solver="euler", steps=STEPS, late=False, trial=None, **settings):
    """Which evaluations of a run with even sigmas are skipped, as "F" and "-"; "R" where features are reused.

    error(ordinal): of the latent's slope, by a forecast for the next evaluation, a float or one for each picture;
    it grows with the gap. None: nothing can be forecast.
    """
    rhythm = Rhythm(AutoSettings(closeness, **settings), lambda percent: 1 - percent, solver, late)
    clock, done = Clock([1 - i / steps for i in range(steps + 1)]), ""
    for ordinal in range(steps):
        evaluation = clock.tick(1 - ordinal / steps)
        gap = len(done) - done.rfind("F", 0, -1) - 1 if "F" in done[:-1] else 1
        signals = [watched(torch.tensor(error(ordinal)) * gap)] if error else []
        skips = ordinal > 1 and rhythm.may_skip(evaluation, signals, trial)
        if ordinal > 1 and rhythm.may_reuse(evaluation):
            rhythm.reused()
            done += "R"
        elif skips:
            done += "-"
        else:
            rhythm.computed(evaluation)
            done += "F"
    return done


def watched(errors):
    """A Foresight that has seen these errors [batch]."""
    signal = Foresight()
    signal.error = errors.reshape(-1)
    return signal


def tried(error, kinds=frozenset(DEEP)):
    """A Trial of features that gave this error for each evaluation of their age."""
    trial = Trial()
    trial.error, trial.deep = torch.tensor([error]), kinds <= DEEP
    return trial


def gaps(done):
    """Lengths of the gaps, in order."""
    ends = [i for i, action in enumerate(done) if action == "F"]
    return [b - a for a, b in zip(ends, ends[1:])]


def cost(done):
    return done.count("F") / len(done)


@pytest.mark.parametrize("error", [0.01, 0.05, 0.2])
def test_the_closer_the_picture_must_be_the_more_is_computed(error):
    costs = [cost(sample(lambda _: error, closeness)) for closeness in (30, 35, 40, 45, 50, 55, 60, 65, 80)]
    assert costs == sorted(costs) and costs[0] < 0.5 < costs[-1]


def test_what_cannot_be_reached_by_skipping_is_sampled_in_full():
    assert sample(lambda _: 0.5, 60) == "F" * STEPS


def test_less_than_forecasts_are_good_for_is_not_asked_of_them():
    assert least("euler") == least("dpmpp_2m") == LEAST
    assert least(None, noise=True) == LEAST_NOISY < LEAST_UNCORRECTED == least(None)


@pytest.mark.parametrize("closeness", [35, 40, 45, 50, 55])
@pytest.mark.parametrize("error", [0.01, 0.05, 0.2])
def test_the_squared_effects_add_up_to_no_more_than_the_closeness_allows(error, closeness):
    done = sample(lambda _: error, closeness)
    total = sum((error * gap * gap / STEPS) ** 2 for gap in gaps(done) if gap > 1)
    assert total <= 10 ** ((REACHED["euler"] - closeness) / 10) * (1 + 1e-6)


@pytest.mark.parametrize("error", [0.02, 0.05, 0.1])
def test_a_gap_grows_by_one_at_a_time(error):
    found = gaps(sample(lambda _: error, 36, steps=50))[:-1]
    assert max(found) > 2 and all(after <= before + 1 for before, after in zip(found, found[1:]))


def test_skipping_stops_when_forecasts_become_bad():
    done = sample(lambda ordinal: 0.05 if ordinal < 15 else 5.0, 42)
    assert "-" in done[:15] and "-" not in done[20:]


def test_a_bad_beginning_is_waited_for():
    done = sample(lambda ordinal: 5.0 if ordinal < 12 else 0.05, 42)
    assert "-" not in done[:12] and "-" in done[12:]


def test_what_a_gap_really_did_counts_not_what_was_foreseen():
    jumpy = lambda ordinal: 0.05 if ordinal < 8 else 1.0 if ordinal < 11 else 0.05
    assert cost(sample(jumpy, 50)) > cost(sample(lambda _: 0.05, 50))


def test_uncorrected_errors_allow_less():
    assert cost(sample(lambda _: 0.05, 42, solver=None)) > cost(sample(lambda _: 0.05, 42))


def test_of_two_calls_a_step_the_one_at_a_sigma_seen_before_is_skipped():
    sigmas = [1 - i / STEPS for i in range(STEPS)]
    rhythm, clock = Rhythm(AutoSettings(45), lambda percent: 1 - percent, None), Clock([*sigmas, 0.0])
    calls, skipped = [sigmas[0], *(s for s in sigmas[1:] for _ in range(2))], []
    for number, sigma in enumerate(calls):
        evaluation = clock.tick(sigma)
        if number > 1 and rhythm.may_skip(evaluation, [watched(torch.tensor(0.01))]):
            skipped.append(number)
        else:
            rhythm.computed(evaluation)
    assert len(skipped) > STEPS / 2 and all(calls[n] == calls[n - 1] for n in skipped)


def test_outside_the_window_and_at_the_end_nothing_is_skipped():
    done = sample(lambda _: 1e-3, 35, window=Window(0.5, 0.8))
    assert "-" not in done[:15] + done[25:] and "-" in done[15:24]
    assert sample(lambda _: 1e-3, 35)[-1] == "F"


def test_a_batch_counts_as_a_whole_and_signals_add_up():
    for closeness in (36, 42, 50):
        assert sample(lambda _: (0.03, 0.04), closeness) == sample(lambda _: 0.00125 ** 0.5, closeness)
    together, clock = [watched(torch.tensor(e)) for e in ((0.01, 0.02), (0.02, 0.02))], Clock([1.0, 0.9, 0.8, 0.7])
    rhythms = [Rhythm(AutoSettings(42), lambda percent: 1 - percent, "euler") for _ in range(2)]
    first, second = clock.tick(1.0), clock.tick(0.9)
    for rhythm, signals in zip(rhythms, (together, [watched(torch.tensor((0.03, 0.04)))])):
        rhythm.computed(first)
        rhythm.may_skip(second, signals)
    assert rhythms[0].gap.expected == pytest.approx(rhythms[1].gap.expected)


def test_the_device_is_read_once_for_each_gap():
    reads = []

    class Counted(Foresight):
        @property
        def error(self):
            reads.append(1)
            return torch.tensor([1e-4])

        @error.setter
        def error(self, value):
            pass

    rhythm = Rhythm(AutoSettings(35), lambda percent: 1 - percent, "euler")
    clock = Clock([1 - i / STEPS for i in range(STEPS + 1)])
    for ordinal in range(STEPS):
        evaluation = clock.tick(1 - ordinal / STEPS)
        if ordinal < 2 or not rhythm.may_skip(evaluation, [Counted()]):
            rhythm.computed(evaluation)
    assert 0 < len(reads) < 12


def test_a_forecast_is_watched_as_soon_as_one_value_is_known():
    history, signal, one = make_history("measured"), Foresight(), torch.ones(2, 1, 4, 4)
    signal.observe(history, 1.0, one, torch.ones(2))
    assert signal.error is None
    history.push(1.0, (one, 0 * one))
    signal.observe(history, 0.9, 3 * one, torch.tensor([1.0, 0.5]))
    assert signal.error.tolist() == pytest.approx([2.0, 1.0]), "held, in units of the slope"
    history.push(0.9, (3 * one, 0 * one))
    signal.observe(history, 0.8, 5 * one, torch.ones(2))
    assert signal.error.tolist() == pytest.approx([0.0, 0.0], abs=1e-5), "a straight line"


@pytest.mark.parametrize("growth, closeness", [(1.3, 55), (1.4, 45), (1.5, 40), (1.5, 55)])
def test_no_more_is_spent_than_allowed_where_errors_grow_from_gap_to_gap(growth, closeness):
    """Towards the end of a run without guidance they may double with each gap."""
    error = lambda n: 0.002 * growth ** max(n - 14, 0)
    lengths = gaps(sample(error, closeness))
    spent = sum((error(end) * gap * gap / STEPS) ** 2 for gap, end in zip(lengths, accumulate(lengths)) if gap > 1)
    assert max(lengths) > 3 and spent <= 10 ** ((REACHED["euler"] - closeness) / 10)


def test_where_forecasts_are_bad_good_features_are_reused():
    done = sample(lambda _: 5.0, 36, None, trial=tried(0.02))
    assert "-" not in done and done.count("R") > STEPS / 3 and "R" * LONGEST_REUSE not in done
    assert sample(None, 36, None, trial=tried(0.02)) == done, "also where nothing can be forecast at all"


def test_bad_features_are_not_reused():
    assert sample(lambda _: 5.0, 42, None, trial=tried(5.0)) == "F" * STEPS
    assert sample(lambda _: 5.0, 42, None, trial=Trial()) == "F" * STEPS, "nor what was never tried"


def test_deep_features_are_reused_rather_than_only_the_negative_pass_skipped():
    skipping = sample(lambda _: 0.01, 42, solver=None)
    assert "-" in skipping
    assert "-" not in sample(lambda _: 0.01, 42, solver=None, trial=tried(0.01))
    assert sample(lambda _: 0.01, 42, solver=None, trial=tried(0.01, {"self"})) == skipping


def test_the_closer_the_picture_must_be_the_fewer_features_are_reused():
    counts = [sample(None, closeness, None, trial=tried(0.03)).count("R") for closeness in (36, 42, 48, 54)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_what_features_did_is_taken_from_what_is_left():
    rhythm = Rhythm(AutoSettings(36), lambda percent: 1 - percent, None)
    before, clock = rhythm.allowed, Clock([1 - i / 10 for i in range(11)])
    for ordinal in range(4):
        evaluation = clock.tick(1 - ordinal / 10)
        rhythm.may_skip(evaluation, [], tried(0.1))
        if ordinal == 1:
            assert rhythm.may_reuse(evaluation)
            rhythm.reused()
        elif ordinal in (0, 2):
            rhythm.computed(evaluation)
    assert before - rhythm.allowed == pytest.approx((0.1 * 2 * 0.2) ** 2, rel=1e-3), "two evaluations old, over 0.2"


def test_a_window_that_was_away_spent_nothing_where_nothing_can_be_forecast():
    rhythm = Rhythm(AutoSettings(36), lambda percent: 1 - percent, None)
    before, clock = rhythm.allowed, Clock([1 - i / 10 for i in range(11)])
    for ordinal in range(6):
        evaluation = clock.tick(1 - ordinal / 10)
        if ordinal in (0, 3, 4):
            rhythm.may_skip(evaluation, [], Trial())
            rhythm.computed(evaluation)
    assert rhythm.allowed == before


def test_after_a_change_nothing_is_reused_by_what_was_known_before():
    rhythm, clock = Rhythm(AutoSettings(36), lambda percent: 1 - percent, None), Clock([1 - i / 10 for i in range(11)])
    first, second, third, fourth = (clock.tick(1 - i / 10) for i in range(4))
    rhythm.computed(first)
    rhythm.may_skip(second, [], tried(0.01))
    assert rhythm.may_reuse(second)
    rhythm.reset()
    rhythm.computed(third)
    assert not rhythm.may_reuse(fourth)


def test_features_are_tried_more_and_more_seldom():
    trial, clock, at = Trial(), Clock([1 - i / 50 for i in range(51)]), []
    for ordinal in range(50):
        evaluation = clock.tick(1 - ordinal / 50)
        if trial.due(evaluation):
            at.append(ordinal)
            trial.observe(evaluation, torch.tensor([0.2]), 2, {"stack"})
    assert at == [0, WAIT, WAIT + WAIT * LATER]
    assert trial.error.item() == pytest.approx(0.1) and trial.deep, "of one evaluation of age"
    trial.observe(evaluation, torch.tensor([0.2]), 1, {"stack", "self"})
    assert not trial.deep


def test_beside_a_compiled_model_it_is_decided_by_what_was_known_a_gap_ago():
    early = lambda ordinal: 0.05 if ordinal < 15 else 5.0
    assert "-" in sample(early, 42, late=True)[:15] and "-" not in sample(early, 42, late=True)[22:]
    assert sample(early, 42, late=True) != sample(early, 42)
    known = sample(lambda _: 0.02, 42)
    assert 0 < sample(lambda _: 0.02, 42, late=True).count("F") - known.count("F") <= 3, "and begins that much later"


def test_the_newest_numbers_are_not_waited_for_beside_a_compiled_model(monkeypatch):
    reading, waited = Reading(late=True), []

    class Arrival:
        def __init__(self, value):
            self.value = value

        def synchronize(self):
            waited.append(self.value)

    monkeypatch.setattr(reading_module, "begin_copy", lambda numbers: (numbers, Arrival(numbers.item())))
    assert reading.read(torch.tensor([1.0]), "first") == (None, None) and not waited
    assert reading.read(torch.tensor([2.0]), "second") == ([1.0], "first") and waited == [1.0]
    reading.reset()
    assert reading.read(torch.tensor([3.0]), "third") == (None, None) and waited == [1.0]
    assert Reading().read(torch.tensor([4.0]), "now") == ([4.0], "now")
