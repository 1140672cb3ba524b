"""The README's table of models says what the families' data say, and names what they are tested on."""

from fastercache_pack.nodes.host.families import FAMILIES

from support.models import classes_of, parts_of_readme, table


def test_the_table_of_models_is_current(family_names):
    assert parts_of_readme()[1] == table(classes_of(family_names)), "python dev.py test tests/host/make_models.py"


def test_every_family_is_tested_on_a_model(family_names):
    assert {family.name for family in FAMILIES} <= set(classes_of(family_names))
