"""AFR-St: prune the MLP layers of a large language model. `python main.py --help` explains every flag."""

import os
import sys

from lib import errors, signals, terminal


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: every result is saved or was shown;  1: one was neither;  2: an error that the user can mend;  130, 143, 129:
    interrupted by Ctrl-C, SIGTERM, SIGHUP. Raises what can only be a bug.
    """
    with terminal.lenient_streams():
        try:
            # Loading the libraries takes seconds, in which an interrupt should be answered in one line too.
            with signals.as_interrupts():
                os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
                if not terminal.watched() or os.environ.get("RANK", "0") != "0":
                    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of all libraries
                return 0 if run(argv) else 1
        except KeyboardInterrupt as interrupt:
            return interrupted(interrupt)
        except Exception as error:
            line = errors.one_line(error)
            if line is None:
                raise
            terminal.complain("error", line)
            return 2


def interrupted(interrupt: KeyboardInterrupt) -> int:
    """Say what became of the run; returns the exit code.

    Of several processes those that were told to end by a launcher, since another one failed, have nothing to add.
    """
    number, left = signals.number_of(interrupt), str(interrupt)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if left or alone or (number == signals.CTRL_C and os.environ.get("RANK", "0") == "0"):
        terminal.complain("interrupted", left or "nothing was left half-written")
    return 128 + number


def run(argv: list[str] | None) -> bool:
    """Parse the command line, then prune while the folders for the results are reserved.

    Returns whether every result is saved or was shown.
    """
    from lib import builder, options, target

    args = options.parse(argv)
    builder.quiet_libraries()
    with target.reserved(args, options.ratios_of(args)) as targets:
        return prune_at_ratios(args, targets)


def prune_at_ratios(args, targets) -> bool:
    """Load, calibrate, score, and make the result of each ratio. Returns whether every one is saved or was shown."""
    from lib import builder, compensate, data, evaluate, memory, options, parallel, prune, steps, sums
    from lib.dry_run import dry_run
    from lib.summary import Run

    ratios, method = list(targets), prune.METHODS[args.prune_method]
    if args.scores:
        sums.check_path(args.scores)
    parallel.start(args.cuda)
    record = Run(vars(args))

    with record.phase("load"):
        calibration = data.find_calibration(args.dataset, args.data_dir, args.image_dir)
        calibration.refuse_unusable(args.nsamples, args.seed)
        loaded = builder.load(args.model, args.dtype, args.cuda, args.cache_dir, args.seqlen, method.sees, args.towers,
                              args.offload, args.max_memory)  # fmt: skip
        compensate.refuse_impossible(loaded.model, loaded.layers, args.compensate)
        options.check_widths(args, loaded.layers)
        record.dense(evaluate.size(loaded.model, loaded.layers), loaded)
        steps.refuse_full_disks(args, targets, loaded, record.before)
    dry_run(args, loaded, ratios, record)

    with record.phase("calibrate"), loaded.placement.running():
        samples = calibration.samples(loaded.model, loaded.processor, args.nsamples, loaded.seqlen, args.seed)
        data.refuse_unknown_tokens(loaded.model, samples)
        record.calibrated(samples, data.fingerprint(samples), calibration.skipped)
        windows = steps.held_out(args, calibration, loaded, record) if args.eval_ppl else None

    shapes = prune.sum_shapes(loaded.layers, method)
    nothing_to_choose = method.structured and not any(ratios)
    key, path = steps.score_key(args, loaded, record.data, method), None if nothing_to_choose else args.scores
    with sums.open_scores(path, key, shapes, args.save_model or "pruned_model") as kept:
        found = None
        if parallel.is_main():
            steps.measure(args, "dense", loaded, windows, samples, record)
        if not nothing_to_choose:
            record.scores(args.scores, kept.is_complete)
            with memory.peak_memory(loaded.placement.main, record.peak_bytes, "scoring"):
                found = steps.score(args, loaded, samples, kept, record)
        parallel.stop()
        if not parallel.is_main():
            return True
        return make_results(args, targets, loaded=loaded, sums=found, samples=samples, windows=windows, record=record)


def make_results(args, targets, *, loaded, sums, samples, windows, record) -> bool:
    """For each ratio select, compensate, prune, save to its target, report; whether every result is saved or shown."""
    from lib import steps

    told = []
    for number, (ratio, place) in enumerate(targets.items()):
        result = record.of_ratio(ratio, place)
        with result.phase("load"):
            loaded = loaded.again() if number else loaded
        loaded, last = steps.later_rounds(args, ratio, loaded, sums, samples, result)
        selection, fits = steps.prune_at(args, ratio, loaded, last, samples, result)
        steps.measure(args, "pruned", loaded, windows, samples, result)
        if place:
            steps.save(args, place, loaded, selection, fits, samples, result)
        told.append(terminal.say(result.text(), elsewhere=place is not None))
    return all(told)


if __name__ == "__main__":
    sys.exit(main())
