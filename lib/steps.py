"""Steps of a run that need more than one call: what main.py lists, spelled out."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lib import builder, checkpoint, data, evaluate, memory, prune, report, tape, target
from lib import compensate as compensation
from lib.builder import DTYPES, Loaded
from lib.compensate import Fit
from lib.mlp import find_layers, only_towers
from lib.modules_cache import temporary_modules_cache
from lib.prune import Selection
from lib.result_folder import files_of
from lib.summary import Run
from lib.sums import InMemory, ScoreFile
from lib.tape import Sample
from lib.target import Target
from lib.vectors import ModelVector

VERIFY_TOKENS = 64


def held_out(args: argparse.Namespace, calibration, loaded: Loaded, record: Run) -> Tensor:
    """What perplexity is measured on, `[windows, tokens]`."""
    seqlen = min(args.eval_seqlen or loaded.seqlen, builder.context_length(loaded.model.config))
    windows, source = data.held_out_windows(
        calibration, loaded.model, loaded.tokenizer, seqlen, args.eval_windows, args.seed
    )
    data.refuse_unknown_tokens(loaded.model, windows)
    record.measured_on = f"{source}, {len(windows)} windows of {seqlen} tokens"
    return windows


def score_key(args: argparse.Namespace, loaded: Loaded, data_facts: dict, method: prune.Method) -> dict:
    """All that the sums depend on, first what a person would notice."""
    dtype = loaded.resources.dtype
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "neuron_score": method.reduction_name(args.neuron_score),
        "batch_size": args.batch_size,
        "towers": args.towers,
        "seed": args.seed,
        **{f"calibration {name}": value for name, value in data_facts.items()},
        "model's weights": builder.fingerprint(loaded.model, dtype),
    }


def measure(
    args: argparse.Namespace, of: str, loaded: Loaded, windows: Tensor | None, samples: Sequence[Sample], record: Run
) -> None:
    """Perplexity and speed of the model as it is now, where they were asked for; `of` is "dense" or "pruned"."""
    if not (args.eval_ppl or args.eval_speed):
        return
    with record.phase("evaluate"), loaded.placement.running():
        if args.eval_ppl:
            record.perplexity[of] = evaluate.perplexity(loaded.model, windows, f"perplexity, {of}")
        if args.eval_speed:
            context = builder.context_length(loaded.model.config)
            record.speed[of] = evaluate.speed(loaded.model, data.text_of(samples), context)


def score(
    args: argparse.Namespace, loaded: Loaded, samples: Sequence[Sample], kept: InMemory | ScoreFile, record: Run
) -> dict[str, ModelVector]:
    """What the method's formula takes: a vector per objective, summed over the samples, which `kept` then holds."""
    with record.phase("score"), loaded.hidden_states() as hidden:
        return prune.score(
            loaded.model,
            loaded.layers,
            tape.collate(samples, args.batch_size),
            prune.METHODS[args.prune_method],
            args.neuron_score,
            kept,
            loaded.placement,
            hidden,
            args.seed,
        )


def later_rounds(
    args: argparse.Namespace,
    ratio: float,
    loaded: Loaded,
    sums: dict[str, ModelVector] | None,
    samples: Sequence[Sample],
    result: Run,
) -> tuple[Loaded, dict[str, ModelVector] | None]:
    """The model, dense, and its sums from the last of `--rounds`: each prunes a part more and scores what is left.

    What is gone has sums of 0, the least there are, so that it goes again.
    """
    if sums is None or not ratio:
        return loaded, sums
    for number in range(1, args.rounds):
        with result.phase("prune"):
            selection = select(args, loaded, sums, ratio * number / args.rounds)
        if args.compensate != "none":
            compensate(args, loaded, selection, samples, result)
        prune.silence(loaded.layers, selection)
        sums = score(args, loaded, samples, InMemory(), result)
        loaded = loaded.again()
    return loaded, sums


