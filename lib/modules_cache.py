"""Code that a saved folder brings is copied by transformers before it is run: where to, while a result is verified."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import dynamic_module_utils


@contextmanager
def temporary_modules_cache() -> Iterator[None]:
    """Within this context the copies go to a temporary folder, not to HF_MODULES_CACHE, which may not be writable.

    Nor do the copies of a folder that is about to be renamed stay there for ever.
    """
    own = dynamic_module_utils.HF_MODULES_CACHE
    with tempfile.TemporaryDirectory(prefix="afr-st-") as folder:
        dynamic_module_utils.HF_MODULES_CACHE = folder
        try:
            yield
        finally:
            dynamic_module_utils.HF_MODULES_CACHE = own
            sys.path[:] = [place for place in sys.path if place != folder]  # transformers put it there
