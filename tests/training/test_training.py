"""The trainer: its windows are those of decoding, its data are whole or absent, its runs resume."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config
from transformers import GPT2LMHeadModel
from transformers import LogitsProcessorList
from transformers import TrainerCallback
from transformers import TrainerState
from transformers import TrainingArguments

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.cache import RaggedCache
from hf_specdiff.core.conditioning import make_drafter as put_around
from hf_specdiff.core.features import Features
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.text import Text
from hf_specdiff.training.checkpoints import last_whole_checkpoint
from hf_specdiff.training.data import SequenceDataset
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import collate
from hf_specdiff.training.data import hold_out
from hf_specdiff.training.drafter_config import make_drafter_config
from hf_specdiff.training.drafter_config import spread_layers
from hf_specdiff.training.evaluation import HeldOut
from hf_specdiff.training.evaluation import calibration_error
from hf_specdiff.training.evaluation import decode_held_out
from hf_specdiff.training.first_weights import new_drafter
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.processes import processes
from hf_specdiff.training.prompts import encode
from hf_specdiff.training.prompts import read_prompts
from hf_specdiff.training.trainer import SpecDiffTrainer
from hf_specdiff.training.windows import sample_windows
from tests.conftest import MASK_TOKEN_ID
from tests.conftest import make_drafter
from tests.conftest import make_target


def make_sequences(num_sequences: int = 24, seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(10, 24, (num_sequences,), generator=generator).tolist()
    sequences = [torch.randint(3, 29, (length,), generator=generator).tolist() for length in lengths]
    return Sequences.from_lists(sequences, [3] * num_sequences)


def make_trainer(
    folder: Path,
    drafter: torch.nn.Module,
    language_model: object = None,
    *,
    max_steps: int = 6,
    save_steps: int = 3,
    learning_rate: float = 1e-2,
    **settings: object,
) -> SpecDiffTrainer:
    """Return a trainer on a few random sequences, not yet run; `settings` are the plan's."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        save_steps=save_steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    plan, dataset = TrainingPlan(None, **settings), SequenceDataset(make_sequences(), 24)
    return SpecDiffTrainer(make_target(), plan, language_model=language_model, model=drafter, args=args, train_dataset=dataset)


class KillAfter(TrainerCallback):
    """Die without a word after some step, as a killed process does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if state.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize(("layers", "has_own"), [(None, False), ([0, 2], False), ([0, 2], True)])
def test_training_windows_give_the_logits_of_decoding(layers: list[int] | None, has_own: bool, tmp_path: Path) -> None:
    """A window inside the training mask is the window of a decoding round: same logits, to rounding."""
    target, drafter = make_target(), make_drafter(layers, has_mask_embedding=has_own)
    if has_own:
        drafter.mask_embedding.data.normal_()
    trainer = make_trainer(tmp_path, drafter, num_anchors=3)
    batch = collate([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        _, outputs = trainer.compute_loss(drafter, batch, return_outputs=True)
    seed = trainer._window_seed(batch["indices"])
    windows = sample_windows(batch, 3, 6, MASK_TOKEN_ID, torch.Generator().manual_seed(seed))
    for row in range(4):
        for column in range(3):
            anchor = int(windows.anchors[row, column])
            text = batch["input_ids"][row : row + 1, : anchor + 1]
            decoding = put_around(drafter, target, SpeculationConfig(5, draft_temperature=0.0), LogitsProcessorList())
            features = None
            if layers is not None:
                with torch.no_grad():
                    states = target(text[:, :-1], output_hidden_states=True).hidden_states
                features = torch.cat([states[i + 1] for i in layers], dim=-1)
            window = torch.tensor([[int(text[0, -1])] + [MASK_TOKEN_ID] * 5])
            given = None if features is None else Features(features, [anchor])
            decoding.rows = RaggedCache(decoding.cache, 1)
            with torch.no_grad():
                logits = decoding.window_logits(window, Text.of_prompt(text), given)
            torch.testing.assert_close(outputs["log_probs"][row * 3 + column], logits[0].log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_a_mask_of_its_own_is_learnt_and_begins_without_a_favourite(tmp_path: Path) -> None:
    """A target of tied weights, where the mask's row stands in many others: a fresh drafter is sure of those without one."""
    first = {}
    for has_own in (False, True):
        target = make_target(tie_word_embeddings=True)
        weight = target.get_input_embeddings().weight.data
        weight[-8:] = 3 * weight[MASK_TOKEN_ID]
        config = make_drafter_config(target, TrainingPlan([0, 2], has_mask_embedding=has_own), MASK_TOKEN_ID)
        config.initializer_range = 0.02
        drafter = new_drafter(config, 0, target)
        trainer = make_trainer(tmp_path, drafter, max_steps=2)
        trainer.target = target
        batch = collate([trainer.train_dataset[i] for i in range(16)])
        first[has_own] = float(trainer.compute_loss(drafter.train(), batch).detach())
        if has_own:
            before = drafter.mask_embedding.detach().clone()
            trainer.train()
            assert not torch.equal(drafter.mask_embedding, before)
    assert first[True] < 0.5 * first[False]


