#!/usr/bin/env bash
# Evaluate a pruned model with lm-eval; with BASE, the dense model too, and a table of both.
#
#   PRUNED=./pruned_model/llama bash test.sh
#   BASE=meta-llama/Meta-Llama-3-8B PRUNED=./pruned_model/llama TASKS=arc_easy,winogrande bash test.sh --num_fewshot 5
#
# PRUNED is a folder that main.py saved or a model.bin. Every value below can be set in the environment; extra
# arguments go to lm-eval.
#   FORM=hf|bin         which form, where a folder holds both (hf)
#   TASKS, LIMIT        lm-eval's tasks, and how many questions of each (all)
#   BATCH_SIZE, DTYPE   auto on a GPU, 4 on a CPU; auto is the dtype that was saved
#   OUT                 where results and logs go
#   OFFLINE=1           questions from DATA_DIR (data_local) instead of the Hub
#   PROCESSES           GPUs that share the questions (1)
#   TRUST=1             run code that lies in the folder and was not written by this tool, unpickle anything
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source lib/environment.sh

if [ -z "${PRUNED:-}" ]; then
    echo "error: name the model to evaluate: PRUNED=./pruned_model/NAME bash test.sh" >&2
    exit 2
fi
TASKS="${TASKS:-winogrande,hellaswag,arc_easy,arc_challenge,mmlu}"
OUT="${OUT:-./logs/$(basename "$PRUNED")}"
DATA_DIR="${DATA_DIR:-data_local}"
if nvidia-smi -L >/dev/null 2>&1; then BATCH_SIZE="${BATCH_SIZE:-auto}"; else BATCH_SIZE="${BATCH_SIZE:-4}"; fi

ensure_environment requirements.txt requirements-eval.txt
case "${BASE:-}$PRUNED" in *.gguf*) ensure_environment requirements-gguf.txt ;; esac
PYTHON="$VENV/bin/python"
ROOT="$PWD"
WORK="$ROOT"
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

if [ "${OFFLINE:-0}" = 1 ]; then
    # lm-eval finds a folder of a set's Hub name in the working directory before it asks the Hub.
    WORK="${WORK_DIR:-$ROOT/.offline_tasks}"
    "$PYTHON" -m lib.offline_tasks --data_dir "$DATA_DIR" --out "$WORK"
    export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$WORK/.cache"
fi

# evaluate MODEL FOLDER [FORM] [arguments of lm-eval]
evaluate() {
    local model="$1" folder="$2" form="$3" found line loading=() launch=("$PYTHON")
    shift 3
    found="$("$PYTHON" -m lib.tasks arguments "$model" ${form:+--form "$form"} --dtype "${DTYPE:-auto}" \
        $([ "${TRUST:-0}" = 1 ] && echo --trust))"
    while IFS= read -r line; do loading+=("$line"); done <<<"$found"
    [ "${PROCESSES:-1}" = 1 ] || launch=("$VENV/bin/accelerate" launch --num_processes "$PROCESSES")
    (cd "$WORK" && "${launch[@]}" -m lib.lm_harness "${loading[@]}" --tasks "$TASKS" --batch_size "$BATCH_SIZE" \
        ${LIMIT:+--limit "$LIMIT"} --output_path "$folder" "$@")
}

if [ -n "${BASE:-}" ]; then
    # Its figures do not change, so they are kept beside the others' for every model with the same settings.
    KEY="$(printf '%s\n' "$BASE" "$TASKS" "${LIMIT:-}" "${DTYPE:-}" "${OFFLINE:-}" "$DATA_DIR" "$@" | cksum | cut -d' ' -f1)"
    DENSE="$(dirname "$OUT")/dense-$(basename "$BASE")-$KEY"
    if [ -d "$DENSE" ] && find "$DENSE" -name 'results_*.json' | grep -q .; then
        echo "dense model: figures of $DENSE (delete it to measure again)"
    else
        evaluate "$BASE" "$DENSE" "" "$@"
    fi
fi
evaluate "$PRUNED" "$OUT" "${FORM:-}" "$@"
if [ -n "${BASE:-}" ]; then
    printf '\n%s\n' "$BASE beside $PRUNED"
    "$PYTHON" -m lib.tasks table "$DENSE" "$OUT"
fi
