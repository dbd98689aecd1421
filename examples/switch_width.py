"""Load a polybit checkpoint with plain transformers and change its width between two answers.

Run after `make demo`:  .venv/bin/python examples/switch_width.py demo/tinychat
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import polybit

directory = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
messages = [{"role": "user", "content": "Bradus has 12 coins. He finds 30 more. How many coins does he have?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

for width in ("w8", "w4", "w3", "w2"):
    polybit.use(model, width)
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    print(f"{width}: {tokenizer.decode(output[0, prompt['input_ids'].shape[1] :], skip_special_tokens=True).strip()}")

polybit.use(model, "w8")
with polybit.at(model, "w3"):
    pass  # everything in here runs at 3 bits; w8 comes back afterwards
print("now at", model.model.layers[0].mlp.up_proj.precision)
