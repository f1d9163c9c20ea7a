"""The bundled pair: it loads, it keeps the tokens, and its prompts were never trained on."""

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers import pipeline

import hf_specdiff
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.demo.word_problems import iter_problems
from recipes.bundled import NUM_COPIED
from recipes.bundled import NUM_CORPUS_PROBLEMS
from recipes.bundled import TARGET_LAYERS
from recipes.bundled import code_prompt
from recipes.bundled import drafter_stages
from recipes.bundled import head_prompts
from recipes.bundled import model_config
from recipes.bundled import training_prompts
from recipes.source_code import iter_modules


@pytest.fixture(scope="module", params=["features", "tokens"])
def pair(request: pytest.FixtureRequest) -> tuple:
    return hf_specdiff.load_demo(request.param)


def ids_of(tokenizer: object, name: str, count: int) -> list[torch.Tensor]:
    return [tokenizer(record["prompt"], return_tensors="pt").input_ids for record in hf_specdiff.load_prompts(name)[:count]]


@pytest.mark.parametrize("name", ["math", "code"])
def test_greedy_outputs_equal_plain_generate(pair: tuple, name: str) -> None:
    target, drafter, tokenizer = pair
    accepted = []
    for ids in ids_of(tokenizer, name, 2):
        settings = {"do_sample": False, "max_new_tokens": 48}
        expected = target.generate(ids, **settings)
        result = hf_specdiff.generate(target, ids, assistant_model=drafter, return_dict_in_generate=True, **settings)
        assert torch.equal(result.sequences, expected)
        accepted += result.speculation.num_accepted
        if drafter.config.target_layer_ids is None:
            assert torch.equal(target.generate(ids, assistant_model=drafter, **settings), expected)
        else:
            assert torch.equal(target.generate(ids, assistant_model=drafter, speculation_type="dflash", **settings), expected)
    # Well below what the pair reaches; a drafter read at the wrong layers or with the wrong mask accepts next to nothing.
    assert sum(map(sum, accepted)) / len(accepted) > {"math": 1.5, "code": 0.2}[name]


def test_the_target_solves_held_out_problems() -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    records = hf_specdiff.load_prompts("math")[:12]
    right = 0
    for record, ids in zip(records, ids_of(tokenizer, "math", 12), strict=True):
        text = hf_specdiff.generate(target, ids, assistant_model=drafter, do_sample=False, max_new_tokens=200)
        found = re.findall(r"The answer is (\d+)\.", tokenizer.decode(text[0]))
        right += found[-1:] == [record["answer"]]
    assert right >= 3


def test_sampling_with_every_rule_writes_text(pair: tuple) -> None:
    target, drafter, tokenizer = pair
    (ids,) = ids_of(tokenizer, "math", 1)
    for acceptance in ("match", "ratio", "block", "self_selection"):
        torch.manual_seed(0)
        result = hf_specdiff.generate(
            target,
            ids,
            assistant_model=drafter,
            do_sample=True,
            top_p=0.95,
            max_new_tokens=40,
            acceptance=acceptance,
            return_dict_in_generate=True,
        )
        assert result.speculation.acceptance == acceptance
        assert result.speculation.tokens_per_round > 1.2


def test_stop_strings_end_the_text_where_plain_generate_ends_it(pair: tuple) -> None:
    target, drafter, tokenizer = pair
    for ids in ids_of(tokenizer, "math", 3):
        settings = {"do_sample": False, "max_new_tokens": 120, "stop_strings": [" so now", "At the"], "tokenizer": tokenizer}
        expected = target.generate(ids, **settings)
        assert torch.equal(hf_specdiff.generate(target, ids, assistant_model=drafter, **settings), expected)


def test_the_pipeline_takes_the_token_drafter() -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo("tokens")
    prompt = hf_specdiff.load_prompts("math")[0]["prompt"]
    settings = {"do_sample": False, "max_new_tokens": 24, "return_full_text": False}
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)(prompt, **settings)
    fast = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=drafter)(prompt, **settings)
    assert fast == plain


@pytest.fixture(scope="module")
def plain_pipelines() -> Callable[[int], list]:
    """Return what pipelines write without a drafter, by the size of their batches."""
    known: dict[int, list] = {}

    def write(batch_size: int) -> list:
        if batch_size not in known:
            target, _, tokenizer = hf_specdiff.load_demo()
            known[batch_size] = write_all(pipeline("text-generation", model=target, tokenizer=tokenizer), batch_size)
        return known[batch_size]

    return write


def write_all(write: Any, batch_size: int) -> list:
    """Let a pipeline go on from texts, up to a stop sequence, and from chats."""
    write.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    texts = [record["prompt"] for record in hf_specdiff.load_prompts("math")[:4]]
    chats = [[{"role": "user", "content": text}] for text in texts]
    settings = {"do_sample": False, "max_new_tokens": 20, "batch_size": batch_size}
    return [write(texts, return_full_text=False, stop_sequence=".", **settings), write(chats, **settings)]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["features", "tokens"])
