"""The good files that cases are made from: written once, by the verbs themselves, from a random Llama of 2 layers."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.readers import Room


def furnish(path: Path) -> Room:
    """Write them below `path`, where they are not there yet."""
    if (path / "done").is_file():
        return Room(path)
    from transformers import AutoTokenizer

    from polybit.cli import main
    from polybit.hub import tiny
    from polybit.hub.load import load_float
    from polybit.hub.workspace import model_digest
    from tests.export.checkpoints import checkpoint, float_llama

    path.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = float_llama(**sizes, num_key_value_heads=1)
    model.save_pretrained(path / "float")
    AutoTokenizer.from_pretrained(tiny.path()).save_pretrained(path / "float")
    checkpoint(path / "checkpoint", model=model)
    text = ["--text", "embedded-test", "--windows", "2", "--window", "32", "--answers", "3", "--max-tokens", "6"]
    main(
        [
            "quantize",
            str(path / "float"),
            "--out",
            str(path / "made"),
            "--method",
            "rtn",
            "--bits",
            "4",
            "--samples",
            "4",
            "--window",
            "32",
            "--calibration",
            "embedded",
            "--no-measure",
            "--overwrite",
        ]
    )
    (path / "run.json").write_bytes((path / "made" / "run.json").read_bytes())
    main(
        [
            "eval",
            str(path / "checkpoint"),
            "--reference",
            str(path / "float"),
            "--precision",
            "w8,w4",
            *text,
            "--tasks",
            "arithmetic",
            "--items",
            "2",
            "--json",
            str(path / "eval.json"),
        ]
    )
    (path / "prompts.txt").write_text("How are you?\nWhat is 3 plus 4?\nTell me a story.\nWho are you?\n")
    main(
        [
            "pairs",
            str(path / "float"),
            "--prompts",
            str(path / "prompts.txt"),
            "--precision",
            "w2",
            "--max-tokens",
            "6",
            "--out",
            str(path / "pairs"),
            "--overwrite",
        ]
    )
    (path / "pairs.reference").write_text(model_digest(load_float(path / "float")[0]))
    main(
        [
            "export",
            str(path / "checkpoint"),
            "--to",
            "gguf",
            "--precision",
            "w4",
            "--windows",
            "0",
            "--overwrite",
            "--out",
            str(path / "gguf"),
        ]
    )
    (path / "done").touch()
    return Room(path)
