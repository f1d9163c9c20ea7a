"""Out and back: what we write is what others read, and what we read is what they write."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dflash import model as zlab
from transformers import LlamaForCausalLM

import hf_specdiff
from hf_specdiff.commands import main
from hf_specdiff.demo.bundle import PAIR
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.formats.referees import speculators
from tests.formats.rounds import check_greedy
from tests.formats.rounds import our_rounds
from tests.formats.rounds import our_states
from tests.formats.rounds import random_rounds
from tests.formats.test_speculators import their_rounds


def bundled_trunk() -> hf_specdiff.SpecDiffDrafter:
    """Return the bundled drafter as it is without its head."""
    return hf_specdiff.SpecDiffDrafter.from_pretrained(PAIR / "features", markov_rank=0).float().eval()


@pytest.mark.parametrize("to", ["dflash", "speculators"])
def test_the_bundled_drafter_comes_back_as_it_went(to: str, tmp_path: Path) -> None:
    target, whole, tokenizer = hf_specdiff.load_demo()
    lines = hf_specdiff.export_drafter(whole, tmp_path, to, target=target, without_head=True)
    drafter = bundled_trunk()
    assert f'"num_speculative_tokens": {drafter.config.block_size - 1}' in lines[0]
    back = hf_specdiff.load_drafter(tmp_path, target=target)
    inputs = tokenizer(hf_specdiff.load_prompts("math")[0]["prompt"], return_tensors="pt", return_token_type_ids=False)
    settings: dict[str, Any] = {"max_new_tokens": 96, "do_sample": False, "return_dict_in_generate": True, "gamma": 15}
    runs = [
        hf_specdiff.generate(target, **inputs, assistant_model=one, draft_shape="chain", **settings) for one in (drafter, back)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert runs[0].speculation.num_accepted == runs[1].speculation.num_accepted
    assert runs[0].speculation.tokens_per_round > 4


def test_their_loop_runs_what_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    hf_specdiff.export_drafter(drafter, tmp_path, "dflash", target=target, without_head=True)
    theirs = zlab.DFlashDraftModel.from_pretrained(tmp_path).float().eval()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # their clock waits for a GPU
    ids = torch.tensor([tokenizer(hf_specdiff.load_prompts("math")[0]["prompt"])["input_ids"]])
    run = zlab.dflash_generate(theirs, target, ids, 64, None, return_stats=True)
    assert sum(run.acceptance_lengths) / len(run.acceptance_lengths) > 4


def test_speculators_class_reads_what_we_write(tmp_path: Path) -> None:
    make_target().save_pretrained(tmp_path / "target")
    target = LlamaForCausalLM.from_pretrained(tmp_path / "target")  # theirs fetches embedding and head by its name
    drafter = make_drafter([0, 2])
    hf_specdiff.export_drafter(drafter, tmp_path / "drafter", "speculators", target=target)
    config = speculators.SpeculatorModelConfig.from_pretrained(tmp_path / "drafter")
    config.transformer_layer_config._attn_implementation = "sdpa"
    theirs = speculators.DFlashDraftModel.from_pretrained(tmp_path / "drafter", config=config).eval()
    rounds = random_rounds(drafter)
    for logits, (_, expected) in zip(our_rounds(drafter, target, rounds), their_rounds(theirs, rounds), strict=True):
        torch.testing.assert_close(logits, expected[:, 1:], atol=1e-5, rtol=0)


SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("dflash", {"causal_layers": [True, True]}),
    ("dflash", {"input_embedding_scale": 2.0, "output_multiplier": 0.5, "final_logit_softcapping": 30.0}),
    (
        "dflash",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "use_sliding_window": True,
            "sliding_window": 7,
            "causal_layers": [True, False],
        },
    ),
    ("speculators", {"predicts_from_anchor": True, "has_own_embedding": True, "has_own_head": True}),
    (
        "speculators",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "use_sliding_window": True,
            "sliding_window": 7,
            "causal_layers": [True, False],
            "window_from_anchor": True,
        },
    ),
]


@pytest.mark.parametrize(("to", "fields"), SWITCHES)
def test_switches_come_back(to: str, fields: dict[str, Any], tmp_path: Path) -> None:
    target, drafter = make_target(), make_drafter([0, 2], **fields)
    hf_specdiff.export_drafter(drafter, tmp_path, to)
    back = hf_specdiff.load_drafter(tmp_path, target=target)
    assert {name: getattr(back.config, name) for name in fields} == fields
    rounds = random_rounds(drafter)
    for logits, expected in zip(our_rounds(back, target, rounds), our_rounds(drafter, target, rounds), strict=True):
        assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("to", "fields", "words"),
    [
        ("dflash", {"predicts_from_anchor": True}, "`predicts_from_anchor`"),
        ("dflash", {"causal_layers": [True, False]}, "`causal_layers`"),
        ("speculators", {"causal_layers": [True, True]}, "`causal_layers`"),
        ("speculators", {"output_multiplier": 2.0}, "`output_multiplier`"),
        *(
            (to, fields, f"`{name}` must be {neutral} .* {remedy}")
            for to in ("dflash", "speculators")
            for name, neutral, fields, remedy in (
                ("markov_rank", 0, {"markov_rank": 4, "markov_head_type": "rnn"}, "layout 'deepspec'.*--without-head"),
                ("selector_rank", 0, {"selector_rank": 4}, "hf-specdiff publish"),
                ("conv_kernel_size", 0, {"conv_kernel_size": 2}, "hf-specdiff publish"),
                ("enable_confidence_head", False, {"enable_confidence_head": True}, "layout 'deepspec'"),
            )
        ),
        ("deepspec", {}, "`predicts_from_anchor` must be True"),
        ("deepspec", {"predicts_from_anchor": True, "rope_interleaved": True}, "`rope_interleaved`"),
        ("deepspec", {"predicts_from_anchor": True, "causal_layers": [True, True]}, "`causal_layers` must be none"),
        ("deepspec", {"predicts_from_anchor": True, "selector_rank": 4}, "`selector_rank`.*hf-specdiff publish"),
        ("deepspec", {"predicts_from_anchor": True}, "`target` must be given"),
        ("gguf", {}, "`to` must be one of"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(to: str, fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        hf_specdiff.export_drafter(make_drafter([0, 2], **fields), tmp_path / "new", to)
    assert not (tmp_path / "new").exists()


def test_a_reduced_vocabulary_comes_back_with_the_rows_that_were_lent(tmp_path: Path) -> None:
    target, drafter = make_target(), make_drafter([0, 2], draft_vocab_size=4)
    drafter.d2t.copy_(torch.tensor([2, 5, 9, 28]) - torch.arange(4))
    with pytest.raises(ValueError, match=r"`target` must be given .* 'speculators'"):
        hf_specdiff.export_drafter(drafter, tmp_path / "no", "speculators")
    with pytest.raises(ValueError, match=r"`draft_vocab_size` must be None .* Choose the layout 'speculators'"):
        hf_specdiff.export_drafter(drafter, tmp_path / "no", "dflash")
    assert not (tmp_path / "no").exists()
    hf_specdiff.export_drafter(drafter, tmp_path / "theirs", "speculators", target)
    back = hf_specdiff.load_drafter(tmp_path / "theirs", target=target)
    assert back.config.has_own_head
    assert torch.equal(back.drafted_ids, drafter.drafted_ids)
    settings = {"max_new_tokens": 12, "do_sample": False, "draft_shape": "chain", "gamma": 5, "return_dict_in_generate": True}
    ids = torch.tensor([[1, 5, 9]])
    ours, theirs = (hf_specdiff.generate(target, ids, assistant_model=each, **settings) for each in (back, drafter))
    assert ours.speculation.num_accepted == theirs.speculation.num_accepted
    lent = target.get_output_embeddings().weight[[2, 5, 9, 28]]
    assert torch.equal(back.lm_head.weight, lent)


DEEPSPEC: list[dict[str, Any]] = [
    {},
    {"has_own_embedding": True, "has_own_head": True},
    {"markov_rank": 4},
    {"markov_rank": 4, "markov_head_type": "rnn", "enable_confidence_head": True, "confidence_head_with_markov": True},
]


def test_the_kind_of_a_head_that_is_not_there_is_no_obstacle(tmp_path: Path) -> None:
    drafter = make_drafter([0, 2], markov_head_type="rnn")
    hf_specdiff.export_drafter(drafter, tmp_path, "dflash")
    assert "markov_head_type" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("fields", DEEPSPEC[2:])
def test_without_its_heads_a_drafter_goes_where_there_are_none(fields: dict[str, Any], tmp_path: Path) -> None:
    target, drafter = make_target(), make_drafter([0, 2], **fields)
    with pytest.raises(ValueError, match="without_head=True"):
        hf_specdiff.export_drafter(drafter, tmp_path, "dflash")
    hf_specdiff.export_drafter(drafter, tmp_path, "dflash", without_head=True)
    back = hf_specdiff.load_drafter(tmp_path, target=target)
    assert not back.config.markov_rank
    trunk = back.state_dict()
    assert trunk.keys() < drafter.state_dict().keys()
    assert all(torch.equal(drafter.state_dict()[name], tensor) for name, tensor in trunk.items())
    with pytest.raises(ValueError, match="`without_head` must be False for a drafter that has no head"):
        hf_specdiff.export_drafter(back, tmp_path / "again", "dflash", without_head=True)


def test_a_head_over_few_tokens_is_left_out_too(tmp_path: Path) -> None:
    drafter = make_drafter([0, 2], draft_vocab_size=4, markov_rank=2, markov_reads_drafted=True)
    drafter.d2t.copy_(torch.tensor([2, 5, 9, 28]) - torch.arange(4))
    with pytest.raises(ValueError, match="`markov_rank` must be 0"):
        hf_specdiff.export_drafter(drafter, tmp_path, "speculators", make_target())
    hf_specdiff.export_drafter(drafter, tmp_path, "speculators", make_target(), without_head=True)
    assert hf_specdiff.load_drafter(tmp_path, target=make_target()).config.draft_vocab_size == 4


@pytest.mark.parametrize("fields", DEEPSPEC)
def test_deepspec_comes_back_with_embedding_and_heads(fields: dict[str, Any], tmp_path: Path) -> None:
    target, drafter = make_target(), make_drafter([-1, 2], predicts_from_anchor=True, **fields)
    lines = hf_specdiff.export_drafter(drafter, tmp_path, "deepspec", target=target)
    assert '"method": "dspark"' in lines[0]
    back = hf_specdiff.load_drafter(tmp_path, target=target)
    expected_fields = {"predicts_from_anchor": True, "target_layer_ids": [-1, 2], **fields}
    assert {name: getattr(back.config, name) for name in expected_fields} == expected_fields
    rounds, previous = random_rounds(drafter), torch.tensor([5])
    states, expected_states = (our_states(one, target, rounds) for one in (back, drafter))
    logits, expected_logits = (our_rounds(one, target, rounds) for one in (back, drafter))
    for number in range(len(rounds)):
        assert torch.equal(logits[number], expected_logits[number])
        if "markov_rank" in fields:
            laws = [
                one.step_logits(rows[number][:, 0], slots[number][:, 0], previous)[0]
                for one, rows, slots in ((back, logits, states), (drafter, expected_logits, expected_states))
            ]
            torch.testing.assert_close(*laws, atol=1e-6, rtol=0)
    tensors = drafter.state_dict()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in tensors.items())
    check_greedy(target, back)


def test_token_conditioned_drafters_and_full_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="feature-conditioned"):
        hf_specdiff.export_drafter(make_drafter(), tmp_path)
    hf_specdiff.export_drafter(make_drafter([0, 2]), tmp_path)
    with pytest.raises(ValueError, match="must hold no model"):
        hf_specdiff.export_drafter(make_drafter([0, 2]), tmp_path)


def test_the_commands_convert_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {name: str(PAIR / name) for name in ("features", "target")}
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    main.app(
        ["export", pair["features"], out, "--to", "dflash", "--target", pair["target"], "--without-head"], standalone_mode=False
    )
    main.app(["import", out, back, "--target", pair["target"]], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("Self-check passed") == 2
    assert "--speculative-algorithm DFLASH" in said
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "specdiff"
    with pytest.raises(ValueError, match="`output` must be an empty folder"):
        main.app(["import", out, back, "--target", pair["target"]], standalone_mode=False)
