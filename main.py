"""AFR-St: prune the MLP layers of a large language model. `python main.py --help` explains every flag."""

import os
import sys

VERIFY_TOKENS = 64


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        # Loading the libraries takes seconds, in which Ctrl-C should be answered in one line too.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if not (sys.stderr.isatty() and speaks):
            os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of all libraries
        from lib.errors import UserError

        try:
            run(argv)
            return 0
        except UserError as error:
            if speaks or str(error).startswith("process "):
                print(f"error: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        if speaks:
            print("interrupted: nothing was saved", file=sys.stderr)
        return 130


def run(argv: list[str] | None) -> None:
    """Parse, load, calibrate, score; for each ratio select, prune, save, report."""
    from lib import builder, checkpoint, data, evaluate, memory, options, parallel, prune, sums, tape
    from lib.summary import Run

    args = options.parse(argv)
    ratios = options.ratios_of(args)
    builder.quiet_libraries()
    method = prune.METHODS[args.prune_method]
    targets = checkpoint.targets(args.save_model, ratios)
    for target in filter(None, targets.values()):
        checkpoint.check_target(target, args.overwrite)
    parallel.start(args.cuda)
    record = Run(vars(args))

    with record.phase("load"):
        calibration = data.find_calibration(args.dataset, args.data_dir, args.image_dir)
        loaded = builder.load(args.model, args.dtype, args.cuda, args.cache_dir, args.seqlen, method.sees, args.towers,
                              args.offload, args.max_memory)  # fmt: skip
        record.dense(evaluate.size(loaded.model, loaded.layers), loaded)

    with record.phase("calibrate"), loaded.placement.running():
        samples = calibration.samples(loaded.model, loaded.processor, args.nsamples, loaded.seqlen, args.seed)
        data.refuse_unknown_tokens(loaded.model, samples)
        record.calibrated(samples, data.fingerprint(samples), calibration.skipped)
        windows = held_out(args, calibration, loaded, record) if args.eval_ppl else None

    def measure(of, loaded, record):
        with record.phase("evaluate"), loaded.placement.running():
            if args.eval_ppl:
                record.perplexity[of] = evaluate.perplexity(loaded.model, windows, f"perplexity, {of}")
            if args.eval_speed:
                record.speed[of] = evaluate.speed(loaded.model, data.text_of(samples))

    if parallel.is_main():
        measure("dense", loaded, record)
    key = score_key(args, loaded, record.data, method)
    shapes = prune.sum_shapes(loaded.layers, method)
    with sums.open_scores(args.scores, key, shapes) as kept:
        found = None
        if not method.structured or any(ratios):  # else there is nothing to choose, so nothing to score
            record.scores(args.scores, kept.is_complete)
            with record.phase("score"), memory.peak_memory(loaded.placement.main, record.peak_bytes, "scoring"):
                batches = tape.collate(samples, args.batch_size)
                with loaded.hidden_states() as hidden:
                    found = prune.score(loaded.model, loaded.layers, batches, method, args.neuron_score, kept,
                                        loaded.placement, hidden)  # fmt: skip
        parallel.stop()
        if not parallel.is_main():
            return
        for number, ratio in enumerate(ratios):
            loaded = loaded.again() if number else loaded
            result = record.of_ratio(ratio, targets[ratio])
            with result.phase("prune"):
                selection = select(args, loaded, found, method, ratio)
                prune.remove(loaded.model, loaded.layers, selection)
                result.pruned(evaluate.size(loaded.model, loaded.layers), selection)
            measure("pruned", loaded, result)
            if targets[ratio]:
                save(args, targets[ratio], loaded, selection, samples, result)
            print(result.text(), flush=True)


def select(args, loaded, sums, method, ratio):
    """What stays at this ratio."""
    from lib import prune

    if sums is None:
        return prune.everything(loaded.layers)
    return prune.select(loaded.layers, sums, method, ratio, args.global_pruning, args.neuron_score, args.align,
                        args.seed)  # fmt: skip


def held_out(args, calibration, loaded, record):
    """What perplexity is measured on, `[windows, tokens]`."""
    from lib import builder, data

    seqlen = min(args.eval_seqlen or loaded.seqlen, builder.context_length(loaded.model.config))
    windows, source = data.held_out_windows(
        calibration, loaded.model, loaded.tokenizer, seqlen, args.eval_windows, args.seed
    )
    data.refuse_unknown_tokens(loaded.model, windows)
    record.measured_on = f"{source}, {len(windows)} windows of {seqlen} tokens"
    return windows


def score_key(args, loaded, data_facts: dict, method) -> dict:
    """All that the sums depend on, what a person would notice first."""
    from lib import builder

    dtype = loaded.resources.dtype
    return {
        "model": args.model,
        "dtype": str(dtype).removeprefix("torch."),
        "neuron_score": method.reduction_name(args.neuron_score),
        "batch_size": args.batch_size,
        "towers": args.towers,
        "seed": args.seed,
        **{f"calibration {name}": value for name, value in data_facts.items()},
        "weights": builder.fingerprint(loaded.model, dtype),
    }


def save(args, target, loaded, selection, samples, result) -> None:
    """Write the result to the folder `target`, load it back, compare; complete or not at all."""
    from lib import checkpoint, prune, tape
    from lib.mlp import find_layers, only_towers

    formats = checkpoint.choose_formats(args.save_format, args.global_pruning)
    with checkpoint.complete_or_absent(target) as folder, result.phase("save"):
        saved, layers = loaded.in_own_dtype(args.dtype), loaded.layers
        if saved is not loaded.model:
            layers = only_towers(find_layers(saved), args.towers)
            prune.remove(saved, layers, selection)
        checkpoint.save(folder, saved, layers, loaded.processor, formats)
        checkpoint.save_selection(folder, layers, selection)
        if not args.no_verify:
            checkpoint.verify(folder, saved, tape.inputs_of(samples[0], VERIFY_TOKENS), formats)
            result.verified = True
        checkpoint.save_report(folder, result.report())
    result.bytes_on_disk = checkpoint.bytes_on_disk(target, formats)


if __name__ == "__main__":
    sys.exit(main())
