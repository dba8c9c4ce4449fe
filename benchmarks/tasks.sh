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

for ratio in ${RATIOS:-0.2 0.5}; do
    for method in "structured_afr" "structured_afr --global_pruning" "afr"; do
        name="$ratio-$(printf '%s' "$method" | tr -cs 'a-z_' '-')"
        # shellcheck disable=SC2086  # the method's flags are words of their own
        "$VENV/bin/python" main.py --model "$MODEL" --prune_method $method --pruning_ratio "$ratio" \
            --nsamples "${NSAMPLES:-32}" --seqlen "${SEQLEN:-512}" --data_dir "$DATA_DIR" --save_format both \
            --save_model "$FOLDER/$name" --overwrite
        for form in hf bin; do
            PRUNED="$FOLDER/$name" FORM="$form" OUT="$LOGS/$name-$form" bash test.sh >"$LOGS.$name-$form.txt" 2>&1
            sed -n '/ beside /,$p' "$LOGS.$name-$form.txt" >"$LOGS.$form.table"
            [ "$form" = hf ] && cat "$LOGS.hf.table"
        done
        tail -n +2 "$LOGS.hf.table" | cmp -s - <(tail -n +2 "$LOGS.bin.table") && same=yes || same=NO
        echo "$method, ratio $ratio: model.bin answers as the folder does: $same"
    done
done
