"""A model's configuration is looked at before anything is believed of it: what it says ends in a model or a line."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lib.errors import UserError, is_out_of_memory, reason

# Fields whose value is a number of things to build, and more of them than any model has.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "num_encoder_layers")
TOO_MANY = dict.fromkeys(DEPTHS, 2000) | {"num_labels": 10**6}


def check_raw(name: str, raw: dict) -> None:
    """Raise UserError for what classes of configurations already stumble over: numbers that they loop up to, and names
    of architectures that are none."""
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(entry, str) for entry in architectures):
        raise UserError(f"--model {name}: its config.json says architectures {architectures}; fetch it again")
    for field, value in raw.items():
        if isinstance(value, dict):
            check_raw(name, value)
        elif field in TOO_MANY and isinstance(value, int | float) and value >= TOO_MANY[field]:
            raise UserError(f"--model {name}: its config.json says {field} {value}, more than any model has")


def refuse_short_context(name: str, text_config, fields: Sequence[str]) -> None:
    """Raise UserError unless the first of `fields` that the configuration has leaves room for a next token."""
    for field in fields:
        value = getattr(text_config, field, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise UserError(
                f"--model {name}: its config.json says {field} {value}; a whole number of at least 2 is needed, "
                "since the model is scored on what it makes of the next token"
            )
        return


@contextmanager
def building(name: str) -> Iterator[None]:
    """Within this context a configuration that describes no model is a UserError, and nothing is warned of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"--model {name}: its config.json describes no model that transformers can build ({reason(error)}); "
            "fetch it again"
        ) from error
