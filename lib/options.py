"""The command line: every flag once, with its default and a sentence on when to change it."""

import argparse
import math
import os
from collections.abc import Sequence

from lib import llava_data, parallel, paths
from lib.builder import DTYPES
from lib.compensate import KINDS
from lib.data import FILE_TYPES, SELF_GENERATED, SETS
from lib.errors import UserError
from lib.mlp import LANGUAGE, VISION, Layer
from lib.offload import WHERE
from lib.prune import METHODS, NEURON_SCORES

DEFAULT_SET = "wikitext2"
PATHS = ("model", "cache_dir", "dataset", "image_dir", "scores", "data_dir", "save_model")
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja")
LONGEST_SUFFIX = ".partial.walk0000.new"  # what is added to --scores while it is written
# From and to: what every number is taken in, beyond what a model or a data set allows. The seed's upper end keeps the
# seeds that are derived from it (a sum, a product with the layers) apart and within 64 bits.
BOUNDS = {
    "nsamples": (1, 2**20),
    "batch_size": (1, 2**20),
    "align": (1, 2**20),
    "rounds": (1, 2**20),
    "eval_windows": (1, 2**20),
    "seqlen": (2, 2**24),
    "eval_seqlen": (2, 2**24),
    "seed": (0, 2**32 - 1),
    "max_memory": (0, 2**32),
}
EPILOG = """examples:
  python main.py --model meta-llama/Meta-Llama-3-8B --pruning_ratio 0.2 --cuda --save_model ./pruned_model/llama
  python main.py --model ./my-model --prune_method afr --pruning_ratio 0.5 --global_pruning --eval_ppl
  python main.py --model liuhaotian/llava-v1.5-13b --prune_method structured_afr_llava --pruning_ratio 0.2 --cuda
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} ('python main.py --help' explains every flag)")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wraps help texts, keeps the examples as they are, and prints defaults that mean something."""

    def _get_help_string(self, action):
        silent = action.required or any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        return action.help if silent or "%(default)" in action.help else f"{action.help} [default: %(default)s]"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line. Raises UserError for a value out of range."""
    args = build_parser().parse_args(argv)
    if args.dataset is None:
        args.dataset = llava_data.NAME if METHODS[args.prune_method].sees else DEFAULT_SET
    _check(args)
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser, its flags in groups."""
    parser = _Parser(
        prog="main.py",
        formatter_class=_Help,
        epilog=EPILOG,
        allow_abbrev=False,
        description="Prune the MLP layers of a large language model.",
    )
    _add_model(parser.add_argument_group("model"))
    _add_method(parser.add_argument_group("method"))
    _add_calibration(parser.add_argument_group("calibration"))
    _add_saving(parser.add_argument_group("saving"))
    _add_evaluation(parser.add_argument_group("evaluation"))
    return parser


def _add_model(group):
    group.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="what to prune: a Hugging Face Hub name, a local folder, or a .gguf file (dequantised)",
    )
    group.add_argument("--cuda", action="store_true", help="use the GPU; without this flag everything runs on the CPU")
    group.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="weights and activations while scoring. auto is bfloat16 on a GPU or a CPU with bf16 "
        "matrix units, else float32, and saves in the checkpoint's own dtype; naming one also "
        "saves in it. Scores are always float32",
    )
    group.add_argument(
        "--offload",
        choices=list(WHERE),
        default="auto",
        help="where the weights of layers are while they do not work. cpu, disk: in memory, or in files, and only the "
        "layer at work, and the next, are on the GPU; auto: on the GPU (or GPUs) if they fit, else as far away as "
        "they must be",
    )
    group.add_argument(
        "--max_memory",
        type=float,
        metavar="GIB",
        help="memory that weights may take on a GPU, or weights and hidden states on a CPU; beyond it they are "
        "offloaded [default: what is free]",
    )
    group.add_argument("--cache_dir", default="llm_weights", metavar="DIR", help="where models from the Hub are kept")


def _add_method(group):
    methods = "; ".join(f"{m.name}: {m.summary}" for m in METHODS.values())
    group.add_argument(
        "--prune_method",
        choices=list(METHODS),
        default="structured_afr",
        metavar="METHOD",
        help=f"what is removed, and by which score. {methods}",
    )
    group.add_argument(
        "--pruning_ratio",
        type=_ratios,
        default=0.0,
        metavar="R",
        help="share of the MLP neurons (structured methods) or MLP weights (the others) to remove, 0.2 = 20%%. "
        "Several, as in 0.1,0.2,0.5, are scored once and saved to SAVE_MODEL/0.1 and so on",
    )
    group.add_argument(
        "--global_pruning",
        action="store_true",
        help="one threshold across all layers, so that widths may differ by layer; often better at high ratios. "
        "Without it every layer loses the same share",
    )
    _add_structured(group)