def test_windows_hold_the_text_behind_their_anchor() -> None:
    batch = collate([SequenceDataset(make_sequences(), 24)[i] for i in range(8)])
    windows = sample_windows(batch, 5, 6, MASK_TOKEN_ID, torch.Generator().manual_seed(1))
    labels = windows.labels.view(8, 5, 5)
    ids = windows.input_ids.view(8, 5, 6)
    for row in range(8):
        text = batch["input_ids"][row, : batch["lengths"][row]].tolist()
        for column in range(5):
            anchor = int(windows.anchors[row, column])
            assert 3 <= anchor <= len(text) - 2
            behind = text[anchor + 1 : anchor + 6]
            assert labels[row, column].tolist() == behind + [-100] * (5 - len(behind))
            assert ids[row, column].tolist() == [text[anchor]] + [MASK_TOKEN_ID] * 5


def test_the_context_is_learnt_where_it_has_a_weight(tmp_path: Path) -> None:
    """The loss grows by the weighted loss of the context, and the windows' logits stay what they were."""
    drafter = make_drafter().eval()
    outputs = []
    for weight in (0.0, 0.5, 1.0):
        trainer = make_trainer(tmp_path, drafter, num_anchors=3, context_weight=weight)
        batch = collate([trainer.train_dataset[i] for i in range(4)])
        with torch.no_grad():
            outputs.append(trainer.compute_loss(drafter, batch, return_outputs=True))
    losses = [float(loss) for loss, _ in outputs]
    assert losses[1] - losses[0] == pytest.approx(0.5 * (losses[2] - losses[0]), rel=1e-4)
    assert losses[2] - losses[0] > 1.0  # an untrained drafter's loss is about log 31
    torch.testing.assert_close(outputs[0][1]["log_probs"], outputs[2][1]["log_probs"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_a_resumed_run_ends_in_the_weights_of_an_unbroken_one(layers: list[int] | None, tmp_path: Path) -> None:
    unbroken = make_trainer(tmp_path / "unbroken", make_drafter(layers))
    unbroken.train()
    killed = make_trainer(tmp_path / "killed", make_drafter(layers))
    killed.add_callback(KillAfter(5))
    with pytest.raises(RuntimeError, match="killed"):
        killed.train()
    # What is in memory is lost; the checkpoint of step 3 is what is left.
    resumed = make_trainer(tmp_path / "killed", make_drafter(layers, seed=7))
    resumed.train(resume_from_checkpoint=True)
    for name, weight in unbroken.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, atol=0, rtol=0)


def test_training_lowers_the_loss_and_leaves_the_target_alone(tmp_path: Path) -> None:
    drafter = make_drafter([0, 2])
    trainer = make_trainer(tmp_path, drafter, max_steps=40, save_steps=1000)
    before = {name: weight.clone() for name, weight in trainer.target.state_dict().items()}
    batch = collate([trainer.train_dataset[i] for i in range(16)])
    drafter.eval()
    with torch.no_grad():
        first = float(trainer.compute_loss(drafter, batch))
    trainer.train()
    drafter.eval()
    with torch.no_grad():
        assert float(trainer.compute_loss(drafter, batch)) < 0.9 * first
    for name, weight in trainer.target.state_dict().items():
        assert torch.equal(weight, before[name])


def test_sequences_are_joined_and_selected() -> None:
    first, second = make_sequences(3, seed=1), make_sequences(2, seed=2)
    joined = Sequences.concatenate([first, second])
    turned = joined.select(torch.tensor([4, 0]))
    assert [turned.ids(0), turned.ids(1)] == [second.ids(1), first.ids(0)]
    assert turned.groups.tolist() == [int(second.groups[1]), int(first.groups[0])]
    assert turned.num_answers().tolist() == [len(second.ids(1)) - 3, len(first.ids(0)) - 3]
    alone = [SequenceDataset(part, 24) for part in (first, second)]
    texts = [dataset[i]["input_ids"].tolist() for dataset in alone for i in range(len(dataset))]
    assert [item["input_ids"].tolist() for item in (SequenceDataset(joined, 24)[i] for i in range(5))] == texts


def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


def test_drafters_fit_targets_of_other_shapes() -> None:
    config = make_drafter_config(
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=31)), TrainingPlan(None), 3
    )
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (16, 64, 8)