def test_pipelines_on_an_attached_target_take_lists_and_chats(
    kind: str, batch_size: int, plain_pipelines: Callable[[int], list]
) -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo(kind)
    hf_specdiff.attach(target)
    fast = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=drafter)
    assert write_all(fast, batch_size) == plain_pipelines(batch_size)


def test_stop_strings_end_every_row_of_a_batch(pair: tuple) -> None:
    target, drafter, tokenizer = pair
    texts = [record["prompt"] for record in hf_specdiff.load_prompts("math")[:4]]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    settings = {"do_sample": False, "max_new_tokens": 90, "stop_strings": [" so now", "left"], "tokenizer": tokenizer}
    expected = target.generate(**inputs, **settings)
    assert torch.equal(hf_specdiff.generate(target, **inputs, assistant_model=drafter, **settings), expected)


def test_the_assistant_is_an_ordinary_causal_model() -> None:
    target, assistant, tokenizer = hf_specdiff.load_demo("autoregressive")
    assert isinstance(assistant, LlamaForCausalLM)
    (ids,) = ids_of(tokenizer, "math", 1)
    settings = {"do_sample": False, "max_new_tokens": 40}
    assert torch.equal(target.generate(ids, assistant_model=assistant, **settings), target.generate(ids, **settings))


def test_the_head_is_that_of_the_recipe_and_brings_something() -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    _, plan = drafter_stages()["features"][-1]
    assert (drafter.config.markov_head_type, drafter.config.markov_rank) == (plan.head, plan.head_rank)
    assert drafter.generation_config.prompt_lookup_num_tokens == NUM_COPIED
    trunk = hf_specdiff.SpecDiffDrafter.from_pretrained(PAIR / "features", markov_rank=0).float().eval()
    settings = {"do_sample": False, "max_new_tokens": 64, "return_dict_in_generate": True, "prompt_lookup_num_tokens": 0}
    num_rounds = {
        name: sum(
            hf_specdiff.generate(target, ids, assistant_model=one, **settings).speculation.num_rounds
            for ids in ids_of(tokenizer, "code", 3)
        )
        for name, one in (("whole", drafter), ("trunk", trunk))
    }
    assert num_rounds["whole"] < num_rounds["trunk"]


def test_prompt_sets_are_held_out() -> None:
    math, code = hf_specdiff.load_prompts("math"), hf_specdiff.load_prompts("code")
    assert len(math) >= 64
    assert len(code) >= 64
    assert all(record["answer"].isdigit() for record in math)
    assert all(record["answer"] is None for record in code)
    seen = {*training_prompts(), *head_prompts(first=True), *head_prompts(first=False)}
    assert not seen & {record["prompt"] for record in math + code}
    corpus = {problem.prompt for problem in itertools.islice(iter_problems(1, held_out=False), NUM_CORPUS_PROBLEMS)}
    assert not corpus & {record["prompt"] for record in math}
    training_source = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in iter_modules(held_out=False))
    assert not [record["prompt"] for record in code if record["prompt"] in training_source]


def test_held_out_problems_are_told_by_their_text() -> None:
    for held_out in (True, False):
        problems = list(itertools.islice(iter_problems(7, held_out=held_out), 20))
        assert all(problem.is_held_out == held_out for problem in problems)
        for problem in problems:
            assert problem.solution.endswith(f"The answer is {problem.answer}.")


def test_the_recipe_makes_targets_of_the_bundled_shape() -> None:
    bundled, made = json.loads((PAIR / "target" / "config.json").read_text()), model_config(TARGET_LAYERS)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(made, name) == bundled[name]


def test_code_prompts_leave_something_to_write() -> None:
    definition = "def f(x):\n    y = x + 1\n    z = y * 2\n    return z\n"
    head = code_prompt(definition, 15)
    assert definition.startswith(head)
    assert len(head) < 2 / 3 * len(definition)
    assert code_prompt(definition, 500) is None


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="`drafter` must be one of"):
        hf_specdiff.load_demo("diffusion")
    with pytest.raises(ValueError, match="`name` must be one of"):
        hf_specdiff.load_prompts("poems")


def test_bundled_weights_are_small_bfloat16_safetensors() -> None:
    files = list(PAIR.rglob("*.safetensors"))
    assert {path.parent.name for path in files} == {"target", "features", "tokens", "unaligned", "autoregressive"}
    assert sum(path.stat().st_size for path in files) < 32_000_000
    for path in files:
        assert json.loads((path.parent / "config.json").read_text())["dtype"] == "bfloat16"
