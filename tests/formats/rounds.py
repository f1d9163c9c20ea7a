"""What the tests of all formats do: two rounds by hand, and greedy generation in every shape."""

from typing import Any

import torch
from transformers import PreTrainedModel

import hf_specdiff
from hf_specdiff.core.cache import context_cache
from hf_specdiff.core.cache import roll_back
from hf_specdiff.core.conditioning import raw_embeddings

Round = tuple[torch.Tensor, torch.Tensor, int]


def random_rounds(drafter: Any, counts: tuple[int, ...] = (7, 3, 2)) -> list[Round]:
    """Return windows `(1, block_size)`, features of the new context `(1, C, K * D)`, and the anchors' positions."""
    generator = torch.Generator().manual_seed(3)
    config = drafter.config
    rounds, start = [], 0
    for count in counts:
        start += count
        window = torch.full((1, config.block_size), config.mask_token_id)
        window[0, 0] = int(torch.randint(3, config.vocab_size - 1, (), generator=generator))
        width = drafter.fc.in_features
        rounds.append((window, torch.randn(1, count, width, generator=generator), start))
    return rounds


@torch.no_grad()
def our_rounds(drafter: Any, target: Any, rounds: list[Round]) -> list[torch.Tensor]:
    """Return our logits at the slots that predict, `(1, gamma, V)` for each round."""
    return [drafter.window_logits(states, target.get_output_embeddings()) for states in our_states(drafter, target, rounds)]


@torch.no_grad()
def our_states(drafter: Any, target: Any, rounds: list[Round]) -> list[torch.Tensor]:
    """Return our states at the slots that predict, `(1, gamma, D)` for each round."""
    cache, found = context_cache(drafter.config), []
    for window, features, _ in rounds:
        states = drafter(
            noise_embeds=drafter.window_embeddings(window, lambda ids: raw_embeddings(target, ids)),
            context_hidden_states=features,
            past_key_values=cache,
        ).last_hidden_state
        roll_back(cache, window.shape[1])
        found.append(states if drafter.config.predicts_from_anchor else states[:, 1:])
    return found


def check_greedy(target: PreTrainedModel, drafter: Any) -> None:
    """Hold greedy tokens of a chain, a tree and a batch of three against plain `generate`'s, token by token."""
    prompts = torch.tensor([[0, 0, 1, 5, 9, 4, 7], [1, 8, 3, 3, 6, 2, 5], [0, 1, 4, 4, 9, 11, 12]])
    mask = (prompts != 0).long()
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    for shape in ({"draft_shape": "chain"}, {"draft_shape": "tree", "tree_budget": 15}):
        for rows in (slice(1, 2), slice(0, 3)):
            inputs = {"input_ids": prompts[rows], "attention_mask": mask[rows]}
            plain = target.generate(**inputs, **settings)
            ours = hf_specdiff.generate(target, **inputs, assistant_model=drafter, **shape, **settings)
            assert ours.tolist() == plain.tolist()
