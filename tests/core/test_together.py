"""Several nodes on one model: what each gives, and what counts where two speak of the same."""

from itertools import permutations

import pytest

from fastercache_core.actions import COMPUTE, Action
from fastercache_core.calibration.policy import Point, Policy, Setup
from fastercache_core.clock import Interval, Window
from fastercache_core.controllers.adaptive import AdaptiveSettings
from fastercache_core.controllers.interval import IntervalSettings
from fastercache_core.controllers.planned import MixSettings, PolicySettings
from fastercache_core.features.reuse import ReuseSettings, planned_reuse
from fastercache_core.messages import LEARNS_ALONE, left_out, one_says
from fastercache_core.settings import FEATURES, GUIDANCE, PARTS, STEPS, CacheSettings, combined
from fastercache_core.signal import DifferenceSettings, OutputSettings
from support.engine import Model, Sampling, error

STEPS_NODE = CacheSettings(
    "balanced", AdaptiveSettings(42.0), DifferenceSettings(), OutputSettings(), node="FasterCache", found=True
)
GUIDANCE_NODE = CacheSettings(
    "1 in 5",
    IntervalSettings(estimate=Interval(5)),
    DifferenceSettings("hold", "released"),
    node="FasterCache CFG-Cache",
)
FEATURES_NODE = CacheSettings("none", reuse=ReuseSettings(weight="constant", w=0.3), node="Features")
FRDIFF_NODE = CacheSettings(
    "FRDiff", MixSettings(2), DifferenceSettings("hold"), OutputSettings("hold"), planned_reuse(), node="FRDiff"
)
POLICY_NODE = CacheSettings(
    "policy",
    PolicySettings(Policy(Setup("m", "euler", "simple", 2, 4.0), (1.0, 0.5), (Point(0.0, (COMPUTE, COMPUTE)),))),
    DifferenceSettings(),
    OutputSettings(),
    planned_reuse(),
    node="Auto-FR",
)
NODES = {
    STEPS: STEPS_NODE,
    GUIDANCE: GUIDANCE_NODE,
    FEATURES: FEATURES_NODE,
    "FRDiff": FRDIFF_NODE,
    "policy": POLICY_NODE,
}


def chain(*nodes: CacheSettings) -> CacheSettings:
    """What nodes say together, in the order of the chain."""
    all_of = CacheSettings("nothing")
    for node in nodes:
        all_of = combined(all_of, node)
    return all_of


@pytest.mark.parametrize("names", [*permutations(PARTS), (GUIDANCE, FEATURES), (FEATURES, GUIDANCE)])
def test_nodes_that_speak_of_different_parts_add_up_in_every_order(names: tuple[str, ...]) -> None:
    both = chain(*(NODES[name] for name in names))
    assert both.parts.keys() == set(names) and both.notes == ()
    assert both.guidance == GUIDANCE_NODE.controller and both.guides == GUIDANCE_NODE.difference
    assert both.difference == (STEPS_NODE if STEPS in names else GUIDANCE_NODE).difference
    assert both.reuse == FEATURES_NODE.reuse
    assert both.steps == (STEPS_NODE.controller if STEPS in names else None)
    assert both.output == (STEPS_NODE.output if STEPS in names else None)


@pytest.mark.parametrize("earlier", NODES)
@pytest.mark.parametrize("later", NODES)
def test_of_two_nodes_the_later_counts_where_both_speak_and_a_note_names_both(earlier: str, later: str) -> None:
    first, second = NODES[earlier], NODES[later]
    both = combined(first, second)
    for part, node in both.parts.items():
        assert node == second.parts.get(part, first.parts.get(part)), part
    for part in first.parts.keys() & second.parts.keys():
        assert one_says(part, second.parts[part], first.parts[part]) in both.notes
    if second.is_policy and earlier != "policy":
        assert both.controller == second.controller, "a policy says all of every step"
        for part in first.parts.keys() - second.parts.keys():
            assert left_out(part, first.parts[part], second.node) in both.notes
    if first.is_policy and later != FEATURES:
        assert both.controller == second.controller and both.output == second.output


@pytest.mark.parametrize("names", [*permutations([STEPS, GUIDANCE, "FRDiff"])])
def test_three_nodes_in_every_order(names: tuple[str, ...]) -> None:
    three = chain(*(NODES[name] for name in names))
    decides = FRDIFF_NODE if names.index("FRDiff") > names.index(STEPS) else STEPS_NODE
    loses = STEPS_NODE if decides is FRDIFF_NODE else FRDIFF_NODE
    assert (three.steps, three.output) == (decides.controller, decides.output)
    assert three.guidance == GUIDANCE_NODE.controller and three.guides == GUIDANCE_NODE.difference
    assert three.reuse == FRDIFF_NODE.reuse
    assert three.notes == (one_says(STEPS, decides.parts[STEPS], loses.parts[STEPS]),)


