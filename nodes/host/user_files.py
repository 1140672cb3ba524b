"""Small files in the user's own folders: policies, and what was learnt on a model."""

from __future__ import annotations

import os
import uuid

import folder_paths

FOLDER = "fastercache"


def folders(*inside: str) -> list[str]:
    """The folders that files are read from, first choice first. inside: names of folders within."""
    roots = (folder_paths.get_output_directory(), folder_paths.get_input_directory())
    return [os.path.join(root, FOLDER, *inside) for root in roots]


def write_whole(path: str, text: str) -> None:
    """Write a file of the first folder, whole or not at all, whoever else writes it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
