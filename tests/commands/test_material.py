"""What `polybit eval` asks: prompts from any source that `polybit pairs` takes, no more than asked for."""

from polybit.acts.evaluate_material import choose_prompts
from polybit.hub.load import load_float
from polybit.hub.tiny import path


def test_prompts_of_a_named_set_and_of_a_file(tmp_path):
    _, tokenizer = load_float(str(path()))
    found = choose_prompts(tokenizer, None, {}, source="embedded-test", count=5, max_tokens=8, context=256)
    assert len(found) == 5 and all(prompt[-1]["role"] == "user" for prompt in found)
    (tmp_path / "p.txt").write_text("One?\nTwo?\nThree?\n")
    found = choose_prompts(tokenizer, None, {}, source=str(tmp_path / "p.txt"), count=2, max_tokens=8, context=256)
    assert [prompt[-1]["content"] for prompt in found] == ["One?", "Two?"]
