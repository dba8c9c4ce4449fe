"""lmms-eval's own command line, with errors that a program can see.

    python -m lib.lmms --model llava --model_args pruned=DIR/model.bin --tasks vizwiz_vqa_val --batch_size 1

Exits with 2, after one line, for what the user can mend, where `python -m lmms_eval` prints a traceback and exits
with 0; with 1 for anything else that went wrong.
"""

import os
import sys

from lib import terminal
from lib.lmms.exits import exiting

# The libraries read these when they are imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not terminal.watched():
    os.environ.setdefault("TQDM_DISABLE", "1")

try:
    from lmms_eval import __main__ as harness
except ImportError as error:
    print(
        "error: lmms-eval is needed: pip install -r requirements-lmms.txt, then "
        f"pip install --no-deps -r requirements-lmms-nodeps.txt ({error})",
        file=sys.stderr,
    )
    sys.exit(2)


from lib import remote_code


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
