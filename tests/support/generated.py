"""What generated runs are drawn from, and what is looked for after each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from . import grids

SCHEDULES: list[Callable[[int], list[float]]] = [
    grids.even,
    lambda steps: grids.simple(steps, 3.0),
    lambda steps: grids.beta(steps, 12.0),
    lambda steps: grids.linear_quadratic(max(steps, 2)),
]
LEVELS = st.integers(1, 1000).map(lambda thousandth: thousandth / 1000)
FALLING = st.lists(LEVELS, max_size=12).map(lambda levels: sorted(levels, reverse=True))


def repeatable(runs: int) -> settings:
    """The same `runs` examples every time: nothing is drawn by chance, nothing is remembered."""
    return settings(
        max_examples=runs, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


def noise_levels(counts: Sequence[int]) -> st.SearchStrategy[list[float]]:
    """Sigmas of a flow model as samplers get them: of a scheduler, all or the end of it, or any list of a user.

    counts: of a scheduler's steps.
    """
    scheduled = st.builds(lambda schedule, steps: schedule(steps), st.sampled_from(SCHEDULES), st.sampled_from(counts))
    return st.one_of(
        scheduled,
        scheduled.map(lambda sigmas: sigmas[len(sigmas) // 3 :]),  # a denoise below 1
        scheduled.map(lambda sigmas: sigmas[-2::-1]),  # increasing, as for unsampling
        scheduled.map(lambda sigmas: [sigma for sigma in sigmas for _ in range(2)]),
        st.builds(lambda first, second: [*first, *second], scheduled, scheduled),  # a zero in the middle
        FALLING.map(lambda levels: [*levels, 0.0]),  # some more than once, or no step at all
        st.lists(LEVELS | st.just(0.0), max_size=12),
    )
