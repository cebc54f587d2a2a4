"""transformers' progress bars: welcome in a terminal, noise in the log of a job."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging


@contextmanager
def bars_in_terminals_only() -> Iterator[None]:
    """Show no progress bars inside unless somebody watches; whether they are shown afterwards stays as it was."""
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def gguf_bar_as_the_others() -> Iterator[None]:
    """Let the bar of GGUF conversion, which transformers takes from tqdm itself, be switched off with its others."""
    module: Any = modeling_gguf_pytorch_utils
    own = getattr(module, "tqdm", None)
    if own is None:  # put right in a later version
        yield
        return
    module.tqdm = logging.tqdm
    try:
        yield
    finally:
        module.tqdm = own
