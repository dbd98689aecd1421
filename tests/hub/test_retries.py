"""A name that is no model ends in one sentence, whatever the hub's client has to say on the way there."""

import pytest
from huggingface_hub.utils import logging
from transformers import AutoConfig

from polybit.core.runtime import PolybitError
from polybit.hub.load import load_config


def test_tries_of_the_hub_client_are_not_told(monkeypatch, caplog):
    client = logging.get_logger("huggingface_hub.utils._http")
    monkeypatch.setattr(logging.get_logger("huggingface_hub"), "propagate", True)

    def unreachable(name, **_):
        client.warning("Retrying in 8s")
        client.error("gone for good")
        raise OSError("not there")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    before = logging.get_verbosity()
    with pytest.raises(PolybitError, match="configuration of nowhere cannot be used"):
        load_config("nowhere")
    assert [record.message for record in caplog.records] == ["gone for good"]
    assert logging.get_verbosity() == before
