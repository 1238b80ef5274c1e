"""Other libraries are quiet while duqpp works, and as they were afterwards."""

import importlib
import io
import logging
import warnings

import huggingface_hub
import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging

from duqpp.models import quiet
from duqpp.models.quiet import quiet_libraries

hub_tqdm = importlib.import_module("huggingface_hub.utils.tqdm")  # hidden by a class of its name


def state() -> tuple:
    return (
        are_progress_bars_disabled(),
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
        logging.getLogger("lm_eval").level,
    )


@pytest.mark.parametrize(
    ("is_terminal", "variable", "shown"),
    [(True, None, True), (False, None, False), (True, True, False), (True, False, True)],
)
def test_bars_of_downloads_are_for_terminals(is_terminal, variable, shown, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    enable_progress_bars()
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True):
        patch.setattr(quiet.sys, "stderr", stream)
        for module in (hub_tqdm, huggingface_hub.constants):
            patch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", variable)
        before = state()
        with quiet_libraries():
            assert state() == (not shown, False, transformers_logging.ERROR, logging.ERROR)
        assert state() == before


def test_what_was_quiet_stays_so(monkeypatch):
    with quiet_libraries():
        before = state()
        with quiet_libraries():
            assert state() == before
        assert state() == before
