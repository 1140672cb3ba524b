"""Which of the trained models this host runs."""

import pytest

from testbed.nodes import photos_lumina

NEEDS_TIME_SCALE = "photos"


def skip_where_it_cannot_run(bed: str) -> None:
    """Skip the test where the host lacks what the model of a bed needs."""
    if bed == NEEDS_TIME_SCALE and not photos_lumina.runs_here():
        pytest.skip("this host's Lumina 2 has no time_scale, which the photograph model needs")