def test_a_policy_keeps_its_steps_beside_features_of_another_node() -> None:
    both = combined(POLICY_NODE, FEATURES_NODE)
    assert both.controller == POLICY_NODE.controller and both.reuse == FEATURES_NODE.reuse


def test_a_node_that_says_nothing_changes_nothing() -> None:
    nothing = CacheSettings("none", node="FasterCache")
    for node in NODES.values():
        for both in (combined(nothing, node), combined(node, nothing)):
            assert (both.controller, both.difference, both.output, both.reuse) == (
                (node.controller, node.difference, node.output, node.reuse)
            )
            assert both.notes == () and both.label == node.label and both.found == node.found


def test_a_policy_that_was_found_serves_no_run_in_which_others_skip() -> None:
    assert STEPS_NODE.found and not combined(STEPS_NODE, GUIDANCE_NODE).found


def test_nothing_is_learnt_where_others_skip_and_it_is_said() -> None:
    learning = CacheSettings(**{**vars(STEPS_NODE), "learn": True})
    both = combined(GUIDANCE_NODE, learning)
    assert not both.learn and both.notes == (LEARNS_ALONE,)


# Runs


def run(*nodes: CacheSettings, **sampling: object) -> object:
    return Sampling(**sampling).run(chain(*nodes))  # type: ignore[arg-type]


HARD = Model(surprise=lambda sigma: 1.0)  # outputs jump, differences between branches do not
EVERY_SECOND = CacheSettings("1 in 2", IntervalSettings(estimate=Interval(2)), DifferenceSettings("fitted"))


@pytest.mark.parametrize("sampler", ["sample_euler", "sample_dpmpp_2m"])
def test_cfg_cache_acts_where_no_step_is_predicted(sampler: str) -> None:
    options = dict(sampler=sampler, model=HARD)
    alone, both = run(STEPS_NODE, **options), run(STEPS_NODE, EVERY_SECOND, **options)
    assert "E" not in alone.letters and both.count(Action.ESTIMATE) > 5
    assert both.rows < 0.9 * alone.rows
    assert both.letters[-1] == "C" and "EE" not in both.letters and "PE" not in both.letters
    assert error(both) < 3e-3


@pytest.mark.parametrize("nodes", [(), (STEPS_NODE,)], ids=["alone", "beside predicted steps"])
def test_the_tolerance_of_cfg_cache_is_that_of_the_guided_result(nodes: tuple[CacheSettings, ...]) -> None:
    """An error of the difference counts as often as guidance multiplies it."""
    rough = Model(surprise=lambda sigma: 1.0, difference_surprise=0.01)
    careful = CacheSettings(
        "careful", IntervalSettings(estimate=Interval(2), tolerance=2e-3), DifferenceSettings("fitted")
    )
    weak, strong = (run(*nodes, careful, model=rough, cfg=cfg).count(Action.ESTIMATE) for cfg in (1.5, 12.0))
    assert strong < weak / 2


def test_where_steps_are_predicted_anyway_cfg_cache_is_not_in_the_way() -> None:
    alone, both = run(STEPS_NODE), run(STEPS_NODE, GUIDANCE_NODE)
    assert both.count(Action.PREDICT) > 0.8 * alone.count(Action.PREDICT) and both.rows <= alone.rows + 4


def test_beside_frdiff_keyframes_stay_whole_and_cfg_cache_acts_where_features_are_reused() -> None:
    alone, both = run(FRDIFF_NODE), run(FRDIFF_NODE, GUIDANCE_NODE)
    assert alone.count(Action.REUSE) > 3
    assert both.letters == alone.letters.replace("R", "E")
    estimated = next(outcome for outcome in both.outcomes if outcome.action is Action.ESTIMATE)
    assert estimated.actions == {0: Action.REUSE, 1: Action.ESTIMATE}
    assert both.rows < alone.rows


def test_features_and_cfg_cache_of_two_nodes_do_what_one_node_with_both_does() -> None:
    one = CacheSettings("both", GUIDANCE_NODE.controller, GUIDANCE_NODE.difference, reuse=FEATURES_NODE.reuse)
    expected = run(one)
    for nodes in ((FEATURES_NODE, GUIDANCE_NODE), (GUIDANCE_NODE, FEATURES_NODE)):
        both = run(*nodes)
        assert both.letters == expected.letters and (both.latent == expected.latent).all()


def test_cfg_cache_keeps_to_its_window_beside_predicted_steps() -> None:
    late = CacheSettings(
        "late", IntervalSettings(estimate=Interval(2, Window(0.5, 1.0))), DifferenceSettings("fitted"), node="CFG"
    )
    both = run(STEPS_NODE, late, model=HARD)
    assert "E" not in both.letters[: len(both.letters) // 2 - 1] and "E" in both.letters