def test_unusable_prompts_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    for path, word in [(tmp_path / "none.txt", "does not exist"), (empty, "at least one"), (broken, "line 2")]:
        with pytest.raises(ValueError, match=word):
            read_prompts(path)
    with pytest.raises(ValueError, match="longer than the context"):
        SequenceDataset(Sequences.from_lists([[1, 2, 3]], [3]), 8)


def test_spread_layers_are_ordered_and_different() -> None:
    assert spread_layers(36, 5) == [1, 9, 17, 25, 33]
    for num_layers in range(1, 12):
        for count in range(1, num_layers + 1):
            layers = spread_layers(num_layers, count)
            assert len(set(layers)) == count
            assert all(0 <= layer < num_layers for layer in layers)


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_the_targets_law_stands_at_the_windows_positions(layers: list[int] | None, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_drafter(layers), num_anchors=3, loss_weights={"tv": 1.0})
    batch = collate([trainer.train_dataset[i] for i in range(4)])
    windows = sample_windows(batch, 3, 6, MASK_TOKEN_ID, torch.Generator().manual_seed(0))
    features, law = trainer._run_target(trainer.model.config, batch, windows)
    assert (features is None) == (layers is None)
    for row in range(4):
        for column in range(3):
            anchor = int(windows.anchors[row, column])
            for j, label in enumerate(windows.labels[row * 3 + column].tolist()):
                if label == -100:
                    continue
                with torch.no_grad():
                    logits = trainer.target(batch["input_ids"][row : row + 1, : anchor + 1 + j]).logits[0, -1]
                torch.testing.assert_close(law[row * 3 + column, j], logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_the_target_runs_only_where_something_of_it_is_wanted(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_drafter(), loss_weights={"ce": 1.0})
    calls: list[int] = []
    trainer.target.register_forward_hook(lambda *arguments: calls.append(1))
    trainer.target.get_decoder().register_forward_hook(lambda *arguments: calls.append(1))
    trainer.compute_loss(trainer.model, collate([trainer.train_dataset[i] for i in range(4)]))
    assert not calls


def test_total_variation_brings_the_laws_together(tmp_path: Path) -> None:
    drafter = make_drafter()
    trainer = make_trainer(tmp_path, drafter, max_steps=40, save_steps=1000, loss_weights={"tv": 1.0, "kl": 0.1})
    batch = collate([trainer.train_dataset[i] for i in range(16)])

    def distance() -> float:
        drafter.eval()
        with torch.no_grad():
            return float(trainer.compute_loss(drafter, batch))

    first = distance()
    trainer.train()
    assert distance() < 0.95 * first


def test_evaluation_decodes_with_the_real_loop(tmp_path: Path) -> None:
    """What is logged is what a user would see on the same prompts."""
    drafter, prompts = make_drafter([0, 2]), [[1, 5, 9, 4], [7, 7, 3], [2, 8]]
    trainer = make_trainer(tmp_path, drafter, eval_tokens=20)
    trainer.eval_prompts, trainer.eval_dataset = prompts, SequenceDataset(make_sequences(6, seed=3), 24)
    metrics = trainer.evaluate()
    stats = [
        hf_specdiff.generate(
            trainer.target,
            torch.tensor([ids]),
            assistant_model=drafter,
            do_sample=False,
            max_new_tokens=20,
            draft_shape="chain",
            return_dict_in_generate=True,
        ).speculation
        for ids in prompts
    ]
    rounds = [pair for each in stats for pair in zip(each.num_accepted, each.num_drafted, strict=True)]
    accepted = [count for (count,), (drafted,) in rounds if drafted]
    assert metrics["eval_tokens_per_round"] == pytest.approx(1 + sum(accepted) / len(accepted))
    assert metrics["eval_acceptance_1"] == pytest.approx(sum(count >= 1 for count in accepted) / len(accepted))
    assert len([name for name in metrics if name.startswith("eval_acceptance_")]) == 5
    assert metrics["eval_loss"] > 0
    assert 0 <= metrics["eval_calibration_error"] <= 1
    assert trainer.state.log_history[-1]["eval_tokens_per_round"] == metrics["eval_tokens_per_round"]


def test_sampled_evaluation_leaves_the_generators_alone() -> None:
    target, drafter = make_target(), make_drafter()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    streaks = [decode_held_out(target, drafter, [[5, 6]], 20, temperature=1.0, seed=seed).tokens_per_round for seed in (0, 0)]
    assert torch.equal(torch.rand(2), expected)
    assert streaks[0] == streaks[1]
    assert drafter.training is False


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.25, 0.25])
    is_right = torch.tensor([True, True, False, False, True, False])
    assert calibration_error(confidence, is_right) == pytest.approx((4 * 0.45 + 2 * 0.25) / 6)
    assert calibration_error(torch.tensor([]), torch.tensor([], dtype=torch.bool)) == 0.0


