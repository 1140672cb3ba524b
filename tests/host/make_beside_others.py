"""Writes docs/beside-others.md from what runs show.

python dev.py test tests/host/make_beside_others.py
"""

from pathlib import Path

from support.beside import CASES, FOOT, HEAD, PAGE, row


def test_make(tiny_models):
    lines = [HEAD]
    for part, cases in CASES.items():
        lines += [f"## {part}\n", "| beside | outcome |", "|---|---|"]
        lines += [row(name, case.outcome(tiny_models)) for name, case in cases.items()]
        lines.append("")
    (Path(__file__).parents[2] / PAGE).write_text("\n".join(lines[:-1]) + "\n" + FOOT, encoding="utf-8")
