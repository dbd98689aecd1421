"""`polybit quantize --rotate` and what follows it: the same float model, and training in the basis of the codes."""

import json

import pytest
import torch

from polybit.acts.quantize import recipe_for
from polybit.cli import main
from polybit.core.planes import unpack
from polybit.core.runtime import PolybitError
from polybit.hub.checkpoint import describe
from polybit.hub.load import load
from polybit.nn import switch
from polybit.nn.rotation import Rotation, rotate, rotation_of
from polybit.options.quantize import QuantizeOptions

FAST = ["--samples", "8", "--window", "32", "--calibration", "embedded", "--effort", "fast", "--group-size", "16"]


@pytest.fixture(scope="module")
def gained_llama(tiny_llama, tmp_path_factory):
    """The tiny model with norms that are not ones, and large channels in its stream."""
    model, tokenizer = load(tiny_llama)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        model.model.embed_tokens.weight[:, (5, 31)] *= 12
    path = tmp_path_factory.mktemp("gained") / "llama"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def quantize(model, out, *more):
    main(["quantize", str(model), "--out", str(out), *FAST, "--json", f"{out}.json", *more])
    return json.loads(out.with_name(out.name + ".json").read_text())["numbers"]


@pytest.fixture(scope="module")
def rotated(gained_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("rotated") / "out"
    return out, quantize(gained_llama, out, "--bits", "8", "--method", "gptq", "--rotate", "--seed", "3")


def test_a_rotated_file_answers_like_the_float_model(rotated, gained_llama, tmp_path, capsys):
    out, numbers = rotated
    model, _ = load(out)
    float_model, _ = load(gained_llama)
    assert numbers["measured"]["presets"]["w8"]["kl"]["value"] < 0.01
    assert rotation_of(model) == Rotation(3)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["notes"]["rotation"] == {"kind": "hadamard", "seed": 3}
    assert config["model_type"] == "llama" and config["tie_word_embeddings"] is False
    head = model.lm_head.weight
    assert numbers["rotation"]["untied_head_bytes"] == head.numel() * 4
    assert "no longer tied" in (out / "README.md").read_text()
    assert bool((model.model.norm.weight == 1).all())
    rotate(float_model, Rotation(3))
    assert torch.equal(float_model.model.embed_tokens.weight, model.model.embed_tokens.weight)
    main(["generate", str(out), "--prompt", "Hello", "--precision", "w8", "--max-tokens", "4"])
    text = tmp_path / "text.txt"
    text.write_text((out / "README.md").read_text() * 3)
    main(["eval", str(out), "--reference", str(gained_llama), "--text", str(text), "--json", str(tmp_path / "e.json")])
    assert json.loads((tmp_path / "e.json").read_text())["numbers"]["presets"]["w8"]["kl"]["value"] < 0.01
    assert capsys.readouterr().out


def kl_at(checkpoint, reference, precision):
    ids = torch.randint(5, 90, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = torch.log_softmax(load(reference)[0](ids).logits, -1)
        given = torch.log_softmax(switch.use(load(checkpoint)[0], precision)(ids).logits, -1)
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


def test_narrow_activations_lose_less(rotated, gained_llama, tmp_path):
    quantize(gained_llama, tmp_path / "plain", "--bits", "8", "--method", "gptq", "--no-measure")
    plain, turned = (kl_at(path, gained_llama, "w8a4") for path in (tmp_path / "plain", rotated[0]))
    assert turned < 0.7 * plain, (turned, plain)


def test_training_starts_at_the_file_and_follows_the_original(rotated, gained_llama, tmp_path):
    out = tmp_path / "out"
    flags = ["--presets", "A=w8", "--steps", "2", "--rows", "24", "--batch", "4", "--length", "96", "--labels", "0"]
    for norms in ([], ["--norms"]):
        main(["train", str(rotated[0]), "--out", str(out), *flags, "--json", f"{out}.json", "--overwrite", *norms])
        numbers = json.loads((tmp_path / "out.json").read_text())["numbers"]
        assert numbers["presets"]["A"]["start"]["kl"] < 0.01  # float weights of another basis would be nats away
        model, _ = load(out)
        assert rotation_of(model) == Rotation(3) and kl_at(out, gained_llama, "w8") < 0.01
    main(["train", str(out), "--out", str(tmp_path / "again"), *flags, "--probes", "0", "--learning-rate", "1e-12"])
    first, again = (load(path)[0] for path in (out, tmp_path / "again"))
    before, after = (switch.panel(model).layers for model in (first, again))
    assert all(torch.equal(unpack(before[n].planes).codes_OI, unpack(after[n].planes).codes_OI) for n in before)


def test_aligning_starts_at_the_file_and_follows_the_original(gained_llama, tmp_path):
    source, pairs, out = tmp_path / "source", tmp_path / "pairs", tmp_path / "out"
    quantize(gained_llama, source, "--widths", "8,3", "--rotate", "--no-measure")
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"Tell me about number {n}.\n" for n in range(16)))
    main(["pairs", str(source), "--prompts", str(prompts), "--precision", "w3", "--out", str(pairs),
          "--max-tokens", "8"])  # fmt: skip
    main(["align", str(source), "--pairs", str(pairs), "--precision", "w3", "--out", str(out), "--steps", "4",
          "--batch", "4", "--probes", "2", "--json", f"{out}.json"])  # fmt: skip
    model, _ = load(out)
    assert rotation_of(model) == Rotation(0) and describe(model).notes == {"rotation": Rotation(0).to_json()}
    numbers = json.loads((tmp_path / "out.json").read_text())["numbers"]
    assert numbers["presets"]["w8"]["before"]["kl"] < 0.01
    assert kl_at(out, gained_llama, "w8") < 0.02


def test_what_cannot_be_meant_is_one_sentence(tmp_path, capsys, tiny_llama):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300)).save_pretrained(tmp_path / "gpt2")
    load(tiny_llama)[1].save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SystemExit):
        quantize(tmp_path / "gpt2", tmp_path / "out", "--rotate")
    assert "GPT2LMHeadModel cannot be rotated: only Llama, Mistral, Qwen2, Qwen3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    plan = {
        "default": "w4",
        "layers": {},
        "columns": {"model.layers.0.mlp.up_proj": {"block": 16, "offsets": [1, 0, -1]}},
    }
    (tmp_path / "plan.json").write_text(json.dumps({"plan": plan}))
    with pytest.raises(PolybitError, match="--rotate mixes the columns"):
        recipe_for(QuantizeOptions(out=tmp_path / "out", plan=tmp_path / "plan.json", rotate=True))


def test_an_edited_note_is_refused(rotated, tmp_path):
    from polybit.hub.checkpoint import Description

    value = json.loads((rotated[0] / "config.json").read_text())["quantization_config"]
    Description.from_json(value)
    value["notes"]["rotation"]["kind"] = "learned"
    with pytest.raises(PolybitError, match="upgrade"):
        Description.from_json(value)
