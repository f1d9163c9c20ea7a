"""Formats without a class that can be installed: checkpoints and logits that their own code produced once.

`rounds.safetensors` holds windows, features and logits of three rounds with a cache, and the embedding that stood for the
target's; made with the classes of the public repository hao-ai-lab/JetSpec.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import hf_specdiff
from tests.conftest import make_target
from tests.formats.rounds import check_greedy
from tests.formats.rounds import our_rounds
from tests.formats.rounds import our_states

DATA = Path(__file__).parent / "data"


def test_jetspec_logits_are_theirs_and_all_layers_causal() -> None:
    drafter = hf_specdiff.load_drafter(DATA / "jetspec")
    assert drafter.config.causal_layers == [True, True]
    recorded = load_file(DATA / "jetspec" / "rounds.safetensors")
    rounds, start = [], 0
    for number in range(3):
        features = recorded[f"features_{number}"]
        start += features.shape[1]
        rounds.append((recorded[f"window_{number}"], features, start))
    embedding = torch.nn.Embedding.from_pretrained(recorded["embedding"])
    head = torch.nn.Linear(*embedding.weight.T.shape, bias=False)
    head.weight.data.copy_(embedding.weight)
    target = SimpleNamespace(get_input_embeddings=lambda: embedding, get_output_embeddings=lambda: head)
    for number, logits in enumerate(our_rounds(drafter, target, rounds)):
        torch.testing.assert_close(logits, recorded[f"logits_{number}"], atol=1e-5, rtol=0)
    drafter.config.causal_layers = None
    for layer in drafter.layers:
        layer.self_attn.is_causal_window = False
    different = our_rounds(drafter, target, rounds)
    assert (different[0] - recorded["logits_0"]).abs().max() > 1e-2


def test_deepspec_laws_given_the_token_before_are_theirs() -> None:
    """Made with the classes of the public repository deepseek-ai/DeepSpec: its head with a memory, along greedy chains."""
    target = make_target()
    drafter = hf_specdiff.load_drafter(DATA / "deepspec", target=target)
    recorded = load_file(DATA / "deepspec" / "rounds.safetensors")
    rounds = [(recorded[f"window_{number}"], recorded[f"features_{number}"], 0) for number in range(3)]
    pairs = zip(our_rounds(drafter, target, rounds), our_states(drafter, target, rounds), strict=True)
    for number, (logits, states) in enumerate(pairs):
        previous, memory = rounds[number][0][:, 0], None
        for index, token in enumerate(recorded[f"tokens_{number}"].unbind(dim=1)):
            law, memory = drafter.step_logits(logits[:, index], states[:, index], previous, memory)
            torch.testing.assert_close(law, recorded[f"logits_{number}"][:, index], atol=1e-5, rtol=0)
            previous = token
    check_greedy(target, drafter)
