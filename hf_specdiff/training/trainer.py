"""Training a drafter for a frozen target, on `transformers.Trainer`.

Letters: B batch, S sequence length, A windows per sequence, W block size, G = W - 1, V vocabulary, D hidden size.
"""

import os
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel
from transformers import Trainer
from transformers import TrainerControl
from transformers.trainer_utils import get_last_checkpoint

from hf_specdiff.core.conditioning import lent_head
from hf_specdiff.core.conditioning import raw_embeddings
from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.core.features import layer_output_indices
from hf_specdiff.core.features import target_features
from hf_specdiff.training.data import collate
from hf_specdiff.training.draft_vocabulary import labels_among
from hf_specdiff.training.evaluation import Streaks
from hf_specdiff.training.evaluation import calibration_error
from hf_specdiff.training.evaluation import decode_held_out
from hf_specdiff.training.feature_cache import features_of
from hf_specdiff.training.feature_cache import law_of
from hf_specdiff.training.footprint import Footprint
from hf_specdiff.training.heads import given_tokens_before
from hf_specdiff.training.language_models import window_logits
from hf_specdiff.training.losses import IGNORED
from hf_specdiff.training.losses import combined_loss
from hf_specdiff.training.losses import next_token_cross_entropy
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.windows import Windows
from hf_specdiff.training.windows import sample_windows
from hf_specdiff.training.windows import window_attention_mask


