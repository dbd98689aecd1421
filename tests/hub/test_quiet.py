"""What other libraries tell on the way is not on the screen; what polybit tells is one sentence."""

import logging
import socket
import warnings

from huggingface_hub import constants

from polybit import cli
from polybit.hub import quiet


def test_transformers_words_nobody_can_act_on_are_not_shown(caplog):
    library = logging.getLogger("transformers")
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    library.addHandler(handler)
    try:
        with quiet.quiet():
            pass
        logger = logging.getLogger("transformers.trainer_utils")
        logger.warning("mtime may not be reliable on this filesystem, falling back to numerical ordering")
        logger.warning("`past_key_values`/`cache_params` are deprecated. Use `cache` instead.")
        logger.warning("the weights are broken")
    finally:
        library.removeHandler(handler)
    assert heard == ["the weights are broken"]


def test_a_hub_that_cannot_be_reached_is_not_asked(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert quiet.reachable(there)
    assert not quiet.reachable(there)
    monkeypatch.setattr(quiet, "getproxies", lambda: {"http": "http://proxy"})
    assert quiet.reachable(there), "behind a proxy nobody can say"
    monkeypatch.setattr(quiet, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", there)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with quiet.calling_hub("no/model"):
        assert constants.HF_HUB_OFFLINE
    with quiet.calling_hub(tmp_path):
        assert not constants.HF_HUB_OFFLINE, "a directory asks no hub"
    assert not constants.HF_HUB_OFFLINE


def test_a_warning_of_this_package_is_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", cli.one_line)
    said = warnings.formatwarning("slower without", RuntimeWarning, cli.__file__, 3)
    assert said == "polybit: slower without\n"
    assert "RuntimeWarning" in warnings.formatwarning("else", RuntimeWarning, "/other.py", 3)
