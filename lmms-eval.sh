#!/usr/bin/env bash
# Evaluate a pruned LLaVA with lmms-eval; with BASE, the dense model too, and a table of both.
#
#   PRUNED=./pruned_model/llava bash lmms-eval.sh
#   BASE=liuhaotian/llava-v1.5-7b PRUNED=./pruned_model/llava/model.bin TASKS=gqa LIMIT=500 bash lmms-eval.sh
#
# PRUNED is a folder that main.py saved or a model.bin; BASE is a LLaVA v1.5 of either form. Every value below can be
# set in the environment; extra arguments go to lmms-eval.
#   FORM=hf|bin         which form, where a folder holds both (hf)
#   TASKS, LIMIT        lmms-eval's tasks, and how many questions of each (all)
#   BATCH_SIZE, DTYPE   questions answered at once (1); auto is the dtype that was saved
#   OUT                 where results and logs go
#   OFFLINE=1           data sets from DATA_DIR (data_local), in folders of their Hub names, instead of the Hub
#   PROCESSES           GPUs that share the questions (1)
#   TRUST=1             run code that lies in the folder and was not written by this tool, unpickle anything
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source lib/environment.sh
source lib/evaluation.sh

evaluation_settings
TASKS="${TASKS:-vizwiz_vqa_val,gqa,scienceqa_img}"
BATCH_SIZE="${BATCH_SIZE:-1}"

ensure_environment requirements.txt requirements-lmms.txt requirements-lmms-nodeps.txt

if [ "${OFFLINE:-0}" = 1 ]; then
    [ -d "$DATA_DIR" ] || { echo "error: DATA_DIR=$DATA_DIR: no such folder" >&2; exit 2; }
    WORK="$(cd "$DATA_DIR" && pwd)"
    export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="${WORK_DIR:-$PWD/.offline_tasks}/.cache"
fi

evaluate_all lib.lmms --verbosity WARNING "$@"
