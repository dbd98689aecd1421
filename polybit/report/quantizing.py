"""What `quantize` made and what `plan` foretells, as the terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polybit.report.summary import terminal_table
from polybit.report.tables import aligned, number, percent, size


def made(out: str, model: str, numbers: Mapping[str, Any]) -> str:
    """What was made, what it costs, and what to type next."""
    lines = [terminal_table(numbers["measured"])] if "measured" in numbers else []
    lines.append(
        f"\n{out}: {len(numbers['layers'])} layers at {', '.join(numbers['presets'])}, "
        f"{numbers['stored_bits_per_weight']:.2f} stored bits per weight; {percent(numbers['float_share'])} of the "
        "model's weights stay in float. Saved, reloaded and compared: equal."
    )
    added = numbers.get("rotation", {}).get("untied_head_bytes", 0)
    if added:
        lines.append(
            "Rotated: the output head, which was the embedding, is a weight of its own now and adds "
            f"{size(added)} to the file, since the gains of the last norm are in it."
        )
    lines += few_experts(numbers.get("experts", {}))
    lines += [
        f'Next: polybit generate {out} --prompt "Hello" --precision {numbers["presets"][-1]}',
        f"      polybit eval {out} --reference {model} --json eval.json",
        f"      polybit report {out} --eval eval.json --out report.html",
    ]
    return "\n".join(lines)


def few_experts(found: Mapping[str, Any]) -> list[str]:
    """A sentence on the experts that calibration hardly reached."""
    few = found.get("few")
    if not few:
        return []
    total = sum(len(tokens) for tokens in found["tokens"].values())
    unseen = sum(not found["tokens"][name][expert] for name, scarce in few.items() for expert in scarce)
    first = next(iter(few))
    return [
        f"{sum(map(len, few.values()))} of {total} experts saw less than a tenth of an even share of the calibration "
        f"tokens ({unseen} none), first {', '.join(map(str, few[first][:8]))} of {first}: they were rounded by what "
        "all experts of their layer saw; more or other text (--samples, --calibration) would reach them."
    ]


def foretold(model: str, numbers: Mapping[str, Any]) -> str:
    """The plan of a quantization as a table and a few sentences."""
    total, quantized, recipe = numbers["parameters"], numbers["quantized"], numbers["recipe"]
    half = 2 * quantized
    rows = [
        [name, f"{row['bits_per_weight']:.3f}", size(row["bytes"]), f"{100 * row['bytes'] / max(half, 1):.0f} %"]
        for name, row in numbers["sizes"].items()
    ]
    lines = [
        f"{model}: {total:,} parameters; {numbers['layers']} layers with {percent(quantized / max(total, 1))} of them",
        f"method {recipe['method']}, group size {recipe['group_size'] or 'row'}, zero point: {recipe['zero']}\n",
        aligned(["width", "bits/weight", "bytes read", "of 16-bit"], rows),
    ]
    ends = numbers["ends"]
    if ends["weights"]:
        lines.append(f"\nembedding and output head: {ends['weights']:,} weights, {ends['bits']} bits at every width")
    lines += [expected_speed(numbers["speed"]), "\nstays in float:"]
    lines += [f"  {percent(row['share']):>7}  {row['name']} ({row['reason']})" for row in numbers["left_in_float"]]
    need, learning = numbers["memory"], numbers.get("time", {}).get("learning_bytes", 0)
    whole = f", then about {size(need['float_model'] + learning)} for learned rounding of all of it" if learning else ""
    lines.append(
        f"\nmemory to quantize: {size(need['quantizing'])} block by block ({size(need['float_model'])} would hold the "
        f"float model){whole}; up to {size(need['states'])} of hidden states, in a file where they are too many; disk: "
        f"{size(numbers['disk'])}; to run: {size(need['float_part_at_rest'])} in float + the bytes stored"
    )
    if "time" in numbers:
        lines.append(expected_time(numbers["time"]))
    return "\n".join(lines)


def expected_time(found: Mapping[str, Any]) -> str:
    """How long it will take, and what of it."""
    parts = {name: row["seconds"] for name, row in found["parts"].items()}
    learning = parts.get("learning")
    learnt = "" if learning is None else f", {learning:.0f} s for learned rounding"
    return (
        f"time: about {found['seconds']:.0f} s with a text that is given ({found['cpu_seconds']:.0f} CPU seconds), of "
        f"it {parts['codes']:.0f} s for codes, {parts['passes']:.0f} s for passes of the text{learnt}: one of about "
        f"{found['blocks']:.0f} blocks was tried with random weights; text the model writes itself and measuring "
        "come on top"
    )


def expected_speed(found: Mapping[str, Any] | None) -> str:
    """Predicted tokens per second, or how to get them."""
    if found is None:
        return (
            "\nspeed: not measured on this machine yet; `polybit bench linear` measures it once, then it is told here"
        )
    each = ", ".join(f"{name} {number(value)}" for name, value in found["tokens_per_second"].items())
    return (
        f"\nexpected tokens per second, one sequence, {found['threads']} threads: {each} "
        f"(from what `polybit bench linear` measured here on {found['measured']})"
    )
