"""Build a model anew from a configuration and weights that may come from a file of anybody's making."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from lib import modeling_pruned
from lib.inert_pickle import RefusedPickleError
from lib.mlp import describe_widths, find_layers, skeleton
from lib.storage import unshare

# Attributes of a configuration by which transformers would load something else than what is at hand.
LOADING_MORE = ("auto_map", "transformers_weights", "fusion_config", "distributed_config", "adapter_config")
OF_THE_CLASS = ("sub_configs", "attribute_map", "base_model_tp_plan", "base_model_pp_plan", "extra_files")
ATTENTION = ("eager", "sdpa")  # of torch alone; any other name may be that of code on the Hub
LARGEST_BUFFERS = 2**31  # bytes that a configuration alone may ask for; tables of positions take far less
SPARE_PARAMETERS = 1000


def harmless(model_class: type, config: PreTrainedConfig) -> PreTrainedConfig:
    """The same configuration, without what would make transformers load code or weights from elsewhere.

    Raises RefusedPickleError for a class that is not the language model, or LLaVA, of this configuration, for quantised
    weights and for parts whose classes come from other packages.
    """
    wanted = LlavaForConditionalGeneration if type(config) is LlavaConfig else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class is not wanted:
        raise RefusedPickleError(f"holds a {model_class.__name__} that does not belong to its {type(config).__name__}")
    for part in _parts(config):
        for name in list(vars(part)):
            if name in LOADING_MORE or name in OF_THE_CLASS or callable(getattr(type(part), name, None)):
                del vars(part)[name]
        if vars(part).get("quantization_config"):
            raise RefusedPickleError("holds quantised weights; save the model unquantised")
        if any(kind.__name__.startswith("Timm") for kind in type(part).__mro__) or vars(part).get("backbone"):
            raise RefusedPickleError(f"holds a {type(part).__name__}, whose model would come from elsewhere")
        if vars(part).get("_attn_implementation_internal") not in ATTENTION:
            vars(part)["_attn_implementation_internal"] = None
        vars(part)["_experts_implementation_internal"] = None
    return config


def fitting(
    model_class: type, config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> tuple[type, PreTrainedConfig]:
    """The class and configuration whose model has exactly the shapes of `state`, its MLPs as wide as those say.

    Looks at shapes alone, and is built without memory, so that weights are read, and memory is taken, for what the
    file holds and nothing else. Raises RefusedPickleError when there is no such model.
    """
    empty = _bounded_skeleton(model_class, config, len(state))
    if any(name in state and tuple(state[name].shape) != p.shape for name, p in empty.named_parameters()):
        layers = find_layers(empty)
        outputs = {layer.block.name: layer.block.projections[-1] for layer in layers if layer.block}
        widths = [state[f"{name}.{p.name}.weight"].shape[0 if p.neurons_first else 1] for name, p in outputs.items()]
        config = copy.deepcopy(config)
        describe_widths(config, layers, widths)
        model_class = modeling_pruned.pruned(model_class)
        empty = _bounded_skeleton(model_class, config, len(state))
    _refuse_differences(empty, state)
    return model_class, config


def rebuild(
    model_class: type, config: PreTrainedConfig, state: Mapping[str, Tensor], generation_config, dtype
) -> nn.Module:
    """A model of this class and configuration with these weights, on the CPU, for inference.

    No two of its weights share memory but those that the configuration ties.
    """
    if dtype == "auto":
        dtype = next(weight.dtype for weight in state.values() if weight.is_floating_point())
    model = model_class.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype)
    if generation_config is not None:
        model.generation_config = generation_config
    return unshare(model).eval().requires_grad_(False)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _bounded_skeleton(model_class: type, config: PreTrainedConfig, n_weights: int) -> nn.Module:
    """The model without memory. Raises RefusedPickleError when it is much larger than the weights it is for."""
    with at_most_parameters(2 * n_weights + SPARE_PARAMETERS):
        empty = skeleton(model_class, config)
    if sum(buffer.nbytes for buffer in empty.buffers()) > LARGEST_BUFFERS:
        raise RefusedPickleError("has a configuration that asks for more memory than any model")
    return empty


def _refuse_differences(empty: nn.Module, state: Mapping[str, Tensor]) -> None:
    wanted = empty.state_dict()
    for name in (name for name, _ in empty.named_parameters() if name not in state):
        raise RefusedPickleError(f"is damaged, it has no {name}")
    for name, weight in state.items():
        if name not in wanted:
            raise RefusedPickleError(f"holds {name[:80]}, for which its configuration has no place")
        if tuple(weight.shape) != wanted[name].shape:
            raise RefusedPickleError(f"holds {name[:80]} in another shape than its configuration says")
        if weight.dtype.is_floating_point != wanted[name].dtype.is_floating_point:
            raise RefusedPickleError(f"holds {name[:80]} as {weight.dtype}; it may be quantised, save it unquantised")


@contextmanager
def at_most_parameters(count: int) -> Iterator[None]:
    """Within this context, building modules with more parameters ends in a RefusedPickleError."""
    left = count

    def take(module, name, parameter):
        nonlocal left
        left -= 1
        if left < 0:
            raise RefusedPickleError("has a configuration of many more layers than it has weights")

    handle = register_module_parameter_registration_hook(take)
    try:
        yield
    finally:
        handle.remove()