class SpecDiffTrainer(Trainer):
    """Train a drafter on sequences of its target.

    Each step cuts `num_anchors` random windows from every sequence, shows them all to the drafter in one pass under one mask,
    and asks for the tokens behind the masks. The windows of a step depend on nothing but the seed, the step and the sequences,
    so a resumed run sees the same ones.

    Args:
        target (`transformers.PreTrainedModel`): frozen; runs once per batch, for the features or the law that are wanted.
        plan (`TrainingPlan`): windows, objectives and evaluation; what the host's arguments know stands in `args` alone.
        eval_prompts (`list[list[int]]`, *optional*): token ids of held-out prompts; `evaluate` decodes them with the real loop.
        language_model (`DiffusionDrafter`, *optional*): the drafter, where `model` is its body.
        **kwargs: of `transformers.Trainer`: `model` (the drafter), `args`, `train_dataset`, `eval_dataset`, ...
    """

    def __init__(
        self,
        target: PreTrainedModel,
        plan: TrainingPlan,
        eval_prompts: list[list[int]] | None = None,
        language_model: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_collator=collate, **kwargs)
        self.args.remove_unused_columns = False  # batches carry more than the model's own arguments
        self.plan = plan
        self.language_model = None if language_model is None else language_model.to(self.args.device)
        self.target = target.eval().requires_grad_(False)
        self._head: Any = None  # the target's, as far as it is lent, from the first step on
        self.eval_prompts = eval_prompts or []
        self.footprint = Footprint(self.args.device)
        self.add_callback(self.footprint)

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Do a step but for the optimizer's part, and stop where it would spoil the weights; see `transformers.Trainer`.

        Raises:
            ValueError: if the loss or its gradient is no number, or infinite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Under a loss scale of its own the host leaves out steps whose gradient is infinite.
        gradients = [] if self.accelerator.scaler else [p.grad for p in model.parameters() if p.grad is not None]
        for name, value in (("loss", loss), ("gradient", torch.nn.utils.get_total_norm(gradients))):
            if not torch.isfinite(value):
                raise ValueError(self._what_is_left(f"a {name} of {float(value)}"))
        return loss

    def _what_is_left(self, what: str) -> str:
        """Return what to tell when the loss or its gradient is no number any more."""
        folder = self.args.output_dir
        checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        left = "There is no checkpoint yet" if checkpoint is None else f"The same command goes on from {checkpoint}"
        return (
            f"`loss` and its gradient must be finite, got {what} in step {self.state.global_step + 1}. {left}; if that step "
            f"fails again, lower `learning_rate`, now {self.args.learning_rate:g}, and train into a fresh folder."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what steps cost to a log of steps; see `transformers.Trainer.log`."""
        if "loss" in logs:
            logs |= self.footprint.since_last_log()
        elif "train_runtime" in logs:
            logs |= self.footprint.of_all_steps()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Decode the held-out prompts and look at the held-out sequences; see `transformers.Trainer.evaluate`.

        Args:
            eval_dataset (`torch.utils.data.Dataset`, *optional*): in place of the trainer's own.
            ignore_keys (`list[str]`, *optional*): takes no part.
            metric_key_prefix (`str`): of the names.

        Returns:
            `dict[str, float]`: `tokens_per_round` and `acceptance_1`, ..., `acceptance_G` of greedy chains in the real loop;
            `loss` and `calibration_error` on the held-out sequences, if there are any. Over several processes the prompts are
            shared out, and all get the same figures.
        """
        metrics: dict[str, float] = {}
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is not None:
            metrics |= self.evaluate_windows(dataset)
        if self.eval_prompts:
            metrics |= self.evaluate_decoding()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def evaluate_windows(self, dataset: Any) -> dict[str, float]:
        """Look at held-out sequences.

        Args:
            dataset (`torch.utils.data.Dataset`): the sequences.

        Returns:
            `dict[str, float]`: `loss`, and `calibration_error`: how far the drafter's confidence is from its accuracy.
        """
        was_training = self.model.training
        self.model.eval()
        losses, confidence, is_right = [], [], []
        for batch in self.get_eval_dataloader(dataset):
            loss, outputs = self.compute_loss(self.model, self._prepare_inputs(batch), return_outputs=True)
            has_label = outputs["labels"] != IGNORED
            best = outputs["log_probs"].max(dim=-1)
            losses.append(self.accelerator.gather(loss[None]))
            pair = torch.stack([best.values.exp()[has_label], (best.indices == outputs["labels"])[has_label].float()])
            pair = self.accelerator.gather(self.accelerator.pad_across_processes(pair, dim=1, pad_index=-1))
            pair = torch.cat(list(pair.view(-1, 2, pair.shape[-1])), dim=1)
            confidence.append(pair[0][pair[0] >= 0])
            is_right.append(pair[1][pair[0] >= 0] > 0)
        self.model.train(was_training)
        error = calibration_error(torch.cat(confidence), torch.cat(is_right))
        return {"loss": float(torch.cat(losses).mean()), "calibration_error": error}

    def evaluate_decoding(self) -> dict[str, float]:
        """Decode the held-out prompts, each process its share.

        Returns:
            `dict[str, float]`: `tokens_per_round` and `acceptance_1`, ..., `acceptance_G`, over all processes.
        """
        drafter = self.drafter_of(self.model)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = decode_held_out(self.target, drafter, self.eval_prompts[rank::world], self.plan.eval_tokens)
        streaks = Streaks(gather_object(own.num_drafted), gather_object(own.num_accepted), own.max_gamma)
        acceptance = {f"acceptance_{i}": share for i, share in enumerate(streaks.acceptance_per_position, 1)}
        return {"tokens_per_round": streaks.tokens_per_round, **acceptance}

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch; see `transformers.Trainer.compute_loss`."""
        config: SpecDiffConfig = self.drafter_of(model).config
        generator = torch.Generator().manual_seed(self._window_seed(inputs["indices"]))
        assert config.mask_token_id is not None  # a drafter without one cannot be trained
        shape = (self.plan.num_anchors, config.block_size, config.mask_token_id)
        windows = sample_windows(inputs, *shape, generator, config.max_gamma)
        # The host puts autocast around the model that it trains only; the target's pass is the larger part of a step.
        with self.accelerator.autocast():
            features, target_log_probs = self._run_target(config, inputs, windows)
            if config.is_feature_conditioned:
                logits, context_loss = self._feature_logits(model, config, features, windows), None
            elif self.language_model is not None:
                logits, context_loss = window_logits(self.language_model, model, inputs["input_ids"], windows), None
            else:
                logits, context_loss = self._token_logits(model, config, inputs, windows)
        log_probs = torch.log_softmax(logits.float(), dim=-1)  # (B * A, G, V or the drafted tokens)
        labels, drafted = windows.labels, self._drafted_ids(model)
        if drafted is not None:
            labels = labels_among(labels, drafted, config.vocab_size)
        loss = combined_loss(log_probs, labels, self.plan.loss_weights, self.plan.loss_decay, target_log_probs)
        if context_loss is not None:
            loss = loss + self.plan.context_weight * context_loss
        return (loss, {"log_probs": log_probs, "labels": labels}) if return_outputs else loss

    def drafter_of(self, model: Any) -> Any:
        """Return the drafter that a model, wrapped or not, is or is the body of."""
        return self.accelerator.unwrap_model(model) if self.language_model is None else self.language_model

    def _drafted_ids(self, model: Any) -> torch.Tensor | None:
        """Return the tokens that the drafter may write, `(n,)` int64; `None`: all."""
        ids: torch.Tensor | None = self.drafter_of(model).drafted_ids
        return ids

    def _window_seed(self, indices: torch.Tensor) -> int:
        step = self.state.global_step if self.model.training else 0
        return hash((self.args.seed, step, *indices.tolist())) % 2**63

    def _run_target(
        self, config: SpecDiffConfig, inputs: dict[str, torch.Tensor], windows: Windows
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Run the frozen target once, if anything of it is wanted that is not there yet.

        Returns:
            `tuple`: the features `(B, S, K * D)` that a drafter reads, and the target's log-probabilities `(B * A, G, V)` at
            the windows' positions, of a reduced vocabulary those of the tokens it has; each `None` if nobody asks for it.
        """
        layer_ids = config.target_layer_ids
        input_ids, cached = inputs["input_ids"], inputs.get("features")
        if not self.plan.needs_law and (layer_ids is None or cached is not None):
            return None if cached is None else cached.to(self.target.dtype), None
        # The state at the anchor tells the first drafted token's law, and so on.
        places = windows.anchors[:, :, None] + torch.arange(config.max_gamma, device=input_ids.device)
        places = places.clamp(max=input_ids.shape[1] - 1).flatten(1)  # (B, A * G)
        chosen = (torch.arange(len(input_ids), device=input_ids.device)[:, None], places)
        with torch.no_grad():
            if cached is not None and "states" in inputs:
                law = law_of(self._lent_head(), inputs["states"][chosen], inputs["log_normalizers"][chosen])
                return cached.to(self.target.dtype), law.unflatten(1, (-1, config.max_gamma)).flatten(0, 1)
            if layer_ids is not None and not self.plan.needs_law:
                return features_of(self.target, input_ids, layer_ids), None
            # Padding is on the right and attention causal, so the states of real tokens need no mask.
            indices = False if layer_ids is None else layer_output_indices(layer_ids)
            # The whole model where its law is wanted: what some do to the head's output is their own business.
            outputs = self.target(input_ids, use_cache=False, output_hidden_states=indices)
            features = None
            if layer_ids is not None:
                features = target_features(outputs.hidden_states, layer_ids, input_ids.shape[1])
            law = torch.log_softmax(outputs.logits[chosen].float(), dim=-1)  # (B, A * G, V)
            drafted = self._drafted_ids(self.model)
            law = law if drafted is None else law[..., drafted]
            return features, law.unflatten(1, (-1, config.max_gamma)).flatten(0, 1)

    def _lent_head(self) -> Any:
        """Return the part of the target's head that belongs to the drafted tokens."""
        if self._head is None:
            self._head = lent_head(self.target, self._drafted_ids(self.model))
        return self._head

    def _token_logits(
        self, model: Any, config: SpecDiffConfig, inputs: dict[str, torch.Tensor], windows: Windows
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits `(B * A, G, V)` of a token-conditioned drafter and the context's loss, if it has a weight.

        Sequence and windows go through the drafter in one pass.
        """
        input_ids = inputs["input_ids"]
        length, num_slots = input_ids.shape[1], windows.input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        learns_context = self.plan.context_weight > 0
        logits = model(
            input_ids=torch.cat([input_ids, windows.input_ids], dim=1),
            position_ids=torch.cat([positions, windows.position_ids], dim=1),
            attention_mask=window_attention_mask(windows.anchors, length, config.block_size, context_queries=True),
            logits_to_keep=0 if learns_context else num_slots,
        ).logits
        context_loss = next_token_cross_entropy(logits[:, :length], input_ids, inputs["lengths"]) if learns_context else None
        windows_logits = logits[:, -num_slots:].unflatten(1, (-1, config.block_size)).flatten(0, 1)[:, 1:]
        return windows_logits, context_loss

    def _feature_logits(
        self, model: Any, config: SpecDiffConfig, features: torch.Tensor | None, windows: Windows
    ) -> torch.Tensor:
        """Return the logits of a feature-conditioned drafter, whom the sequence reaches as target features.

        `(B * A, G, V)`, or of the drafted tokens alone, where they are not all: the head's other rows are never read.
        """
        assert features is not None
        num_rows, length, _ = features.shape
        network = self.accelerator.unwrap_model(model)
        noise = network.window_embeddings(windows.input_ids, partial(raw_embeddings, self.target))
        positions = torch.arange(length, device=features.device).expand(num_rows, -1)
        states = model(
            noise_embeds=noise,
            context_hidden_states=features,
            position_ids=torch.cat([positions, windows.position_ids], dim=1),
            attention_mask=window_attention_mask(windows.anchors, length, config.block_size, context_queries=False),
        ).last_hidden_state
        states = states.unflatten(1, (-1, config.block_size)).flatten(0, 1)[:, not config.predicts_from_anchor :]
        logits = network.drafted_logits(states, self._lent_head())
        return given_tokens_before(network, logits, states, windows.previous)
