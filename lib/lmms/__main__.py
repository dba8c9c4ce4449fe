"""lmms-eval's own command line, with errors that a program can see.

    python -m lib.lmms --model llava --model_args pruned=DIR/model.bin --tasks vizwiz_vqa_val --batch_size 1

Exits with 2, after one line, for what the user can mend, where `python -m lmms_eval` prints a traceback and exits
with 0; with 1 for anything else that went wrong.
"""

import os
import sys
import traceback

# The libraries read these when they are imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

try:
    from lmms_eval import __main__ as harness
    from tenacity import RetryError
except ImportError as error:
    print(
        "error: lmms-eval is needed: pip install -r requirements-lmms.txt, then "
        f"pip install --no-deps -r requirements-lmms-nodeps.txt ({error})",
        file=sys.stderr,
    )
    sys.exit(2)

from lib import remote_code

# How those errors begin that are the user's to mend, beside all that come from files and the network.
MENDABLE = ("Tasks not found", "Couldn't find cache", "BuilderConfig", "Model '", "Specify --", "--limit")
OFFLINE = "; offline, a data set must stand in the working directory (DATA_DIR of lmms-eval.sh) under its Hub name"


def exiting(evaluate):
    """`evaluate` with its errors printed and turned into an exit: lmms-eval swallows every other exception."""

    def run(args):
        try:
            return evaluate(args)
        except Exception as error:
            if isinstance(error, RetryError):
                error = error.last_attempt.exception()
            mendable = isinstance(error, OSError | NotImplementedError) or str(error).startswith(MENDABLE)
            if os.environ.get("RANK", "0") == "0":
                line = f"error: {' '.join(str(error).split())[:400]}{OFFLINE if 'Offline' in str(error) else ''}"
                print(line if mendable else "".join(traceback.format_exception(error)), file=sys.stderr)
            sys.exit(2 if mendable else 1)

    return run


def main() -> None:
    """Run lmms-eval's command line."""
    remote_code.never_ask()
    harness.cli_evaluate_single = exiting(harness.cli_evaluate_single)
    try:
        harness.cli_evaluate()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
