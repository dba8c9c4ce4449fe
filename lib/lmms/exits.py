"""lmms-eval with exit codes: its own command line prints a traceback and exits with 0 when an evaluation fails."""

import os
import sys
import traceback
from types import ModuleType

# How those errors begin that are the user's to mend, beside all that come from files and the network.
MENDABLE = ("Tasks not found", "Couldn't find cache", "BuilderConfig", "Model '", "Specify --", "--limit")
OFFLINE = "; offline, a data set must stand in the working directory (DATA_DIR of lmms-eval.sh) under its Hub name"


def exiting(evaluate):
    """`evaluate` with its errors printed and turned into an exit: lmms-eval swallows every other exception."""

    def run(args):
        if getattr(args, "tasks", "") is None:
            print("error: --tasks: name what to evaluate, for instance --tasks vizwiz_vqa_val", file=sys.stderr)
            sys.exit(2)
        try:
            return evaluate(args)
        except Exception as error:
            from tenacity import RetryError

            if isinstance(error, RetryError):
                error = error.last_attempt.exception()
            mendable = isinstance(error, OSError | NotImplementedError) or str(error).startswith(MENDABLE)
            if os.environ.get("RANK", "0") == "0":
                line = f"error: {' '.join(str(error).split())[:400]}{OFFLINE if 'Offline' in str(error) else ''}"
                print(line if mendable else "".join(traceback.format_exception(error)), file=sys.stderr)
            sys.exit(2 if mendable else 1)

    run.exits = True
    return run


class ExitingModule(ModuleType):
    """lmms-eval's command line as a module whose `cli_evaluate`, once it is asked for, exits when it fails."""

    @property
    def cli_evaluate(self):
        names = vars(self)
        if not hasattr(names["cli_evaluate_single"], "exits"):
            names["cli_evaluate_single"] = exiting(names["cli_evaluate_single"])
        return names["cli_evaluate"]


def exit_on_errors() -> None:
    """Let `python -m lmms_eval` exit as `lib.lmms` does.

    lmms-eval asks for its plugins while that command line is still being imported: its functions are not there yet.
    """
    module = sys.modules.get("lmms_eval.__main__")
    if module is not None:
        module.__class__ = ExitingModule