@pytest.mark.usefixtures("with_pictures")
def test_the_drafter_with_the_most_tokens_per_round_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is made to like the second evaluation best; its weights must be what is saved."""
    rates = iter([1.0, 3.0, 2.0, 2.0])
    weights: list[torch.Tensor] = []

    def judge(self: SpecDiffTrainer) -> dict[str, float]:
        weights.append(self.model.norm.weight.detach().clone())
        return {"tokens_per_round": next(rates), "acceptance_1": 0.5}

    monkeypatch.setattr(SpecDiffTrainer, "evaluate_decoding", judge)
    plan = TrainingPlan(
        None, num_layers=1, block_size=4, num_epochs=3, batch_size=8, bf16=False, save_steps=3, learning_rate=1e-2
    )
    held_out = HeldOut([[5, 6]], make_sequences(4, seed=9))
    assert fit_drafter(make_target(), make_sequences(), tmp_path, plan, mask_token_id=MASK_TOKEN_ID, held_out=held_out)
    assert len(weights) == 4  # at the start, after steps 3 and 6, and at the end, step 9
    saved = SpecDiffDrafter.from_pretrained(tmp_path)
    assert torch.equal(saved.norm.weight, weights[1])
    assert not torch.equal(saved.norm.weight, weights[3])
    assert {"curves.png", "acceptance.png"} <= {path.name for path in tmp_path.iterdir()}


def test_training_stops_early_when_nothing_gets_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpecDiffTrainer, "evaluate_decoding", lambda self: {"tokens_per_round": 1.0, "acceptance_1": 0.5})
    plan = TrainingPlan(None, num_layers=1, block_size=4, num_epochs=30, batch_size=8, bf16=False, save_steps=2, patience=2)
    held_out = HeldOut([[5, 6]], make_sequences(4, seed=9))
    fit_drafter(make_target(), make_sequences(), tmp_path, plan, mask_token_id=MASK_TOKEN_ID, held_out=held_out)
    last = last_whole_checkpoint(tmp_path / "work" / "checkpoints")
    assert last is not None
    assert int(last.rsplit("-", 1)[1]) < 20


def test_what_has_one_prompt_is_held_out_together() -> None:
    """Each prompt occurs twice, with other answers; prompts 0 to 4 leave no room for a window and are never chosen."""
    prompts = [[number + 3, 5, 6] + [7] * (9 if number < 5 else 0) for number in range(30)]
    lists = [prompt + answer for answer in ([8, 9, 10], [11, 12, 13]) for prompt in prompts]
    sequences = Sequences.from_lists(lists, [len(prompt) for prompt in prompts] * 2)
    seen, apart = hold_out(sequences, 12, 32, seed=0)
    assert apart is not None
    assert len(apart) == 6  # a tenth of the 30 prompts, twice
    assert not set(seen.groups.tolist()) & set(apart.groups.tolist())
    assert len(seen) == 54
    held_out = HeldOut.of(apart, 12)
    assert sorted(held_out.prompts) == sorted({tuple(apart.ids(row)[:3]): apart.ids(row)[:3] for row in range(6)}.values())
    assert hold_out(sequences, 12, 0, seed=0)[1] is None
    assert hold_out(sequences, 12, 32, seed=1)[1].digest() != apart.digest()
    for seed in range(20):
        assert not set(hold_out(sequences, 12, 32, seed)[1].groups.tolist()) & set(sequences.groups[:5].tolist())


def test_windows_stand_on_answers_and_end_with_them() -> None:
    """A chat of two answers: tokens 20 and up are the first answer's, 40 and up the second's, the others were not written."""
    ids = [3, 4, 5, 20, 21, 22, 6, 7, 40, 41, 42, 43, 8]
    masks = [[token >= 20 for token in ids]]
    sequences = Sequences.from_masks([ids], masks, [0])
    batch = collate([SequenceDataset(sequences, 32)[0]])
    windows = sample_windows(batch, 64, 6, MASK_TOKEN_ID, torch.Generator().manual_seed(0))
    anchors = windows.anchors[0].tolist()
    assert set(anchors) == {3, 4, 8, 9, 10}  # an anchor needs a token of its answer behind it
    behind = {3: [21, 22], 4: [22], 8: [41, 42, 43], 9: [42, 43], 10: [43]}
    for anchor, labels in zip(anchors, windows.labels.tolist(), strict=True):
        assert labels == behind[anchor] + [-100] * (5 - len(behind[anchor]))
    assert sequences.prompt(0, 32) == ids[:8]
    assert sequences.prompt(0, 6) == ids[:3]
    assert not sequences.usable(4).any()


def train_in_one_of_two(rank: int, folder: Path, port: int) -> None:
    """Run in a process of its own, with the environment that `accelerate launch` gives to each of several."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    sizes = {"num_layers": 1, "block_size": 4, "num_epochs": 2, "batch_size": 4, "save_steps": 2, "eval_tokens": 12}
    plan = TrainingPlan([0, 2], bf16=False, **sizes)
    held_out = HeldOut([[5, 6], [7, 8, 9], [4, 3]], make_sequences(5, seed=9))
    assert processes().num_processes == 2
    assert fit_drafter(make_target(), make_sequences(), folder, plan, mask_token_id=MASK_TOKEN_ID, held_out=held_out)


