"""Python code that checkpoints bring along ("remote code"): never run, never asked about, never saved.

A checkpoint names such code in `auto_map`, as `module.Class` beside its weights or `where--module.Class` in another
folder or repository. Here a model is built by the classes of transformers alone, and the only file that a result
names is `modeling_pruned.py`.
"""

import json
import re
from pathlib import Path

from transformers import CONFIG_MAPPING, __version__, dynamic_module_utils
from transformers.utils import PushToHubMixin

from lib import modeling_pruned
from lib.errors import UserError

# What names code to run, agrees to it, or names a configuration to read instead of this one: in a configuration of any
# kind, and in an object made from one.
FIELDS = ("auto_map", "_auto_map", "custom_generate", "custom_pipelines", "trust_remote_code", "configuration_files")
OWN_FILE = Path(modeling_pruned.__file__)
OWN_CLASS = re.compile(rf"{OWN_FILE.stem}\.Pruned\w+", re.ASCII)
OWN_FIELDS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
NOT_RUN = (
    "needs code that comes with the checkpoint, which is not run; give one whose model, tokenizer and processor are "
    "among those of transformers"
)


def never_ask() -> None:
    """Make transformers refuse remote code wherever it would ask at the terminal whether to run it."""
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def forget(*holders) -> None:
    """Remove every mention of code from configurations, tokenizers and processors, and from all that they hold."""
    waiting, seen = list(holders), set()
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, list | tuple):
            waiting.extend(holder)
            continue
        fields = vars(holder) if isinstance(holder, PushToHubMixin) else holder
        if not isinstance(fields, dict):
            continue
        # A number is the index of a token or a label of that name.
        for name in [name for name in FIELDS if name in fields and type(fields[name]) is not int]:
            del fields[name]
        waiting.extend(fields.values())


def refuse_unknown_family(what: str, fields: dict, advice: str) -> None:
    """Raise UserError unless the family of a raw configuration is one of transformers."""
    family = fields.get("model_type")
    if isinstance(family, str) and family in CONFIG_MAPPING:
        return
    problem = f"{what}: the family '{family}' is unknown to transformers {__version__}"
    if named := _reference(fields.get("auto_map")):
        problem += f"; it exists only as code that comes with the checkpoint ({named}), which is not run"
    raise UserError(f"{problem}; {advice}")


def is_refusal(error: Exception) -> bool:
    """Whether transformers raised `error` because it was not allowed to run remote code."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def names_own_code(folder: str | Path) -> bool:
    """Whether the configurations of a result's folder name `modeling_pruned.py`, which is then a copy of ours.

    Raises UserError when they name any other code, and when a file of code differs from ours or stands beside it.
    """
    folder, own = Path(folder), False
    for file in sorted(folder.glob("*config*.json")):
        fields = _read(file)
        auto_map = fields.get("auto_map") if file.name == "config.json" else None
        if isinstance(auto_map, dict) and _is_own(auto_map):
            own = True
            del fields["auto_map"]
        if found := _mention(fields):
            raise UserError(f"{file}: names code that is not this tool's ({found}); {_ADVICE}")
    for file in _code_files(folder) if own else []:
        if not (file == folder / OWN_FILE.name and file.is_file() and file.read_bytes() == OWN_FILE.read_bytes()):
            raise UserError(f"{file}: is not the file that this version of the tool writes; {_ADVICE}")
    return own


_ADVICE = "copy the folder again, save it anew, or read the code and then set TRUST=1"


def _is_own(auto_map: dict) -> bool:
    pairs = auto_map.items()
    return bool(pairs) and all(
        name in OWN_FIELDS and isinstance(value, str) and OWN_CLASS.fullmatch(value) for name, value in pairs
    )


def _code_files(folder: Path) -> list[Path]:
    """All Python files below the folder, and those where transformers looks through a link to another folder."""
    generate = folder / "custom_generate" / "generate.py"
    return sorted({*folder.rglob("*.py"), *([generate] if generate.exists() else [])})


def _read(file: Path) -> dict:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: is damaged; copy the folder again") from error
    return fields if isinstance(fields, dict) else {}


def _mention(value) -> str:
    """The first mention of code in parsed JSON; empty when there is none."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for name in FIELDS:
                if value.get(name) and type(value[name]) is not int:
                    return f"{name}: {_reference(value[name]) or value[name]}"[:200]
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return ""


def _reference(auto_map) -> str:
    """One of the classes that an `auto_map` names, preferably the causal language model; empty when it names none."""
    if isinstance(auto_map, dict):
        auto_map = [auto_map.get(OWN_FIELDS[0]), *auto_map.values()]
    found = auto_map if isinstance(auto_map, list) else [auto_map]
    return next((value for value in found if isinstance(value, str)), "")[:200]
