"""The bundled pair in a dozen lines: the same text as plain `generate`, in fewer target passes."""

import torch

import hf_specdiff

target, drafter, tokenizer = hf_specdiff.load_demo()
prompt = hf_specdiff.load_prompts("math")[0]["prompt"]
inputs = tokenizer(prompt, return_tensors="pt")

plain = target.generate(**inputs, do_sample=False, max_new_tokens=200)
fast = hf_specdiff.generate(
    target, **inputs, assistant_model=drafter, do_sample=False, max_new_tokens=200, return_dict_in_generate=True
)

print(tokenizer.decode(fast.sequences[0], skip_special_tokens=True))
print(f"same tokens: {torch.equal(plain, fast.sequences)}")
print(f"{fast.speculation.tokens_per_round:.2f} tokens per round; accepted in each: {fast.speculation.num_accepted}")
