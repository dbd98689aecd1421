"""Property: random precision per prompt equals answering every prompt alone at the precision it drew."""

import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.nn.draw import draw
from polybit.nn.switch import at, current, keep_rows, random_precision, use
from tests.families import FAMILIES, quantized

CHOICES = ("w8", "w4a8", "w3", "w2")
DENSE = [family for family in FAMILIES if "mix" not in family and "moe" not in family]


def prompts(rows=6, tokens=7):
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(3))


def drawn(rows, seed):
    return [CHOICES[n] for n in draw(len(CHOICES), rows, torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("family", DENSE)
def test_a_batch_is_split_by_prompt(family):
    model = quantized(family, include_embeddings=family.endswith("tied"))
    ids = prompts()
    with torch.no_grad(), random_precision(model, CHOICES, seed=1, per="prompt"):
        together = model(ids, use_cache=False).logits
    assert len(set(drawn(6, 1))) > 1
    for row, choice in enumerate(drawn(6, 1)):
        with torch.no_grad(), at(model, choice):
            alone = model(ids[row : row + 1], use_cache=False).logits
        assert torch.allclose(together[row], alone[0], atol=1e-5), (row, choice)


def test_a_prompt_keeps_its_draw_while_it_is_answered():
    model = quantized("llama")
    ids = prompts()
    with random_precision(model, CHOICES, seed=4, per="prompt"):
        together = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    for row, choice in enumerate(drawn(6, 4)):
        with at(model, choice):
            alone = model.generate(
                ids[row : row + 1], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert torch.equal(together[row], alone[0]), (row, choice)


def test_beams_of_a_prompt_share_its_draw():
    model = quantized("llama")
    ids = prompts(3)
    with random_precision(model, CHOICES, seed=5, per="prompt"):
        together = model.generate(
            ids, max_new_tokens=5, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    # three equal rows take three draws of the generator, the first of which counts
    for row, choice in enumerate(drawn(9, 5)[::3]):
        with at(model, choice):
            alone = model.generate(
                ids[row : row + 1], max_new_tokens=5, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert torch.equal(together[row], alone[0])


def test_the_seed_decides_and_the_model_comes_back():
    model = use(quantized("gpt2"), "w6")
    ids = prompts()
    seen = []
    for seed in (1, 1, 2):
        with torch.no_grad(), random_precision(model, CHOICES, seed=seed, per="prompt"):
            seen.append(model(ids).logits)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert str(current(model).default) == "w6"
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_rows_that_leave_are_told():
    model = quantized("llama")
    ids = prompts()
    with torch.no_grad(), random_precision(model, CHOICES, seed=1, per="prompt"):
        cache = model(ids, use_cache=True).past_key_values
        keep = torch.tensor([1, 4])
        cache.batch_select_indices(keep)
        with pytest.raises(PolybitError, match="keep_rows"):
            model(ids[keep, -1:], past_key_values=cache, use_cache=True)
        keep_rows(model, keep.tolist())
        model(ids[keep, -1:], past_key_values=cache, use_cache=True)


def test_refusals():
    with (
        pytest.raises(PolybitError, match="mixes the tokens"),
        random_precision(quantized("mixtral"), CHOICES, seed=0, per="prompt"),
    ):
        pass
    model = quantized("llama")
    with (
        pytest.raises(PolybitError, match="differ in q, k or v"),
        random_precision(model, ("w8", "w8k8"), seed=0, per="prompt"),
    ):
        pass
    with pytest.raises(PolybitError, match="'pass' or 'prompt'"), random_precision(model, CHOICES, seed=0, per="token"):
        pass
