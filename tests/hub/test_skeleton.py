"""Skeletons: the shapes of the real model without its weights."""

import pytest

from polybit.core.runtime import PolybitError
from polybit.hub.load import load_float
from polybit.hub.skeleton import load_skeleton
from polybit.hub.tiny import path
from polybit.nn.convert import left_in_float, targets


def test_skeleton_has_the_layers_of_the_model_and_no_memory():
    skeleton, (model, _) = load_skeleton(str(path())), load_float(path())
    assert targets(skeleton) == targets(model)
    assert left_in_float(skeleton, targets(skeleton)) == left_in_float(model, targets(model))
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_what_is_no_causal_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip", "architectures": ["CLIPModel"]}')
    with pytest.raises(PolybitError, match=r"causal|architecture"):
        load_skeleton(str(tmp_path))