def _add_structured(group):
    group.add_argument(
        "--neuron_score",
        choices=list(NEURON_SCORES),
        default="trimmed_mean",
        help="structured_afr and its like: how a neuron's weight saliencies become one number. trimmed_mean is "
        "the method's own; abs_sum often does better at low ratios; token_fisher adds up the squared slopes of single "
        "tokens, with labels drawn from the model, in A_CE, and takes A_FO by abs_sum",
    )
    group.add_argument(
        "--towers",
        choices=["both", VISION, LANGUAGE],
        default="both",
        help="structured_afr_llava: which of its towers lose neurons; each is standardised and thresholded by itself, "
        "but the objectives are those of all that is pruned, so vision alone chooses other neurons than both does",
    )
    group.add_argument(
        "--align",
        type=int,
        default=1,
        metavar="N",
        help="structured methods: round each layer's width to a multiple of N; 64 or 128 suits tensor cores",
    )
    group.add_argument(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="structured methods: prune in N equal parts and score what is left, compensated, before each; costs N "
        "times the scoring; worth a try at high ratios",
    )
    group.add_argument(
        "--compensate",
        choices=list(KINDS),
        default="none",
        help="structured methods: hand what was removed to what stays. bias: its mean goes into the bias (as in FLAP; "
        "for families that have one); ridge: output projections are refitted to the calibration data, layer by layer; "
        "auto: per layer what does best on held-out samples, never worse there than none; costs three passes "
        "over the layers without gradients, and pays most at high ratios",
    )


def _add_calibration(group):
    group.add_argument(
        "--dataset",
        metavar="NAME",
        help=f"what the model is scored on: {', '.join(SETS)}, {SELF_GENERATED} (sampled from the "
        f"model, needs no network), or a {'/'.join(FILE_TYPES)} file of yours. For structured_afr_llava: "
        f"{llava_data.NAME} (DATA_DIR/{llava_data.NAME}), or a .json file in the form of LLaVA-Pretrain "
        f"[default: {DEFAULT_SET}; for structured_afr_llava: {llava_data.NAME}]",
    )
    group.add_argument(
        "--image_dir",
        metavar="DIR",
        help="structured_afr_llava: where the images are [default: images, beside the .json file]",
    )
    group.add_argument(
        "--nsamples",
        type=int,
        default=128,
        metavar="N",
        help="calibration samples; scoring time grows with it",
    )
    group.add_argument(
        "--seqlen",
        type=int,
        metavar="N",
        help="tokens in a calibration sample and in a perplexity window "
        "[default: 1024, at most what the model was made for]",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=1,
        metavar="N",
        help="samples scored at once; the first-order objective is then taken over the batch",
    )
    group.add_argument(
        "--scores",
        metavar="FILE",
        help="keep what scoring accumulates: another ratio, --global_pruning, --align, or method with the same sums "
        "then takes seconds, and a run that was killed goes on where it was",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="which samples are drawn")
    group.add_argument(
        "--data_dir",
        default="data_local",
        metavar="DIR",
        help="where data sets are looked for before the Hub, and kept after it",
    )


def _add_saving(group):
    group.add_argument("--save_model", metavar="DIR", help="folder for the result; without it nothing is saved")
    group.add_argument(
        "--save_format",
        choices=["auto", "hf", "bin", "both"],
        default="auto",
        help="hf: a Hugging Face folder; bin: model.bin, the pickled model and tokenizer; auto: hf, and "
        "with --global_pruning both",
    )
    group.add_argument(
        "--no_verify",
        action="store_true",
        help="do not load the result back and compare its logits with the pruned model's",
    )
    group.add_argument(
        "--report",
        action="store_true",
        help="write report.html beside the result: a page with the widths, the scores and what was measured, to look "
        "at in any browser",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the result that stands in --save_model; nothing else is ever replaced",
    )


def _add_evaluation(group):
    group.add_argument(
        "--eval_ppl",
        action="store_true",
        help="measure perplexity on wikitext2 test before and after (with --dataset "
        f"{SELF_GENERATED}: on text the model generates from another seed)",
    )
    group.add_argument(
        "--eval_speed", action="store_true", help="measure tokens per second, reading and writing, before and after"
    )
    group.add_argument(
        "--eval_windows", type=int, metavar="N", help="perplexity windows, to bound the time [default: all]"
    )
    group.add_argument("--eval_seqlen", type=int, metavar="N", help="tokens in a perplexity window [default: --seqlen]")


def ratios_of(args: argparse.Namespace) -> list[float]:
    """The ratios to prune at: one, or several."""
    return args.pruning_ratio if isinstance(args.pruning_ratio, list) else [args.pruning_ratio]


def _ratios(text: str) -> float | list[float]:
    """One number, or several with commas between them."""
    try:
        found = [float(part) + 0.0 for part in text.split(",")]  # + 0.0: no negative zero
        return found if len(found) > 1 else found[0]
    except ValueError as error:
        raise UserError(
            f"--pruning_ratio {text}: expected a number from 0 to 1, or several with commas between them "
            "(see python main.py --help)"
        ) from error


