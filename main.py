"""AFR-St: prune the MLP layers of a large language model. `python main.py --help` explains every flag."""

import os
import sys

VERIFY_TOKENS = 64


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
    from lib.mlp import find_layers, only_towers
    from lib.summary import Run

    args = options.parse(argv)
    builder.quiet_libraries()
    method = prune.METHODS[args.prune_method]
    record = Run(vars(args))
    formats = checkpoint.choose_formats(args.save_format, args.global_pruning)
    if args.save_model:
        checkpoint.check_target(args.save_model, args.overwrite)

    with record.phase("load"):
        calibration = data.find_calibration(args.dataset, args.data_dir, args.image_dir)
        loaded = builder.load(args.model, args.dtype, args.cuda, args.cache_dir, args.seqlen, method.sees)
        model, layers = loaded.model, only_towers(find_layers(loaded.model), args.towers)
        record.dense(evaluate.size(model, layers), loaded)

    with record.phase("calibrate"):
        samples = calibration.samples(model, loaded.processor, args.nsamples, loaded.seqlen, args.seed)
        data.refuse_unknown_tokens(model, samples)
        record.calibrated(samples, data.fingerprint(samples), calibration.skipped)
    if args.eval_ppl:
        with record.phase("evaluate"):
            seqlen = min(args.eval_seqlen or loaded.seqlen, builder.context_length(model.config))
            windows, source = data.held_out_windows(
                calibration, model, loaded.tokenizer, seqlen, args.eval_windows, args.seed
            )
            data.refuse_unknown_tokens(model, windows)
            record.measured_on = f"{source}, {len(windows)} windows of {seqlen} tokens"

    def measure(name):
        with record.phase("evaluate"):
            if args.eval_ppl:
                record.perplexity[name] = evaluate.perplexity(model, windows, f"perplexity, {name}")
            if args.eval_speed:
                record.speed[name] = evaluate.speed(model, data.text_of(samples))

    measure("dense")
    with record.phase("score"), evaluate.peak_memory(model.device, record.peak_bytes, "scoring"):
        selection = prune.choose(
            model,
            layers,
            score.collate(samples, args.batch_size),
            method,
            args.pruning_ratio,
            across_layers=args.global_pruning,
            neuron_score=args.neuron_score,
            align=args.align,
        )
    with record.phase("prune"):
        prune.remove(model, layers, selection)
        record.pruned(evaluate.size(model, layers), selection)
    measure("pruned")

    if args.save_model:
        with checkpoint.complete_or_absent(args.save_model) as folder, record.phase("save"):
            saved = loaded.in_own_dtype(args.dtype)
            if saved is not model:
                layers = only_towers(find_layers(saved), args.towers)
                prune.remove(saved, layers, selection)
            checkpoint.save(folder, saved, layers, loaded.processor, formats)
            checkpoint.save_selection(folder, layers, selection)
            if not args.no_verify:
                checkpoint.verify(folder, saved, score.inputs_of(samples[0], VERIFY_TOKENS), formats)
                record.verified = True
            checkpoint.save_report(folder, record.report())
        record.bytes_on_disk = checkpoint.bytes_on_disk(args.save_model, formats)
    print(record.text(formats))


if __name__ == "__main__":
    sys.exit(main())
