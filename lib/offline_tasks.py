"""Local data sets -> folders that lm-eval's shipped tasks read in place of the Hub, unmodified.

    python -m lib.offline_tasks --data_dir data_local --out W

`load_dataset("allenai/ai2_arc", "ARC-Easy")` takes a folder of that relative name in the working directory
before it asks the Hub. So lm-eval runs offline where these folders stand, with HF_HUB_OFFLINE=1.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, disable_progress_bars, load_from_disk

from lib.errors import UserError

# configuration -> split -> rows
Configurations = dict[str, dict[str, Dataset]]


# --- a local set -> the configurations that the tasks ask for ---------------------------------------


def whole(name: str) -> Callable[[DatasetDict], Configurations]:
    """All rows as one configuration."""
    return lambda found: {name: dict(found)}


def by_subject(found: DatasetDict) -> Configurations:
    """MMLU: a configuration per subject, and `all`. A split without rows of a subject is left out there."""
    configurations: Configurations = {"all": dict(found)}
    for split, rows in found.items():
        places: dict[str, list[int]] = {}
        for place, subject in enumerate(rows["subject"]):
            places.setdefault(subject, []).append(place)
        for subject, indices in places.items():
            configurations.setdefault(subject, {})[split] = rows.select(indices)
    return configurations


def by_article(found: DatasetDict) -> Configurations:
    """WikiText: lines joined to articles, column `page`; the task scores whole articles."""
    pages = {split: Dataset.from_dict({"page": list(articles(rows["text"]))}) for split, rows in found.items()}
    return {"wikitext-2-raw-v1": pages}


def articles(lines: list[str]) -> Iterator[str]:
    """The articles of WikiText's lines: each begins at a heading of the first level, `= Title =`."""
    page: list[str] = []
    for line in lines:
        line = line.removesuffix("\n")
        heading = line.replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" =") and "".join(page).strip():
            yield "\n".join(page)
            page = []
        page.append(line)
    if "".join(page).strip():
        yield "\n".join(page)


@dataclass(frozen=True)
class TaskSet:
    """The Hub name that lm-eval's tasks give a local set, and how its configurations come out of it."""

    hub: str
    split: Callable[[DatasetDict], Configurations]
    tasks: str


SETS = {
    "arc_easy": TaskSet("allenai/ai2_arc", whole("ARC-Easy"), "arc_easy"),
    "arc_challenge": TaskSet("allenai/ai2_arc", whole("ARC-Challenge"), "arc_challenge"),
    "hellaswag": TaskSet("Rowan/hellaswag", whole("default"), "hellaswag"),
    "winogrande": TaskSet("allenai/winogrande", whole("winogrande_xl"), "winogrande"),
    "mmlu": TaskSet("cais/mmlu", by_subject, "mmlu"),
    "wikitext2": TaskSet("EleutherAI/wikitext_document_level", by_article, "wikitext"),
}


# --- writing ----------------------------------------------------------------------------------------


def prepare(data_dir: str | Path, out: str | Path) -> tuple[list[str], list[str]]:
    """Write the folders for every set of `data_dir` into `out`; returns the names found and the names missing.

    A folder that was made from the same rows is left as it is. Raises UserError when no set is there, when one
    is damaged, and when `out` cannot be written.
    """
    found = {name: _read(Path(data_dir) / name) for name in SETS if (Path(data_dir) / name).is_dir()}
    if not found:
        raise UserError(
            f"--data_dir {data_dir}: none of {', '.join(SETS)} is there; put save_to_disk folders of these "
            "names there, or evaluate with the Hub's data"
        )
    try:
        for hub in dict.fromkeys(SETS[name].hub for name in found):
            _write(Path(out) / hub, {name: found[name] for name in found if SETS[name].hub == hub})
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    return list(found), [name for name in SETS if name not in found]


def _read(folder: Path) -> DatasetDict:
    try:
        found = load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder}: damaged or not a save_to_disk folder ({type(error).__name__})") from error
    return found if isinstance(found, DatasetDict) else DatasetDict({str(found.split): found})


def _write(folder: Path, sets: dict[str, DatasetDict]) -> None:
    sources = [f"{name}/{split} {rows._fingerprint}" for name, splits in sets.items() for split, rows in splits.items()]
    stamp = f"<!-- made from {', '.join(sources)} -->\n"
    readme = folder / "README.md"
    if readme.is_file() and readme.read_text(encoding="utf-8").endswith(stamp):
        return
    # Without a README nothing here passes for complete, so it goes first and comes last.
    shutil.rmtree(folder, ignore_errors=True)
    header = ["---", "configs:"]
    for name, splits in sets.items():
        for configuration, parts in _configurations(name, splits).items():
            header += [f"- config_name: {configuration}", "  data_files:"]
            (folder / configuration).mkdir(parents=True)
            for split, rows in parts.items():
                rows.to_parquet(folder / configuration / f"{split}.parquet")
                header += [f"  - split: {split}", f"    path: {configuration}/{split}.parquet"]
    readme.write_text("\n".join([*header, "---", stamp]), encoding="utf-8")


def _configurations(name: str, splits: DatasetDict) -> Configurations:
    try:
        return SETS[name].split(splits)
    except KeyError as error:
        raise UserError(f"{name}: its rows have no column {error}; fetch the set again") from error


# --- the command line -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m lib.offline_tasks", description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data_local", metavar="DIR", help="where the save_to_disk folders are")
    parser.add_argument("--out", required=True, metavar="W", help="working directory for lm-eval; made when missing")
    args = parser.parse_args(argv)
    disable_progress_bars()  # hundreds of them, one a file
    try:
        found, missing = prepare(args.data_dir, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: tasks {', '.join(SETS[name].tasks for name in found)}")
    if missing:
        print(f"not in {args.data_dir}, skipped: {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
