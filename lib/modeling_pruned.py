"""Models whose MLP widths differ by layer. Saved beside the weights of such a model, and loaded with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`PrunedX` is the class `X` of transformers with every MLP as wide as `config.per_layer_config` says (or, where the
family has its own use for that, `config.pruned_mlp["widths"]`); `config.pruned_mlp` names the projections:
`{"field", "layers", "mlp", "inputs", "output", "parts"}`.
This file needs nothing but transformers.
"""

import functools

import transformers
from torch import nn

_PREFIX = "Pruned"


def __getattr__(name: str) -> type:
    """`PrunedX` for any model class X of transformers."""
    base = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned(base)


@functools.cache
def pruned(base: type) -> type:
    """The subclass of `base`, a pretrained model class, that follows its configuration's widths per layer."""

    def __init__(self, config, *args, **kwargs):
        # The family's code reads one width for all layers; whatever it builds gets its true width below.
        for part in _parts(config):
            part.allow_global_per_layer_attribute_access = True
        base.__init__(self, config, *args, **kwargs)
        fit_widths(self)

    def save_pretrained(self, *args, **kwargs):
        # Not part of what is saved: without this file, reading one width for all layers must stay an error.
        allowed = [c for c in _parts(self.config) if c.__dict__.pop("allow_global_per_layer_attribute_access", None)]
        try:
            base.save_pretrained(self, *args, **kwargs)
        finally:
            for config in allowed:
                config.allow_global_per_layer_attribute_access = True

    def is_custom_code(cls):
        # The family's code is transformers' own: its buffers are initialised as those of the family are.
        return base.is_custom_code()

    body = {"__init__": __init__, "save_pretrained": save_pretrained, "is_custom_code": classmethod(is_custom_code)}
    body |= {"__module__": __name__, "__doc__": base.__doc__}
    return type(_PREFIX + base.__name__, (base,), body)


def fit_widths(model: nn.Module) -> None:
    """Give every MLP projection of a freshly built model its width; their weights become uninitialised."""
    for config in _parts(model.config):
        layout = getattr(config, "pruned_mlp", None)
        for index, layer in enumerate(model.get_submodule(layout["layers"]) if layout else []):
            mlp = layer.get_submodule(layout["mlp"])
            if "widths" in layout:
                width = layout["widths"][str(index)]
            else:
                width = getattr(config.per_layer_config[index], layout["field"])
            for name in layout["inputs"]:
                _resize(getattr(mlp, name), outputs=width * layout["parts"])
            _resize(getattr(mlp, layout["output"]), inputs=width)
            if hasattr(mlp, layout["field"]):
                setattr(mlp, layout["field"], width)


def _parts(config) -> list:
    """A configuration and those nested in it (text and vision)."""
    return [config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None)]


def _resize(module: nn.Module, inputs: int | None = None, outputs: int | None = None) -> None:
    in_first = hasattr(module, "nf")  # transformers' Conv1D stores [in, out], nn.Linear [out, in]
    sizes = list(module.weight.shape if in_first else module.weight.shape[::-1])  # [in, out]
    for place, size, name in (
        (0, inputs, "nx" if in_first else "in_features"),
        (1, outputs, "nf" if in_first else "out_features"),
    ):
        if size is not None:
            sizes[place] = size
            setattr(module, name, size)
    module.weight = nn.Parameter(module.weight.new_empty(sizes if in_first else sizes[::-1]))
    if outputs is not None and module.bias is not None:
        module.bias = nn.Parameter(module.bias.new_empty(outputs))
