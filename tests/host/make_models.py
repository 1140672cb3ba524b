"""Writes the README's table of models from the families' data.

python dev.py test tests/host/make_models.py
"""

from support.models import README, classes_of, parts_of_readme, table


def test_make(family_names):
    before, _, after = parts_of_readme()
    README.write_text(before + table(classes_of(family_names)) + after, "utf-8")
