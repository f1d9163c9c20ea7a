"""Write your own drafter: any object with `draft` and `target_layer_ids` can be the `assistant_model`.

This one proposes what followed the last token when it last occurred. Whatever it drafts, the text stays the target's.
"""

import hf_specdiff


class CopyingDrafter:
    """Drafts by copying from the text; reads no hidden states."""

    target_layer_ids = None

    def draft(self, text: hf_specdiff.Text, features: hf_specdiff.Features | None) -> hf_specdiff.Draft:
        """Return up to four tokens: a function of the text alone, so nothing was drawn and `probs` is None."""
        earlier = (text.tokens[0, :-1] == text.tokens[0, -1]).nonzero()
        start = int(earlier[-1]) + 1 if len(earlier) else text.lengths[0]
        return hf_specdiff.Draft(text.tokens[:, start : start + 4], None, has_prefix_law=True)


target, _, tokenizer = hf_specdiff.load_demo()
inputs = tokenizer(hf_specdiff.load_prompts("math")[0]["prompt"], return_tensors="pt")
settings = {"do_sample": False, "max_new_tokens": 120, "return_dict_in_generate": True}
plain = target.generate(**inputs, **settings).sequences.tolist()
output = hf_specdiff.generate(target, **inputs, assistant_model=CopyingDrafter(), **settings)
print(f"same tokens: {output.sequences.tolist() == plain}, {output.speculation.tokens_per_round:.2f} tokens per round")
