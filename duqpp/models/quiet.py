"""Other libraries' progress bars and advice, kept off the screen."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the bars and the advice of transformers and lm-eval: duqpp shows progress of its own.

    The hub's bars of downloads stay where stderr is a terminal. Afterwards all is as it was.
    """
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    lm_eval = logging.getLogger("lm_eval")
    level, verbosity = lm_eval.level, transformers_logging.get_verbosity()
    bars, hub_bars = (
        transformers_logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    lm_eval.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _show_hub_bars(sys.stderr.isatty())
    try:
        yield
    finally:
        lm_eval.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        _show_hub_bars(hub_bars)


def _show_hub_bars(shown: bool) -> None:
    """Unless the environment decides, which has the last word: the hub warns of who disagrees."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        (enable_progress_bars if shown else disable_progress_bars)()