def prune_at(
    args: argparse.Namespace,
    ratio: float,
    loaded: Loaded,
    sums: dict[str, ModelVector] | None,
    samples: Sequence[Sample],
    result: Run,
) -> tuple[Selection, list[Fit] | None]:
    """Select, compensate and remove at one ratio; what stayed, and what was refitted."""
    with result.phase("prune"):
        selection = select(args, loaded, sums, ratio)
    if args.report and sums is not None:
        with result.phase("report"):
            method = prune.METHODS[args.prune_method]
            result.pictures = report.pictures(loaded.layers, sums, method, args.neuron_score, selection, args.seed)
    compensated = args.compensate != "none" and ratio > 0
    fits = compensate(args, loaded, selection, samples, result) if compensated else None
    with result.phase("prune"):
        prune.remove(loaded.model, loaded.layers, selection)
        result.pruned(evaluate.size(loaded.model, loaded.layers), selection)
    return selection, fits


def select(
    args: argparse.Namespace, loaded: Loaded, sums: dict[str, ModelVector] | None, ratio: float
) -> Selection:
    """What stays at this ratio; everything where nothing was scored."""
    if sums is None:
        return prune.everything(loaded.layers)
    method = prune.METHODS[args.prune_method]
    return prune.select(
        loaded.layers, sums, method, ratio, args.global_pruning, args.neuron_score, args.align, args.seed
    )


def compensate(
    args: argparse.Namespace, loaded: Loaded, selection: Selection, samples: Sequence[Sample], result: Run
) -> list[Fit]:
    """Refit the dense model's output projections for what is about to be removed."""
    batches = tape.collate(samples, compensation.batch_size(len(samples)))
    with (
        result.phase("compensate"),
        memory.peak_memory(loaded.placement.main, result.peak_bytes, "compensating"),
        loaded.hidden_states() as hidden,
    ):
        fits = compensation.compensate(
            loaded.model,
            loaded.layers,
            selection,
            batches,
            args.compensate,
            loaded.placement,
            hidden,
            loaded.own_dtype,
        )
    result.compensated(fits)
    return fits


def refuse_full_disks(
    args: argparse.Namespace, targets: dict[float, Target | None], loaded: Loaded, size: evaluate.Size
) -> None:
    """Raise UserError when the weights of the results are sure not to fit on the disk."""
    formats = checkpoint.choose_formats(args.save_format, args.global_pruning)
    structured = prune.METHODS[args.prune_method].structured
    bytes_each = DTYPES.get(args.dtype, loaded.own_dtype).itemsize * len(formats)
    needed = {
        place: int((size.total - (ratio * size.mlp if structured else 0)) * bytes_each)
        for ratio, place in targets.items()
        if place
    }
    target.refuse_full_disks(needed)


def save(
    args: argparse.Namespace,
    place: Target,
    loaded: Loaded,
    selection: Selection,
    fits: Sequence[Fit] | None,
    samples: Sequence[Sample],
    result: Run,
) -> None:
    """Write the result to its target, load it back, compare; complete or not at all."""
    with place.writing() as folder, result.phase("save"):
        write(args, folder, loaded, selection, fits, samples, result)

        def describe(where: str) -> None:
            result.args["save_model"] = where
            if args.report:
                checkpoint.save_page(folder, report.page(result.report(), result.pictures))
            files = sorted({*files_of(folder), checkpoint.REPORT})
            checkpoint.save_report(folder, result.report() | {"files": files})

        where = place.put(folder, describe)
    formats = checkpoint.choose_formats(args.save_format, args.global_pruning)
    result.bytes_on_disk = checkpoint.bytes_on_disk(where, formats)


def write(
    args: argparse.Namespace,
    folder: Path,
    loaded: Loaded,
    selection: Selection,
    fits: Sequence[Fit] | None,
    samples: Sequence[Sample],
    result: Run,
) -> None:
    """Write the model, and what was kept, to an existing folder; load it back, compare."""
    formats = checkpoint.choose_formats(args.save_format, args.global_pruning)
    saved, layers = loaded.in_own_dtype(args.dtype), loaded.layers
    if saved is not loaded.model:
        layers = only_towers(find_layers(saved), args.towers)
        if fits:
            compensation.write(saved, layers, selection, fits)
        prune.remove(saved, layers, selection)
    checkpoint.save(folder, saved, layers, loaded.processor, formats)
    checkpoint.save_selection(folder, layers, selection)
    if not args.no_verify:
        with temporary_modules_cache(), memory.named("verify", result.kept("verify")):
            checkpoint.verify(folder, saved, tape.inputs_of(samples[0], VERIFY_TOKENS), formats)
        result.verified = True
