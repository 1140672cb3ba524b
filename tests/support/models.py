"""The README's table of models, from the families' data and from what they are tested on."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fastercache_pack.nodes.host.families import FAMILIES, SPANS, Family

from support.further import FURTHER
from support.newer import ENTERED, NEWER
from support.tiny import SPECS

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- models: tests/host/make_models.py -->\n", "<!-- end of models -->\n"
HEAD = "| model | skipped steps and negative passes | feature reuse |\n|---|---|---|\n"
FOUND = "blocks, which are found as the model runs and are checked once"
OTHERS = (
    "blocks where they are found so; else attention, where the model lets ComfyUI replace it; else nothing, as is said"
)
# Families that have a test of their own.
ELSEWHERE = {"LTXV with audio": ["LTXAV"], "Qwen-Image 2.1": ["a stand-in"]}


def reusable(family: Family) -> str:
    """What of a family can be reused, in a user's words."""
    kinds = family.kinds()
    words = {
        "attention": kinds & {"self", "temporal", "cross"},
        "inside of the UNet, ResBlocks": family.unet,
        "blocks": kinds.issuperset(SPANS),
        "all blocks together": "stack" in kinds and not kinds.issuperset(SPANS),
    }
    return ", ".join(word for word, has in words.items() if has)


def classes_of(name_of: Callable[[str], str]) -> dict[str, list[str]]:
    """The host's classes that every family is tested on. name_of: the family of a specification of a tiny model."""
    classes = {name: [*others] for name, others in ELSEWHERE.items()}
    for specs, family_of in ((SPECS, name_of), (FURTHER, name_of), (NEWER, ENTERED.get)):
        for name, spec in specs.items():
            here = classes.setdefault(family_of(name) or FOUND, [])
            here += [cls for cls in [spec["cls"].removeprefix("Tiny")] if cls not in here]
    return classes


def table(classes: Mapping[str, Iterable[str]]) -> str:
    """The table. classes: see `classes_of`."""
    rows: dict[str, list[str]] = {}
    for family in FAMILIES:
        rows.setdefault(reusable(family), []).append(f"{family.name} ({', '.join(classes[family.name])})")
    rows[FOUND], rows[OTHERS] = [", ".join(classes[FOUND])], ["any other"]
    return HEAD + "".join(f"| {'; '.join(models)} | yes | {features} |\n" for features, models in rows.items())


def parts_of_readme() -> tuple[str, str, str]:
    """What comes before the table, the table, and what comes after."""
    before, rest = README.read_text("utf-8").split(BEGIN)
    middle, after = rest.split(END)
    return before + BEGIN, middle, END + after
