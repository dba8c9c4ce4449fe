"""AFR-St: prune the MLP layers of a large language model. `python main.py --help` explains every flag."""

import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    try:
        # Loading the libraries takes seconds, in which Ctrl-C should be answered in one line too.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of all libraries
        from lib.errors import UserError

        try:
            run(argv)
            return 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was saved", file=sys.stderr)
        return 130


def run(argv: list[str] | None) -> None:
    """Parse, load, calibrate, score, select, prune, save, report."""
    from lib import builder, checkpoint, data, evaluate, options, prune, score
    from lib.mlp import find_layers
    from lib.summary import Run

    args = options.parse(argv)
    builder.quiet_libraries()
    method = prune.METHODS[args.prune_method]
    record = Run(vars(args))
    formats = checkpoint.choose_formats(args.save_format, method.structured and args.global_pruning)
    if args.save_model:
        checkpoint.check_target(args.save_model, args.overwrite)

    with record.phase("load"):
        calibration = data.Calibration(args.dataset, args.data_dir)
        loaded = builder.load(args.model, args.dtype, args.cuda, args.cache_dir, args.seqlen)
        model, layers = loaded.model, find_layers(loaded.model)
        record.dense(evaluate.size(model, layers), loaded)
        if args.save_model and method.structured and "hf" in formats:
            checkpoint.refuse_fixed_width(model, layers)

    with record.phase("calibrate"):
        samples = calibration.samples(model, loaded.tokenizer, args.nsamples, loaded.seqlen, args.seed)
        record.calibrated(samples, data.fingerprint(samples))
    if args.eval_ppl:
        with record.phase("evaluate"):
            seqlen = min(args.eval_seqlen or loaded.seqlen, builder.context_length(model.config))
            windows, source = data.held_out_windows(calibration, model, loaded.tokenizer, seqlen, args.eval_windows,
                                                     args.seed)
            record.measured_on = f"{source}, {len(windows)} windows of {seqlen} tokens"
            record.perplexity["dense"] = evaluate.perplexity(model, windows, "perplexity, dense")

    with record.phase("score"), evaluate.peak_memory(model.device, record.peak_bytes, "scoring"):
        selection = prune.choose(
            model, layers, score.collate(samples, args.batch_size), method, args.pruning_ratio,
            across_layers=args.global_pruning, neuron_score=args.neuron_score, align=args.align,
        )
    with record.phase("prune"):
        prune.remove(model, layers, selection)
        record.pruned(evaluate.size(model, layers), selection)
    if args.eval_ppl:
        with record.phase("evaluate"):
            record.perplexity["pruned"] = evaluate.perplexity(model, windows, "perplexity, pruned")

    if args.save_model:
        with checkpoint.complete_or_absent(args.save_model) as folder, record.phase("save"):
            saved = loaded.in_own_dtype(args.dtype)
            if saved is not model:
                layers = find_layers(saved)
                prune.remove(saved, layers, selection)
            checkpoint.save(folder, saved, loaded.tokenizer, formats)
            checkpoint.save_selection(folder, layers, selection)
            checkpoint.save_report(folder, record.report())
    print(record.text(formats))


if __name__ == "__main__":
    sys.exit(main())
