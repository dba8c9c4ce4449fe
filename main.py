"""AFR-St: prune the MLP layers of a large language model. `python main.py --help` explains every flag."""

import os
import sys


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
            print("interrupted: nothing was left half-written", file=sys.stderr)
        return 130


def run(argv: list[str] | None) -> None:
    """Parse, load, calibrate, score; for each ratio select, compensate, prune, save, report."""
    from lib import builder, checkpoint, compensate, data, evaluate, memory, options, parallel, prune, steps, sums, tape
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
        calibration.refuse_unusable(args.nsamples, args.seed)
        loaded = builder.load(args.model, args.dtype, args.cuda, args.cache_dir, args.seqlen, method.sees, args.towers,
                              args.offload, args.max_memory)  # fmt: skip
        compensate.refuse_impossible(loaded.model, loaded.layers, args.compensate)
        record.dense(evaluate.size(loaded.model, loaded.layers), loaded)

    with record.phase("calibrate"), loaded.placement.running():
        samples = calibration.samples(loaded.model, loaded.processor, args.nsamples, loaded.seqlen, args.seed)
        data.refuse_unknown_tokens(loaded.model, samples)
        record.calibrated(samples, data.fingerprint(samples), calibration.skipped)
        windows = steps.held_out(args, calibration, loaded, record) if args.eval_ppl else None

    if parallel.is_main():
        steps.measure(args, "dense", loaded, windows, samples, record)
    shapes = prune.sum_shapes(loaded.layers, method)
    nothing_to_choose = method.structured and not any(ratios)
    key, path = steps.score_key(args, loaded, record.data, method), None if nothing_to_choose else args.scores
    with sums.open_scores(path, key, shapes) as kept:
        found = None
        if not nothing_to_choose:
            record.scores(args.scores, kept.is_complete)
            with record.phase("score"), memory.peak_memory(loaded.placement.main, record.peak_bytes, "scoring"):
                batches = tape.collate(samples, args.batch_size)
                with loaded.hidden_states() as hidden:
                    found = prune.score(loaded.model, loaded.layers, batches, method, args.neuron_score, kept,
                                        loaded.placement, hidden, args.seed)  # fmt: skip
        parallel.stop()
        if not parallel.is_main():
            return
        for number, ratio in enumerate(ratios):
            loaded = loaded.again() if number else loaded
            result = record.of_ratio(ratio, targets[ratio])
            loaded, last = steps.later_rounds(args, ratio, loaded, found, samples, result)
            selection, fits = steps.prune_at(args, ratio, loaded, last, samples, result)
            steps.measure(args, "pruned", loaded, windows, samples, result)
            if targets[ratio]:
                steps.save(args, targets[ratio], loaded, selection, fits, samples, result)
            print(result.text(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
