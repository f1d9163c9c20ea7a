"""transformers' own DFlash assistant, held against its own class."""

from pathlib import Path

import pytest
import torch
from transformers import MuseGlimmerAssistantConfig
from transformers import MuseGlimmerAssistantModel
from transformers.cache_utils import DFlashCache

import hf_specdiff
from tests.conftest import MASK_TOKEN_ID
from tests.conftest import make_target
from tests.formats.rounds import check_greedy
from tests.formats.rounds import our_rounds
from tests.formats.rounds import random_rounds


@pytest.mark.parametrize("layer_types", [None, ["full_attention"] * 2, ["sliding_attention", "full_attention"]])
def test_logits_are_theirs_and_greedy_tokens_those_of_plain(layer_types: list[str] | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MuseGlimmerAssistantConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        sliding_window=4,
        layer_types=layer_types,
        block_size=6,
        mask_token_id=MASK_TOKEN_ID,
        target_layer_ids=[0, 2],
    )
    theirs = MuseGlimmerAssistantModel(config).eval()
    theirs.save_pretrained(tmp_path)
    target = make_target()
    ours = hf_specdiff.load_drafter(tmp_path, target=target)
    rounds = random_rounds(ours)
    cache = DFlashCache(config=config)
    cache.activate_past_recording()
    for (window, features, start), logits in zip(rounds, our_rounds(ours, target, rounds), strict=True):
        cache.set_previous_accepted_tokens(features.shape[1])
        with torch.no_grad():
            states = theirs(
                noise_embeds=target.get_input_embeddings()(window),
                context_hidden_states=features,
                position_ids=torch.arange(start - features.shape[1], start + window.shape[1])[None],
                past_key_values=cache,
            ).last_hidden_state[:, 1:]
            cache.crop(-window.shape[1])
            torch.testing.assert_close(logits, target.lm_head(states), atol=1e-5, rtol=0)
    check_greedy(target, ours)


def test_without_a_target_it_is_refused(tmp_path: Path) -> None:
    config = MuseGlimmerAssistantConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.num_key_value_heads, config.head_dim = 1, 8
    MuseGlimmerAssistantModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`target` must be given"):
        hf_specdiff.load_drafter(tmp_path)