def test_two_processes_train_one_drafter(tmp_path: Path) -> None:
    output = tmp_path / "drafter"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Both are forked from a process that has imported everything and run nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    both = [context.Process(target=train_in_one_of_two, args=(rank, output, port)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=240)
    assert [process.exitcode for process in both] == [0, 0]
    drafter = SpecDiffDrafter.from_pretrained(output)
    assert drafter.config.block_size == 4
    checkpoint = last_whole_checkpoint(output / "work" / "checkpoints")
    assert checkpoint is not None
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    assert state["global_step"] == 6  # 24 sequences, two epochs, two processes with four each
    best = max(entry["eval_tokens_per_round"] for entry in state["log_history"] if "eval_tokens_per_round" in entry)
    alone = decode_held_out(make_target(), drafter, [[5, 6], [7, 8, 9], [4, 3]], 12)
    assert alone.tokens_per_round == pytest.approx(best, rel=1e-5)  # each decoded its share; the sum is one process's


def test_chats_are_prompts_up_to_the_answer(tmp_path: Path) -> None:
    tokenizer = hf_specdiff.load_demo()[2]
    file = tmp_path / "chats.jsonl"
    ask, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in ([ask], [ask, answer], [ask, answer, ask])))
    chats = read_prompts(file)
    assert chats == [[ask], [ask], [ask, answer, ask]]
    with pytest.raises(ValueError, match="without a chat template"):
        encode(tokenizer, chats[0])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    text = tokenizer.decode(encode(tokenizer, chats[2]))
    assert text.endswith("<user>2 + 2?\n<assistant>4\n<user>2 + 2?\n<a>")
    file.write_text(json.dumps({"messages": [{"role": "user"}]}) + "\n")
    with pytest.raises(ValueError, match="'messages' with a 'role' and a 'content'"):
        read_prompts(file)