def _check(args: argparse.Namespace) -> None:
    ratios = ratios_of(args)
    for ratio in ratios:
        if not (math.isfinite(ratio) and 0 <= ratio < 1):
            raise UserError(
                f"--pruning_ratio {ratio}: must be at least 0 and less than 1 (0.2 removes 20% of the MLP neurons)"
            )
    if len(set(ratios)) < len(ratios):
        raise UserError(f"--pruning_ratio {','.join(map(str, ratios))}: the same ratio stands there twice")
    _check_bounds(args)
    _check_paths(args)
    if args.report and not args.save_model:
        raise UserError("--report: is written beside the result; add --save_model DIR")
    _check_sight(args)
    _check_compensation(args)
    _check_rounds(args)
    if args.scores and not METHODS[args.prune_method].summed:
        raise UserError(f"--scores {args.scores}: {args.prune_method} takes no calibration; leave it out")
    if not METHODS[args.prune_method].takes_neuron_score and args.neuron_score != "trimmed_mean":
        raise UserError(
            f"--neuron_score {args.neuron_score}: {args.prune_method} has a score of its own; leave it out, or choose "
            f"{', '.join(m.name for m in METHODS.values() if m.takes_neuron_score)}"
        )
    if not METHODS[args.prune_method].structured and args.align != 1:
        raise UserError(f"--align {args.align}: {args.prune_method} removes single weights and no widths; leave it out")


def _check_bounds(args: argparse.Namespace) -> None:
    if args.max_memory is not None and not args.max_memory > 0:
        raise UserError(f"--max_memory {args.max_memory}: must be more than 0 (GiB)")
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise UserError(f"--{name} {value}: must be {limit}")


def _check_paths(args: argparse.Namespace) -> None:
    """Expand `~` in every path; refuse what is empty, or cannot be looked up or read."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError("the working folder does not exist any more; change to one that does") from error
    for flag in PATHS:
        if (value := getattr(args, flag)) is not None:
            setattr(args, flag, paths.checked(flag, value))
    paths.refuse_locked("model", args.model, "", *MODEL_FILES)
    if args.dataset not in SETS:
        paths.refuse_locked("dataset", args.dataset, "")
    measured = [DEFAULT_SET] if args.eval_ppl and args.dataset != SELF_GENERATED else []
    sets = [name for name in (*SETS, llava_data.NAME) if name in (args.dataset, *measured)]
    if sets:
        paths.refuse_locked("data_dir", args.data_dir, *sets)
    if args.image_dir:
        paths.refuse_locked("image_dir", args.image_dir)
    if args.save_model:
        paths.refuse_locked("save_model", args.save_model)
    if args.scores:
        paths.look_up(f"--scores {args.scores}", args.scores + LONGEST_SUFFIX)


def check_widths(args: argparse.Namespace, layers: Sequence[Layer]) -> None:
    """Raise UserError for an --align or a number of --rounds that the MLPs of these layers are too narrow for."""
    widths = [layer.block.width for layer in layers if layer.block]
    if METHODS[args.prune_method].structured and args.align > min(widths):
        raise UserError(f"--align {args.align}: must be at most the width of the narrowest MLP, {min(widths)}")
    most = int(max(ratios_of(args)) * sum(widths))
    if args.rounds > most > 0:
        raise UserError(
            f"--rounds {args.rounds}: each round scores the model anew and removes a part of the {most} neurons that "
            f"go in all; take a few, at most {most}"
        )


def _check_compensation(args: argparse.Namespace) -> None:
    if args.compensate == "none":
        return
    if not METHODS[args.prune_method].structured:
        raise UserError(
            f"--compensate {args.compensate}: {args.prune_method} removes single weights; compensation is for methods "
            "that remove neurons (structured_...)"
        )
    if args.nsamples < 2:
        raise UserError(f"--compensate {args.compensate}: needs --nsamples of at least 2, one of them to check on")


def _check_rounds(args: argparse.Namespace) -> None:
    method = METHODS[args.prune_method]
    if args.rounds > 1 and not (method.structured and method.by_gradients):
        raise UserError(
            f"--rounds {args.rounds}: is for methods that remove neurons by gradients (structured_afr and its like); "
            f"leave it out with {args.prune_method}"
        )
    if args.rounds > 1 and parallel.world() > 1:
        raise UserError(
            f"--rounds {args.rounds}: later rounds are scored by one process; start one, without a launcher"
        )


def _check_sight(args: argparse.Namespace) -> None:
    """Captioned images are for the method that prunes models that see, and for no other."""
    images = llava_data.is_captioned(args.dataset)
    if METHODS[args.prune_method].sees:
        if not images:
            raise UserError(
                f"--dataset {args.dataset}: {args.prune_method} needs images with captions: {llava_data.NAME}, or a "
                ".json file in the form of LLaVA-Pretrain with --image_dir"
            )
        return
    for flag, given in (("dataset", images), ("image_dir", args.image_dir), ("towers", args.towers != "both")):
        if given:
            raise UserError(
                f"--{flag} {getattr(args, flag)}: is for structured_afr_llava; {args.prune_method} takes text"
            )
