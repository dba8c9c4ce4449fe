# Sourced by test.sh and lmms-eval.sh: a model in a harness, and the dense one beside it.
#
#   evaluation_settings              their defaults; an error without PRUNED
#   evaluate_all HARNESS [arguments]   PRUNED, with BASE also the dense model and a table of both; HARNESS is the module
#                                      that is run (lib.lm_harness, lib.lmms), the arguments are passed on to it
#
# Settings come from the variables that the scripts describe. WORK is the folder that the harness runs in: it takes a
# data set of the Hub from the folder of that relative name before it asks the Hub.

evaluation_settings() {
    if [ -z "${PRUNED:-}" ]; then
        echo "error: name the model to evaluate: PRUNED=./pruned_model/NAME bash $(basename "$0")" >&2
        exit 2
    fi
    OUT="${OUT:-./logs/$(basename "$PRUNED")}"
    DATA_DIR="${DATA_DIR:-data_local}"
    WORK="$PWD"
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
}

# evaluate HARNESS MODEL FOLDER FORM [arguments]: the figures of one model into FOLDER
evaluate() {
    local harness="$1" model="$2" folder="$3" form="$4" found line loading=() launch=("$VENV/bin/python")
    shift 4
    found="$("$VENV/bin/python" -m lib.tasks arguments "$model" --harness "$harness" ${form:+--form "$form"} \
        --dtype "${DTYPE:-auto}" $([ "${TRUST:-0}" = 1 ] && echo --trust))"
    while IFS= read -r line; do loading+=("$line"); done <<<"$found"
    if [ "${PROCESSES:-1}" != 1 ]; then
        launch=("$VENV/bin/accelerate" launch --num_processes "$PROCESSES")
        # On CPUs accelerate starts several processes only through MPI.
        nvidia-smi -L >/dev/null 2>&1 || launch=(env ACCELERATE_USE_CPU=true "$VENV/bin/torchrun" --nproc_per_node "$PROCESSES")
    fi
    # What lies in WORK is data: Python imports nothing from there, and no folder there passes for one of tasks.
    if [ -d "$WORK/$TASKS" ]; then
        echo "error: TASKS=$TASKS: $WORK holds a folder of that name, which would be read as a folder of tasks;" \
            "rename it, or name a folder of tasks by its absolute path" >&2
        exit 2
    fi
    (cd "$WORK" && PYTHONSAFEPATH=1 "${launch[@]}" -m "$harness" "${loading[@]}" --tasks "$TASKS" --batch_size "$BATCH_SIZE" \
        ${LIMIT:+--limit "$LIMIT"} --output_path "$folder" "$@")
}

evaluate_all() {
    local harness="$1" settings key dense
    shift
    mkdir -p "$OUT"
    OUT="$(cd "$OUT" && pwd)"
    if [ -n "${BASE:-}" ]; then
        # Its figures do not change, so they are kept beside the others' for every model with the same settings.
        settings=("$BASE" "$TASKS" "${LIMIT:-}" "${DTYPE:-}" "${OFFLINE:-}" "$DATA_DIR" "$@")
        key="$(printf '%s\n' "${settings[@]}" | cksum | cut -d' ' -f1)"
        dense="$(dirname "$OUT")/dense-$(basename "$BASE")-$key"
        if [ -d "$dense" ] && find "$dense" -name '*results*.json' | grep -q .; then
            echo "dense model: figures of $dense (delete it to measure again)"
        else
            evaluate "$harness" "$BASE" "$dense" "" "$@"
        fi
    fi
    evaluate "$harness" "$PRUNED" "$OUT" "${FORM:-}" "$@"
    if [ -n "${BASE:-}" ]; then
        printf '\n%s\n' "$BASE beside $PRUNED"
        "$VENV/bin/python" -m lib.tasks table "$dense" "$OUT"
    fi
}
