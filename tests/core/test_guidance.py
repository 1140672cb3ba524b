"""Guidance as it is measured: how far the guided result moves with what a guider was given."""

import pytest
import torch
from torch import Tensor

from fastercache_core.guidance import LARGE, Guidance, shares

SHAPE = (2, 4, 8, 8)


def fields(count: int, seed: int = 0) -> list[Tensor]:
    """Latents that share most of what they are, as branches do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(SHAPE, generator=generator)
    return [common + 0.2 * torch.randn(SHAPE, generator=generator) for _ in range(count)]


def measured(guided: Tensor, cond: Tensor, others: list[Tensor], extras: list[Tensor] = ()) -> Guidance:
    guidance = Guidance()
    guidance.measure(guided, cond, dict(enumerate(others, 1)), extras, computed=True)
    return guidance


@pytest.mark.parametrize("scale", [1.0, 1.3, 4.5, 12.0])
def test_a_guiders_scale_is_found_from_what_it_made(scale: float) -> None:
    cond, uncond = fields(2)
    weights = measured(uncond + scale * (cond - uncond), cond, [uncond]).weights
    assert weights.found and weights.output == pytest.approx(1.0, abs=1e-2)
    assert weights.of(1) == pytest.approx(scale - 1, abs=0.01)


def test_every_conditioning_has_a_scale_of_its_own() -> None:
    cond, middle, uncond = fields(3)
    weights = measured(cond + 2.0 * (cond - middle) + 5.0 * (middle - uncond), cond, [middle, uncond]).weights
    assert (weights.of(1), weights.of(2)) == (pytest.approx(3.0, abs=0.02), pytest.approx(5.0, abs=0.02))


def test_beside_a_pass_of_another_node_an_error_of_the_output_counts_as_often_as_that_node_says() -> None:
    """The pass is always computed: the node multiplies what the output is off by."""
    cond, uncond, perturbed = fields(3)
    guided = uncond + 4.5 * (cond - uncond) + 3.0 * (cond - perturbed)
    weights = measured(guided, cond, [uncond], [perturbed]).weights
    assert weights.output == pytest.approx(4.0, abs=0.02) and weights.of(1) == pytest.approx(3.5, abs=0.02)
    alone = measured(cond + 3.0 * (cond - perturbed), cond, [], [perturbed]).weights
    assert alone.output == pytest.approx(4.0, abs=0.02)


def test_what_the_fit_leaves_over_counts_as_coming_from_the_differences() -> None:
    cond, uncond = fields(2)
    linear = uncond + 4.5 * (cond - uncond)
    more = measured(linear + 0.3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)), cond, [uncond])
    assert more.weights.found and 3.6 < more.weights.of(1) < 4.5


@pytest.mark.parametrize("branches", [0, 1])
def test_what_cannot_be_measured_counts_as_large(branches: int) -> None:
    """Guidance from passes that nobody saw, and values that are no numbers."""
    cond, uncond = fields(2)
    others = [uncond][:branches]
    hidden = measured(cond + 8.0 * torch.randn(SHAPE), cond, others)
    broken = measured(torch.full(SHAPE, float("nan")), cond, others)
    for guidance in (hidden, broken, Guidance()):
        assert guidance.weights.output == LARGE and guidance.weights.of(1) == LARGE and not guidance.weights.found
    assert hidden.lost and broken.lost


def test_where_branches_are_equal_there_is_nothing_to_find() -> None:
    cond = fields(1)[0]
    assert measured(cond, cond, [cond.clone()]).weights.found


def test_a_scale_that_rises_is_noticed_before_the_next_computed_evaluation() -> None:
    cond, uncond = fields(2)
    guidance = Guidance()
    for scale, computed, rose in ((2.0, True, False), (2.1, False, False), (6.0, False, True), (6.0, True, False)):
        guidance.measure(uncond + scale * (cond - uncond), cond, {1: uncond}, [], computed)
        assert guidance.rose is rose


def test_beside_a_compiled_model_a_scale_is_known_one_evaluation_later() -> None:
    cond, uncond = fields(2)
    guidance = Guidance(late=True)
    for scale, known in ((2.0, LARGE), (3.0, 1.0), (4.0, 2.0)):
        guidance.measure(uncond + scale * (cond - uncond), cond, {1: uncond}, [], True)
        assert guidance.weights.of(1) == pytest.approx(known, abs=0.02)


def test_the_positive_branch_is_the_one_with_the_largest_share() -> None:
    negative, positive, third = fields(3)
    found = shares(negative + 4.0 * (positive - negative), [negative, positive])
    assert found == pytest.approx([-3.0, 4.0], abs=0.02)
    assert shares(8.0 * torch.randn(SHAPE), [negative, third]) is None
