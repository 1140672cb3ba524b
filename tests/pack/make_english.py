"""Writes the English texts of the page from the nodes' own.

python dev.py test tests/pack/make_english.py
"""

import json
from pathlib import Path

TEXTS = Path(__file__).parents[2] / "locales" / "en" / "nodeDefs.json"


def test_make(english):
    TEXTS.write_text(json.dumps(english, indent=1) + "\n")
