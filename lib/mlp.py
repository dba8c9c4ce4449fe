"""The MLP blocks of a model: find them, name their projections, slice them.

Nothing outside this file knows how a model family calls or stores its MLP weights. Everywhere else a
projection is a matrix in neuron-major orientation `[d_ff, d]`: row j is what neuron j owns of it.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lib.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How a family of models names the projections of one MLP.

    inputs: children that map d -> d_ff;  output: the child that maps d_ff -> d;
    parts: matrices stacked in the rows of one input projection (2 for a fused `gate_up_proj`).
    """

    inputs: tuple[str, ...]
    output: str
    parts: int = 1

    def __str__(self) -> str:
        return "/".join((*self.inputs, self.output))


# A module that owns all the names of a layout is an MLP. The first match counts, so gated layouts
# stand before the ungated ones whose names they contain.
LAYOUTS = (
    Layout(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo, Cohere ...
    Layout(("gate_up_proj",), "down_proj", parts=2),  # Phi-3, GLM
    Layout(("w1", "w3"), "w2"),  # LFM2 and checkpoints in Meta's own naming
    Layout(("fc1",), "fc2"),  # OPT, Phi, XGLM, CLIP
    Layout(("up_proj",), "down_proj"),  # Nemotron, MPT, Arcee
    Layout(("c_fc",), "c_proj"),  # GPT-2, GPT-Neo, StarCoder2
    Layout(("fc_in",), "fc_out"),  # GPT-J, CodeGen
    Layout(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
)


@dataclass(frozen=True)
class Projection:
    """One weight matrix of an MLP, in neuron-major orientation whatever the module stores.

    A fused module holds several projections: `part` of `parts` counts the blocks of its rows.
    """

    name: str
    module: nn.Module
    is_output: bool
    part: int = 0
    parts: int = 1

    @property
    def neurons_first(self) -> bool:
        """Whether the stored weight already has neurons as rows. `Conv1D` stores `[in, out]`."""
        return isinstance(self.module, Conv1D) == self.is_output

    @property
    def weight(self) -> Tensor:
        """A view `[d_ff, d]` of the stored weight; writing to it changes the model."""
        stored = self.module.weight.data
        return (stored if self.neurons_first else stored.t()).chunk(self.parts)[self.part]

    def gradient(self, entered: Tensor, left_grad: Tensor) -> Tensor:
        """dL/dW `[d_ff, d]`, from the module's input `[tokens, in]` and dL/d(its output) `[tokens, out]`."""
        if self.is_output:
            return entered.t() @ left_grad
        return self.of_output(left_grad).t() @ entered

    def of_output(self, output: Tensor) -> Tensor:
        """This projection's share of the features (last dimension) of its module's output."""
        return output.chunk(self.parts, dim=-1)[self.part]


@dataclass(frozen=True)
class Block:
    """The MLP of one decoder layer. Neuron j is row j of every projection (`Projection.weight`)."""

    name: str
    owner: nn.Module
    layout: Layout

    @property
    def projections(self) -> list[Projection]:
        """The input projections (a fused one in parts), then the output projection."""
        inputs = [
            Projection(
                name if self.layout.parts == 1 else f"{name}.{part}",
                getattr(self.owner, name),
                False,
                part,
                self.layout.parts,
            )
            for name in self.layout.inputs
            for part in range(self.layout.parts)
        ]
        return [*inputs, Projection(self.layout.output, getattr(self.owner, self.layout.output), True)]

    @property
    def modules(self) -> list[nn.Module]:
        """The linear modules, each once, the output projection last."""
        return [getattr(self.owner, name) for name in (*self.layout.inputs, self.layout.output)]

    @property
    def width(self) -> int:
        """d_ff, the number of neurons."""
        return self.projections[-1].weight.shape[0]

    @property
    def n_weights(self) -> int:
        """Elements of the weight matrices; biases are not counted."""
        return sum(p.weight.numel() for p in self.projections)

    @torch.no_grad()
    def keep_neurons(self, kept: Tensor) -> None:
        """Remove every neuron that is not in `kept` (sorted indices `[n]`) from weights and biases."""
        width = self.width
        kept = kept.to(self.modules[0].weight.device)
        for module in self.modules[:-1]:
            rows = torch.cat([kept + part * width for part in range(self.layout.parts)])
            _take(module, rows, of_output=True)
        _take(self.modules[-1], kept, of_output=False)
        if hasattr(self.owner, "intermediate_size"):  # Llama's MLP keeps a copy of its width
            self.owner.intermediate_size = len(kept)


    @torch.no_grad()
    def silence_neurons(self, removed: Tensor) -> None:
        """Set the weights and biases of neurons (indices `[n]`) to 0: all shapes stay, and they do nothing."""
        width = self.width
        removed = removed.to(self.modules[0].weight.device)
        for projection in self.projections:
            projection.weight[removed] = 0
        for module in self.modules[:-1]:
            if module.bias is not None:
                for part in range(self.layout.parts):
                    module.bias[removed + part * width] = 0


# What families call d_ff in their configuration.
WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner")


LANGUAGE, VISION = "language", "vision"


@dataclass(frozen=True)
class Layer:
    """One layer of a tower; `block` is None where it has no MLP, or none that is to be pruned."""

    name: str
    module: nn.Module
    block: Block | None
    tower: str = LANGUAGE

    @property
    def stack(self) -> str:
        """The path of the list that the layer stands in."""
        return self.name.rpartition(".")[0]


def tower_config(config, tower: str):
    """The part of a model's configuration that describes one tower; all of it for a language model."""
    return config.vision_config if tower == VISION else config.get_text_config()


def of_tower(layers: Sequence["Layer"], tower: str) -> list["Layer"]:
    """The layers of one tower."""
    return [layer for layer in layers if layer.tower == tower]


def only_towers(layers: Sequence["Layer"], tower: str) -> list["Layer"]:
    """The same layers, the MLPs of other towers than `tower` left alone; "both" leaves none alone."""
    return [layer if tower in (layer.tower, "both") else replace(layer, block=None) for layer in layers]


def towers_of(layers: Sequence["Layer"]) -> list[str]:
    """The towers that the layers belong to, in the order in which data flows."""
    return list(dict.fromkeys(layer.tower for layer in layers))


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers of a language model, each with its MLP, in the order in which data flows.

    Of a model that also sees, the layers of the vision tower come first.

    Raises UserError for mixtures of experts, encoder-decoders, other stacks, keys and values that layers share,
    quantised weights and layouts that are not in `LAYOUTS`; the line names the family and what would work.
    """
    family = getattr(model.config, "model_type", type(model).__name__)
    _refuse_experts(model, family)
    _refuse_shared_keys(model, family)
    blocks = list(_find_blocks(model))
    stacks = list(dict.fromkeys(_stack_of(name, model) for name, _, _ in blocks))
    towers = {LANGUAGE: stacks[0]} if len(stacks) == 1 else _name_towers(model, stacks)
    if not stacks or None in stacks or towers is None:
        found = "no MLP was recognised" if not blocks else f"its MLPs stand in {len(stacks)} stacks of layers"
        raise UserError(f"--model: cannot prune the family '{family}': {found}; {_supported()}")
    layers = [layer for tower, stack in towers.items() for layer in _layers_of(model, family, blocks, tower, stack)]
    _refuse_shared_blocks(model, layers, family)
    return layers


def _name_towers(model: nn.Module, stacks: list[str]) -> dict[str, str] | None:
    """Which stack sees and which speaks, vision first; None unless the model has one of each."""
    if not hasattr(model.config, "vision_config") or len(stacks) != 2:
        return None
    spoken = [stack for stack in stacks if model.get_submodule(stack) in model.get_decoder().modules()]
    seen = [stack for stack in stacks if stack not in spoken]
    return {VISION: seen[0], LANGUAGE: spoken[0]} if len(seen) == len(spoken) == 1 else None


def _layers_of(model, family, blocks, tower, stack) -> Iterator[Layer]:
    within = [block for block in blocks if block[0].startswith(f"{stack}.")]
    by_layer = {index: list(group) for index, group in groupby(within, key=lambda b: _index_in(stack, b[0]))}
    for index, module in enumerate(model.get_submodule(stack)):
        found = by_layer.get(index, [])
        if len(found) > 1:
            raise UserError(
                f"--model: cannot prune the family '{family}': {stack}.{index} has {len(found)} MLPs; {_supported()}"
            )
        block = Block(*found[0]) if found else None
        if block:
            _check(block, family)
        yield Layer(f"{stack}.{index}", module, block, tower)


def width_field(model: nn.Module, layers: Sequence[Layer], tower: str = LANGUAGE) -> str | None:
    """The field of the tower's configuration that sets the width of its MLPs, found by building the model
    (without memory).

    None when the family's code fixes the width or the layers differ in it.
    """
    probe = max(layer.block.width for layer in of_tower(layers, tower) if layer.block) - 1
    for field in WIDTH_FIELDS:
        config = copy.deepcopy(model.config)
        part = tower_config(config, tower)
        if not hasattr(part, field):
            continue
        by_layer = isinstance(getattr(part, field), (list, tuple))
        setattr(part, field, [probe] * len(getattr(part, field)) if by_layer else probe)
        rebuilt = of_tower(find_layers(skeleton(type(model), config)), tower)
        if {layer.block.width for layer in rebuilt if layer.block} == {probe}:
            return field
    return None


def set_width(config, field: str, widths: Sequence[int]) -> None:
    """Write the widths of a tower's MLPs into `field` of its configuration, if it can say them: one for all layers,
    or a list (Gemma 3n)."""
    held = getattr(config, field)
    if isinstance(held, (list, tuple)) and len(held) == len(widths):
        setattr(config, field, list(widths))
    elif not isinstance(held, (list, tuple)) and len(set(widths)) == 1:
        setattr(config, field, widths[0])


def skeleton(model_class: type, config) -> nn.Module:
    """A model of this class and a copy of this configuration, without memory."""
    config = copy.deepcopy(config)
    for part in tower_configs(config):
        if isinstance(getattr(part, "dtype", None), str):  # as after a save; some families make tensors of this dtype
            part.dtype = getattr(torch, part.dtype)
    with torch.device("meta"):
        return model_class(config)


def describe_widths(config, layers: Sequence[Layer], widths: Sequence[int]) -> None:
    """Write the widths of the MLPs into the configuration, and what `lib/modeling_pruned.py` must know to follow it."""
    width_of = dict(zip((layer.name for layer in layers if layer.block), widths, strict=True))
    for tower in towers_of(layers):
        part, members = tower_config(config, tower), of_tower(layers, tower)
        layer = next((layer for layer in members if layer.block), None)
        if layer is None:
            continue
        field = next((field for field in WIDTH_FIELDS if hasattr(part, field)), WIDTH_FIELDS[0])
        layout = layer.block.layout
        part.pruned_mlp = {
            "field": field,
            "layers": layer.stack,
            "mlp": layer.block.name.removeprefix(layer.name).lstrip("."),
            "inputs": list(layout.inputs),
            "output": layout.output,
            "parts": layout.parts,
        }
        by_layer = {i: width_of[member.name] for i, member in enumerate(members) if member.block}
        if part.is_heterogeneous:
            # The family's own code reads such a configuration by type of layer (Gemma 4), in which widths differ.
            part.pruned_mlp["widths"] = {str(i): width for i, width in by_layer.items()}
        else:
            part.per_layer_config = {i: {field: width} for i, width in by_layer.items()}


def has_widths(fields: dict) -> bool:
    """Whether a raw configuration, or one nested in it, was written by `describe_widths`."""
    return any(isinstance(part, dict) and "pruned_mlp" in part for part in (fields, *fields.values()))


def tower_configs(config) -> list:
    """The configuration and every configuration nested in it."""
    return [config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None)]


def forget_widths(model: nn.Module) -> nn.Module:
    """Undo what loading by `describe_widths` does: the family's own class again, its MLPs as wide as they are."""
    for config in tower_configs(model.config):
        if "widths" not in config.__dict__.get("pruned_mlp", {}):
            config.per_layer_config = None
        for name in ("pruned_mlp", "auto_map", "allow_global_per_layer_attribute_access"):
            config.__dict__.pop(name, None)
    model.__class__ = type(model).__bases__[0]
    return model


def _find_blocks(model):
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for layout in LAYOUTS:
            if all(child in children for child in (*layout.inputs, layout.output)):
                yield name, module, layout
                break


def _stack_of(name: str, model: nn.Module) -> str | None:
    """The innermost list of layers that the module `name` stands in."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        parent = ".".join(path[:depth])
        if isinstance(model.get_submodule(parent), nn.ModuleList):
            return parent
    return None


def _index_in(stack: str, name: str) -> int:
    return int(name[len(stack) + 1 :].split(".")[0])


def _refuse_experts(model: nn.Module, family: str) -> None:
    for name, _ in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("experts", "router", "block_sparse_moe"):
            raise UserError(
                f"--model: cannot prune the family '{family}': it is a mixture of experts ({name}); {_supported()}"
            )


def _refuse_shared_keys(model: nn.Module, family: str) -> None:
    """Refuse layers that take keys and values from a layer before them (Gemma 3n, the small Gemma 4)."""
    sharing = [name for name, module in model.named_modules() if getattr(module, "is_kv_shared_layer", False)]
    if sharing:
        raise UserError(
            f"--model: cannot prune the family '{family}' with layers that share keys and values ({sharing[0]} and "
            f"{len(sharing) - 1} more): gradients reach an earlier layer past the ones between, and layers are scored "
            "one by one; a checkpoint with num_kv_shared_layers 0 works"
        )


def _refuse_shared_blocks(model: nn.Module, layers: Sequence[Layer], family: str) -> None:
    """Refuse an MLP that several layers use (Zamba): what one layer could lose another may need."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for block in (layer.block for layer in layers if layer.block):
        shared = [name for module in block.modules for name in names[id(module.weight)]]
        if len(shared) > len(block.modules):
            raise UserError(
                f"--model: cannot prune the family '{family}': several layers share one MLP ({', '.join(shared[:2])}), "
                f"and neurons are removed layer by layer; {_supported()}"
            )


def _check(block: Block, family: str) -> None:
    """Refuse what looks like a known layout but is not one: quantised weights, norms or statistics over the neurons."""
    if getattr(block.owner, "activation_sparsity", 0):  # Gemma 3n
        raise UserError(
            f"--model: cannot prune the family '{family}': {block.name} keeps its largest activations by mean and "
            "deviation over all neurons (activation_sparsity_pattern), which removing neurons would change"
        )
    for module in block.modules:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise UserError(
                f"--model: {block.name} holds quantised or unknown weights ({type(module).__name__}); "
                "load the unquantised checkpoint"
            )
    widths = {p.weight.shape[0] for p in block.projections}
    d_models = {p.weight.shape[1] for p in block.projections}
    projections = {id(module) for module in block.modules}
    between = [
        name
        for name, child in block.owner.named_children()
        if id(child) not in projections and any(p.shape == (block.width,) for p in child.parameters())
    ]
    if len(widths) > 1 or (between and block.width not in d_models):
        what = f"'{between[0]}' mixes its neurons" if between else f"its projections disagree on d_ff, {sorted(widths)}"
        raise UserError(f"--model: cannot prune the family '{family}': {block.name}: {what}; {_supported()}")


def _supported() -> str:
    return "layouts that work: " + ", ".join(map(str, LAYOUTS))


def _take(module: nn.Module, index: Tensor, of_output: bool) -> None:
    """Keep the given output or input features of a linear module (and the bias that goes with outputs)."""
    dim = int(of_output == isinstance(module, Conv1D))
    module.weight = nn.Parameter(module.weight.data.index_select(dim, index), module.weight.requires_grad)
    if of_output and module.bias is not None:
        module.bias = nn.Parameter(module.bias.data.index_select(0, index), module.bias.requires_grad)
    # nn.Linear and Conv1D each keep their sizes in attributes, which repr() and other libraries read.
    attribute = {(True, True): "nf", (True, False): "nx", (False, True): "out_features", (False, False): "in_features"}
    setattr(module, attribute[isinstance(module, Conv1D), of_output], len(index))
