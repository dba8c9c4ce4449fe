"""What stands in the folder of a result, and what in it a run of this tool did not write."""

import fnmatch
import json
import os
from collections.abc import Collection
from pathlib import Path

from lib.checkpoint import REPORT as RECORD  # what tells a result of ours from any other folder

LAST = Path(RECORD).parts[0]  # the last to be moved, so that a result stays known as one
IGNORED = ("lost+found", ".DS_Store", "__pycache__")  # made by file systems and programs, not by people
# What results hold whose record does not list its files.
KNOWN_FILES = ("*config.json", "model*.safetensors", "model.safetensors.index.json", "model.bin", "tokenizer.*",
               "special_tokens_map.json", "added_tokens.json", "chat_template.j*", "vocab.*", "merges.txt",
               "spiece.model", "kept_*.safetensors", RECORD, "report.html", "modeling_pruned.py")  # fmt: skip

Content = dict[str, tuple[int, int] | None]  # path below a folder -> size and time of change; None for a folder



def record_of(folder: Path) -> dict | None:
    """Return the record that a run of this tool left in `folder`; None where there is none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if {"arguments", "sparsity"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def files_of(folder: Path) -> list[str]:
    """Return the names of all files below `folder`, sorted, as a record lists them."""
    return sorted(name for name, entry in content(folder).items() if entry)


def content(folder: Path, ignored: Collection[str] = IGNORED) -> Content:
    """Return what stands below `folder`, but for entries of it that are `ignored`. Raises OSError."""
    found: Content = {}
    for entry in os.scandir(folder):
        if entry.name in ignored:
            continue
        if entry.is_dir(follow_symlinks=False):
            inside = content(Path(entry.path))
            found |= {entry.name: None} | {f"{entry.name}/{name}": facts for name, facts in inside.items()}
        else:
            facts = entry.stat(follow_symlinks=False)
            found[entry.name] = (facts.st_size, facts.st_mtime_ns)
    return found


def stranger_in(found: Content, record: dict) -> str | None:
    """Return the first name in a result that the run of this record did not write; None where there is none."""
    files = record.get("files")
    for name, entry in sorted(found.items()):
        if files is None:
            known = entry is not None and any(fnmatch.fnmatchcase(name, pattern) for pattern in KNOWN_FILES)
        else:
            known = name in files if entry else any(file.startswith(f"{name}/") for file in files)
        if not known:
            return name
    return None
