"""A dry run of the whole pipeline before anything is scored: what would refuse the run at its end refuses it now.

Score, compensate, remove, save, load back and compare, on a few tokens and the first layers of the model: as many as
it takes to see every kind of layer. They have copies of the model's own weights, and a small part of its vocabulary.
What goes wrong for want of memory or disk, or since a model cannot be cut that way, refuses nothing.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig

from lib import evaluate, parallel, prune, steps, tape
from lib.builder import Loaded, context_length
from lib.errors import UserError, is_out_of_memory
from lib.memory import GIB, available_bytes
from lib.mlp import Layer, find_layers, skeleton
from lib.offload import Resources
from lib.rebuild import rebuild
from lib.summary import Run
from lib.sums import InMemory
from lib.tape import HiddenStates, NotFinite
from lib.vectors import ModelVector

TOKENS, SAMPLES = 8, 2
VOCABULARY = 64  # tokens that the cut model knows
LARGEST = 4 * GIB  # bytes of a cut model; of one that cannot be cut, a quarter
WORTH_SAYING = 1.0  # seconds; a shorter dry run is no phase of its own
FULL_DISK = ("os error", "No space left", "PytorchStreamWriter", "unexpected pos", "File too large")


def dry_run(args: argparse.Namespace, loaded: Loaded, ratios: Sequence[float], record: Run) -> None:
    """Run the whole pipeline on a cut copy of the model, in memory of the CPU and in a temporary folder.

    Changes nothing: not the model, nor the state of random numbers. Does nothing for models with a vision tower, and
    in other processes than the main one. Raises UserError for what would refuse the run after scoring.
    """
    if prune.METHODS[args.prune_method].sees or not parallel.is_main():
        return
    with record.phase("dry run"), torch.random.fork_rng(devices=[]):
        cut = _cut(loaded)
        if cut is None:
            _refuse_what_does_not_run(args, loaded)
        else:
            _refuse_what_fails(args, cut, max(ratios), record)
    if record.seconds["dry run"] < WORTH_SAYING:
        del record.seconds["dry run"]


def _refuse_what_does_not_run(args: argparse.Namespace, loaded: Loaded) -> None:
    """Raise UserError where the family's own code fails on two tokens."""
    try:
        with loaded.placement.running(), torch.no_grad():
            loaded.model(input_ids=torch.arange(2, device=loaded.placement.main)[None], use_cache=False)
    except Exception as error:
        if not _is_want_of_room(error):
            raise UserError(
                f"--model {args.model}: the model cannot be run, its configuration may be wrong ({_reason(error)})"
            ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def _refuse_what_fails(args: argparse.Namespace, cut: Loaded, ratio: float, record: Run) -> None:
    try:
        _run(args, cut, ratio, record)
    except NotFinite:
        pass  # the calibration data decide that, and they are not these tokens
    except Exception as error:
        if _is_want_of_room(error) or not _works_unpruned(cut):
            return
        if isinstance(error, UserError):
            raise UserError(f"{str(error).replace('; nothing was kept', '')} (a dry run, before scoring)") from error
        raise UserError(
            f"--model {args.model}: a dry run of this command on {len(cut.layers)} layers failed, before scoring "
            f"({_reason(error)}); please report the model family '{cut.model.config.model_type}'"
        ) from error


def _run(args: argparse.Namespace, loaded: Loaded, ratio: float, record: Run) -> None:
    """What main.py does after loading, at one ratio."""
    args = argparse.Namespace(**vars(args))
    args.rounds, args.batch_size = min(args.rounds, 2), min(args.batch_size, SAMPLES)
    ids = torch.arange(TOKENS)[: max(loaded.seqlen, 1)] % loaded.model.get_input_embeddings().weight.shape[0]
    samples = [ids] * min(SAMPLES, args.nsamples)
    result = Run(copy.deepcopy(record.args))
    result.dense(evaluate.size(loaded.model, loaded.layers), loaded)
    _measure(args, loaded, ids)
    sums = _score(args, loaded, samples) if ratio or not prune.METHODS[args.prune_method].structured else None
    loaded, sums = steps.later_rounds(args, ratio, loaded, sums, samples, result)
    selection, fits = steps.prune_at(args, ratio, loaded, sums, samples, result)
    _measure(args, loaded, ids)
    if args.save_model:
        with tempfile.TemporaryDirectory(prefix="afr-st-dry-run-", ignore_cleanup_errors=True) as folder:
            args.report = False  # of perplexities and speeds, which were not measured
            steps.write(args, Path(folder), loaded, selection, fits, samples, result)


def _score(args: argparse.Namespace, loaded: Loaded, samples: Sequence[Tensor]) -> dict[str, ModelVector]:
    """What scoring accumulates; made up where a file of scores may spare the run its scoring."""
    method, sums = prune.METHODS[args.prune_method], InMemory()
    if args.scores and Path(args.scores).exists():
        sums.put({name: torch.ones(shape) for name, shape in prune.sum_shapes(loaded.layers, method).items()})
        sums.is_complete = True
    with HiddenStates() as hidden:
        return prune.score(
            loaded.model,
            loaded.layers,
            tape.collate(samples, args.batch_size),
            method,
            args.neuron_score,
            sums,
            loaded.placement,
            hidden,
            args.seed,
            alone=True,
        )


def _measure(args: argparse.Namespace, loaded: Loaded, ids: Tensor) -> None:
    if args.eval_ppl:
        evaluate.perplexity(loaded.model, ids[None])
    if args.eval_speed:
        evaluate.speed(loaded.model, ids, context_length(loaded.model.config), decode_tokens=3, repeats=1)


def _is_want_of_room(error: BaseException) -> bool:
    """Whether memory or disk did not suffice: the run itself may have more, or says so itself."""
    if is_out_of_memory(error):
        return True
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno is not None:
            return True
        if isinstance(error, (OSError, SafetensorError, RuntimeError)) and any(words in text for words in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def _works_unpruned(cut: Loaded) -> bool:
    """Whether the cut model, dense, can be run, saved and loaded by transformers alone; a whole one need not."""
    if isinstance(cut.source, _Whole):
        return True
    try:
        model = cut.source.model()
        model.generation_config = GenerationConfig()
        ids = torch.arange(2)[None]
        wanted = model(input_ids=ids, use_cache=False).logits
        with tempfile.TemporaryDirectory(prefix="afr-st-dry-run-", ignore_cleanup_errors=True) as folder:
            model.save_pretrained(folder)
            found = type(model).from_pretrained(folder).eval()
        return torch.allclose(found(input_ids=ids, use_cache=False).logits, wanted, rtol=0.1, atol=0.1)
    except Exception:
        return False


# --- the cut model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """Where a cut model comes from, in place of a `lib.builder.Source`: its configuration and its weights."""

    model_class: type
    config: object
    weights: dict[str, Tensor]
    generation_config: GenerationConfig | None
    own_dtype: torch.dtype

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense cut model, with copies of the weights, in `dtype` or in the checkpoint's own."""
        weights = {name: weight.to(device="cpu", copy=True) for name, weight in self.weights.items()}
        generation_config = copy.deepcopy(self.generation_config)
        return rebuild(
            self.model_class, copy.deepcopy(self.config), weights, generation_config, dtype or self.own_dtype
        )


class _Whole(_Cut):
    """The same where nothing was cut off."""


def _cut(loaded: Loaded) -> Loaded | None:
    """The model's first layers as a model of their own, to be scored on the CPU; None where that cannot be built."""
    model, dtype = loaded.model, loaded.resources.dtype
    total = len(loaded.layers)
    enough = _enough_layers(loaded.layers, model.config)
    choices = ((enough, VOCABULARY, LARGEST), (enough, None, LARGEST), (total, None, LARGEST / 4))
    for count, vocabulary, limit in choices:
        try:
            config = _shortened(model.config, total, count, vocabulary)
            empty = skeleton(type(model), type(config).from_dict(config.to_dict()))
            weights = _weights_of(empty, loaded)
            if weights is None or _bytes(weights, dtype) > min(limit, available_bytes() / 4):
                continue
            kind = _Whole if count == total and vocabulary is None else _Cut
            source = kind(type(model), config, weights, model.generation_config, loaded.own_dtype)
            return _ready(loaded, source)
        except Exception:  # an odd family: its own code does not take such a configuration
            continue
    return None


def _ready(loaded: Loaded, source: _Cut) -> Loaded:
    """The cut model in the place of the whole one; it is run once, as transformers does."""
    resources = Resources(torch.device("cpu"), loaded.resources.dtype, "none")
    model = source.model(resources.dtype)
    layers = [
        replace(found, block=None) if held.block is None else found
        for found, held in zip(find_layers(model), loaded.layers)
    ]
    with torch.no_grad():
        model(input_ids=torch.arange(2)[None], use_cache=False)
    placement = resources.place(model, layers)
    return replace(loaded, source=source, model=model, layers=layers, resources=resources, placement=placement)


def _enough_layers(layers: Sequence[Layer], config) -> int:
    """How many layers from the first on show every kind, at least two."""
    text = config.get_text_config()
    lists = [held for held in vars(text).values() if isinstance(held, (list, tuple)) and len(held) == len(layers)]
    kinds = []
    for index, layer in enumerate(layers):
        modules = tuple((name, type(module)) for name, module in layer.module.named_modules())
        shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.module.named_parameters())
        kinds.append((modules, shapes, tuple(str(held[index]) for held in lists)))
    return max(max(kinds.index(kind) for kind in kinds) + 1, min(2, len(layers)))


def _shortened(config, n_layers: int, count: int, vocabulary: int | None):
    """The configuration of the first `count` of `n_layers` layers, with the first tokens of the vocabulary."""
    config = copy.deepcopy(config)
    part = config.get_text_config()
    for name, held in list(vars(part).items()):
        if isinstance(held, (list, tuple)) and len(held) == n_layers and n_layers > 1:
            setattr(part, name, held[:count])
        elif type(held) is int and held == n_layers and name.endswith(("layer", "layers")):
            setattr(part, name, count)
        elif vocabulary and type(held) is int and "vocab_size" in name:
            setattr(part, name, min(held, vocabulary))
        elif vocabulary and name.endswith("token_id") and isinstance(held, (int, list)):
            ids = [min(token, vocabulary - 1) for token in (held if isinstance(held, list) else [held])]
            setattr(part, name, ids if isinstance(held, list) else ids[0])
    if "_heterogeneity_spec" in vars(part):
        spec = part._heterogeneity_spec
        for index in [index for index in spec.per_layer_overrides if index >= count]:
            del spec.per_layer_overrides[index]
    return config


def _weights_of(empty: nn.Module, loaded: Loaded) -> dict[str, Tensor] | None:
    """The whole model's tensors for every name of the cut one, embeddings as far as it has them; None for a layer that
    is another one than the whole model's of the same name."""
    whole, found = loaded.model.state_dict(), {}
    stacks = tuple(f"{stack}." for stack in {layer.stack for layer in loaded.layers})
    for name, wanted in empty.state_dict().items():
        held = whole.get(name)
        if held is None or held.ndim != wanted.ndim or any(a < b for a, b in zip(held.shape, wanted.shape)):
            return None
        if name.startswith(stacks) and held.shape != wanted.shape:
            return None
        found[name] = held[tuple(slice(0, size) for size in wanted.shape)]
    return found


def _bytes(weights: dict[str, Tensor], dtype: torch.dtype) -> int:
    return sum(weight.numel() for weight in weights.values()) * dtype.itemsize
