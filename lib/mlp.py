"""The MLP blocks of a model: find them, name their projections, slice them.

Nothing outside this file knows how a model family calls or stores its MLP weights. Everywhere else a
projection is a matrix in neuron-major orientation `[d_ff, d]`: row j is what neuron j owns of it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
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


# What families call d_ff in their configuration.
WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner")


@dataclass(frozen=True)
class Layer:
    """One layer of the stack; `block` is None where a hybrid model has no MLP."""

    name: str
    module: nn.Module
    block: Block | None


def find_layers(model: nn.Module) -> list[Layer]:
    """The decoder layers of a language model, in order, each with its MLP.

    Raises UserError for mixtures of experts, encoder-decoders, several stacks, quantised weights and
    layouts that are not in `LAYOUTS`; the line names the family and what would work.
    """
    family = getattr(model.config, "model_type", type(model).__name__)
    _refuse_experts(model, family)
    blocks = list(_find_blocks(model))
    stacks = {_stack_of(name, model) for name, _, _ in blocks}
    if None in stacks or len(stacks) != 1:
        found = "no MLP was recognised" if not blocks else f"its MLPs stand in {len(stacks)} stacks of layers"
        raise UserError(f"--model: cannot prune the family '{family}': {found}; {_supported()}")
    stack = stacks.pop()
    by_layer = {index: list(group) for index, group in groupby(blocks, key=lambda b: _index_in(stack, b[0]))}
    for index, found in by_layer.items():
        if len(found) > 1:
            raise UserError(
                f"--model: cannot prune the family '{family}': layer {index} has {len(found)} MLPs; {_supported()}"
            )
    layers = []
    for index, module in enumerate(model.get_submodule(stack)):
        block = Block(*by_layer[index][0]) if index in by_layer else None
        if block:
            _check(block, family)
        layers.append(Layer(f"{stack}.{index}", module, block))
    return layers


def width_field(model: nn.Module, layers: list[Layer]) -> str | None:
    """The field of `model.config` that sets the width of every MLP, found by building the model (without memory).

    None when the family's code fixes the width or the layers differ in it.
    """
    widths = {layer.block.width for layer in layers if layer.block}
    probe = max(widths) - 1
    for field in WIDTH_FIELDS:
        if not hasattr(model.config, field):
            continue
        config = copy.deepcopy(model.config)
        setattr(config, field, probe)
        with torch.device("meta"):
            rebuilt = find_layers(type(model)(config))
        if {layer.block.width for layer in rebuilt if layer.block} == {probe}:
            return field
    return None


def describe_widths(config, layers: Sequence[Layer], widths: Sequence[int]) -> None:
    """Write the widths of the MLPs into the configuration, and what `lib/modeling_pruned.py` must know to follow it."""
    stack, _, _ = layers[0].name.rpartition(".")
    with_mlp = [index for index, layer in enumerate(layers) if layer.block]
    layer, block = layers[with_mlp[0]], layers[with_mlp[0]].block
    field = next((field for field in WIDTH_FIELDS if hasattr(config, field)), WIDTH_FIELDS[0])
    config.pruned_mlp = {
        "field": field,
        "layers": stack,
        "mlp": block.name.removeprefix(layer.name).lstrip("."),
        "inputs": list(block.layout.inputs),
        "output": block.layout.output,
        "parts": block.layout.parts,
    }
    config.per_layer_config = {index: {field: width} for index, width in zip(with_mlp, widths, strict=True)}


def forget_widths(model: nn.Module) -> nn.Module:
    """Undo what loading by `describe_widths` does: the family's own class again, its MLPs as wide as they are."""
    config = model.config
    for name in ("pruned_mlp", "auto_map", "allow_global_per_layer_attribute_access"):
        config.__dict__.pop(name, None)
    config.per_layer_config = None
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


def _check(block: Block, family: str) -> None:
    """Refuse what looks like a known layout but is not one: quantised weights, norms over the neurons."""
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
