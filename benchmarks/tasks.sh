#!/usr/bin/env bash
# lm-eval's accuracies of one model, dense and pruned by several methods, from both saved forms.
#
#   MODEL=model.gguf DATA_DIR=data_local OFFLINE=1 bash benchmarks/tasks.sh
#
# Prints one Markdown table a method and ratio, and a line that says whether model.bin answered as the folder did.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export OFFLINE="${OFFLINE:-0}" DATA_DIR="${DATA_DIR:-data_local}" TASKS="${TASKS:-arc_easy,hellaswag,winogrande}"
export VENV="${VENV:-$PWD/.venv}" BASE="$MODEL"
FOLDER="${FOLDER:-./pruned_model/benchmark}"
LOGS="${LOGS:-./logs/benchmark}"
RATIOS="${RATIOS:-0.2,0.5}"
mkdir -p "$FOLDER" "$LOGS"

for method in "structured_afr" "structured_afr --global_pruning" "afr"; do
    name="$(printf '%s' "$method" | tr -cs 'a-z_' '-')"
    # Per layer and across layers are chosen from the same scores.
    # shellcheck disable=SC2086  # the method's flags are words of their own
    "$VENV/bin/python" main.py --model "$MODEL" --prune_method $method --pruning_ratio "$RATIOS" \
        --nsamples "${NSAMPLES:-32}" --seqlen "${SEQLEN:-512}" --data_dir "$DATA_DIR" --save_format both \
        --scores "$FOLDER/scores-${method%% *}" --save_model "$FOLDER/$name" --overwrite
    for result in "$FOLDER/$name"/*/; do
        ratio="$(basename "$result")"
        for form in hf bin; do
            log="$LOGS/$name-$ratio-$form"
            PRUNED="$FOLDER/$name/$ratio" FORM="$form" OUT="$log" bash test.sh >"$log.txt" 2>&1
            sed -n '/^| task/,$p' "$log.txt" >"$log.table"
        done
        printf '\n%s\n\n' "$method, ratio $ratio"
        cat "$LOGS/$name-$ratio-hf.table"
        cmp -s "$LOGS/$name-$ratio-hf.table" "$LOGS/$name-$ratio-bin.table" && same=yes || same=NO
        echo "model.bin answers as the folder does: $same"
    done
done
