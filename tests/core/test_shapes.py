"""Trees from marginals and what is kept of them; drawn children follow the target's temperature."""

import pytest
import torch
from transformers import DynamicCache

import hf_specdiff
from hf_specdiff.core.cache import RaggedCache
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.draft import Outcome
from hf_specdiff.core.draft import SampledChildren
from hf_specdiff.core.shapes import TEMPERATURES
from hf_specdiff.core.shapes import ChildTemperature
from hf_specdiff.core.shapes import _most_probable
from hf_specdiff.core.tree import best_first

MARGINALS = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.1, 0.2, 0.7, 0.0]])


def outcome_of(target_laws: torch.Tensor) -> Outcome:
    """Return a round that drew a child under node 0 and one under node 1, and reached both nodes."""
    sampled = SampledChildren(MARGINALS, [{0: 0, 1: 1}], [{0: 1, 1: 2}], MARGINALS)
    tree = DraftTree(torch.tensor([[0, 2]]), [[0, 1]], sampled=sampled)
    return Outcome(tree, [[0, 2, 1]], [[0, 1, 2]], [False], {(0, node): law for node, law in enumerate(target_laws)})


def taught(target_laws: torch.Tensor, rounds: int = 3) -> ChildTemperature:
    temperature = ChildTemperature()
    for _ in range(rounds):
        temperature.observe(outcome_of(target_laws))
    return temperature


def test_children_are_drawn_colder_where_the_target_is_certain() -> None:
    certain = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    assert taught(certain).value == TEMPERATURES[-1]
    assert taught(MARGINALS).value == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_the_chosen_temperature_overlaps_most(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    laws = (3 * torch.randn(2, 4, generator=generator)).softmax(-1)
    overlaps = [float(torch.minimum(laws, (MARGINALS.log() / t).softmax(-1)).sum()) for t in TEMPERATURES]
    temperature = taught(laws)
    assert overlaps[TEMPERATURES.index(temperature.value)] == pytest.approx(max(overlaps))


def test_a_law_stays_a_law_and_forbidden_tokens_stay_forbidden() -> None:
    temperature = taught(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    law = temperature.law(MARGINALS)
    assert torch.allclose(law.sum(-1), torch.ones(2))
    assert bool((law[:, 3] == 0).all())
    assert float(law[0, 0]) > float(MARGINALS[0, 0])


def test_a_text_that_changes_is_followed() -> None:
    certain = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    temperature = taught(certain)
    for _ in range(120):
        temperature.observe(outcome_of(MARGINALS))
    assert temperature.value == 1.0


def test_it_learns_in_the_loop_and_only_where_it_was_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    ids = tokenizer(str(hf_specdiff.load_prompts("math")[0]["prompt"]), return_tensors="pt").input_ids
    used = set()
    law = ChildTemperature.law

    def watched(self: ChildTemperature, marginals: torch.Tensor) -> torch.Tensor:
        result = law(self, marginals)
        used.add(self.value)
        return result

    monkeypatch.setattr(ChildTemperature, "law", watched)
    settings = {"do_sample": True, "max_new_tokens": 60, "draft_shape": "tree", "acceptance": "ratio"}
    for given in (1.0, 0.5):
        hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, draft_temperature=given)
        assert not used
    for given in ("auto", None):
        hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, draft_temperature=given)
        assert len(used) > 1  # at 1 first, then at what fits
        used.clear()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("budget", [1, 8, 15, 16, 17, 64])
def test_looking_at_few_ranks_first_misses_no_node(budget: int, temperature: float) -> None:
    scores = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(budget))
    marginals = (scores / temperature).softmax(-1)
    shapes, tokens = _most_probable(marginals, budget, 0.0)
    all_probs, all_tokens = marginals.sort(dim=-1, descending=True)
    assert shapes == [best_first(row, budget) for row in all_probs.tolist()]
    assert tokens == all_tokens[..., : len(tokens[0][0])].tolist()
    assert all(max(shape.ranks) < len(tokens[0][0]) for shape in shapes)


@pytest.mark.parametrize("kept", [[], [0], [0, 1, 2], [0, 3, 4], [0, 2, 3, 4], [0, 1, 3, 5], [1], [2, 0]])
def test_kept_slots_of_a_single_row_move_to_its_end(kept: list[int]) -> None:
    """Also where what is kept and where it goes overlap, and where it does not lie in one piece."""
    states = torch.arange(10.0).view(1, 1, 10, 1)
    cache = DynamicCache()
    for layer in range(2):
        cache.update(states[:, :, :4] + layer, -states[:, :, :4], layer)
    rows = RaggedCache(cache, 1)
    for layer in range(2):
        cache.update(states[:, :, 4:] + layer, -states[:, :, 4:], layer)
    rows.keep([kept])
    expected = [0, 1, 2, 3, *(4 + slot for slot in kept)]
    for layer in range(2):
        assert cache.layers[layer].keys.flatten().tolist() == [value + layer for value in expected]
        assert cache.layers[layer].values.flatten().tolist() == [-value for value in expected]
    assert rows.ends == [len(expected)]
