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
source lib/evaluation.sh

evaluation_settings
TASKS="${TASKS:-winogrande,hellaswag,arc_easy,arc_challenge,mmlu}"
if nvidia-smi -L >/dev/null 2>&1; then BATCH_SIZE="${BATCH_SIZE:-auto}"; else BATCH_SIZE="${BATCH_SIZE:-4}"; fi

ensure_environment requirements.txt requirements-eval.txt
case "${BASE:-}$PRUNED" in *.gguf*) ensure_environment requirements-gguf.txt ;; esac

if [ "${OFFLINE:-0}" = 1 ]; then
    WORK="${WORK_DIR:-$PWD/.offline_tasks}"
    "$VENV/bin/python" -m lib.offline_tasks --data_dir "$DATA_DIR" --out "$WORK"
    export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$WORK/.cache"
fi

evaluate_all lib.lm_harness "$@"
