"""Write your own drafter: anything with a `draft` method can drive the loop.

This one repeats what followed the anchor when it last occurred.
"""

import torch
from transformers import GenerationMixin

from hf_specdiff import load_demo
from hf_specdiff import load_prompts
from hf_specdiff.core.decoding import run
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.features import Features
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.stopping import StopCheck
from hf_specdiff.core.target import Target
from hf_specdiff.core.text import Text


class CopyingDrafter:
    """Draft the tokens that followed the last occurrence of the anchor. Whatever it drafts, the text stays the target's."""

    target_layer_ids = None

    def draft(self, text: Text, features: Features | None) -> Draft:
        """Return up to four tokens, a point mass: a function of the text alone."""
        ids = text.tokens
        earlier = (ids[0, :-1] == ids[0, -1]).nonzero()
        start = int(earlier[-1]) + 1 if len(earlier) else 0
        return Draft(ids[:, start : start + 4], None, has_prefix_law=True)


def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """Run the decoding loop with that drafter; a `custom_generate` callable."""
    target = Target(model, generation_config, model_kwargs, CopyingDrafter.target_layer_ids)
    stop = StopCheck(stopping_criteria, num_rows=1, keep_scores=False)
    text = Text.of_prompt(input_ids)
    return run(target, CopyingDrafter(), SpeculationConfig(gamma=4), stop, logits_processor, text)


target, _, tokenizer = load_demo()
inputs = tokenizer(load_prompts("math")[0]["prompt"], return_tensors="pt")
plain = target.generate(**inputs, do_sample=False, max_new_tokens=120)
copied = GenerationMixin.generate(target, **inputs, do_sample=False, max_new_tokens=120, custom_generate=loop)
print(f"same tokens: {torch.equal(plain, copied.sequences)}, {copied.speculation.tokens_per_round:.2f} tokens per round")
