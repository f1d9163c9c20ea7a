"""One drafter pass, three shapes: how many tokens a round adds, and that the tokens stay the same."""

import torch

import hf_specdiff

target, drafter, tokenizer = hf_specdiff.load_demo("tokens")
prompts = [record["prompt"] for record in hf_specdiff.load_prompts("math")[:4]]
inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
settings = {"do_sample": False, "max_new_tokens": 80, "return_dict_in_generate": True}
plain = target.generate(**inputs, **settings)
for shape in ("chain", "samples", "tree"):
    output = hf_specdiff.generate(target, **inputs, assistant_model=drafter, draft_shape=shape, **settings)
    same = torch.equal(output.sequences, plain.sequences)
    print(f"{shape}: {output.speculation.tokens_per_round:.2f} tokens per round, same tokens: {same}")
