"""A drafter's card on the Hub: what it is, how to use it, and what was measured of it.

Knows the configuration's and a results file's fields. Every figure comes from such a file; without one the card says "not
measured".
"""

from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub import ModelCard
from huggingface_hub import ModelCardData

from hf_specdiff.core.checks import is_language_model
from hf_specdiff.core.repository import is_repository

NOT_STATED = "not stated"
# In every card of ours: who wants to keep their own words takes it out.
MARK = "<!-- Written by hf_specdiff, and written anew with the drafter unless this line is gone. -->"
TAGS = ["speculative-decoding", "diffusion", "diffusion-language-model", "custom_generate", "specdiff"]
# What a row of a results file must tell.
MEASURES = ("tokens_per_second", "ratio_to_plain", "tokens_per_round", "num_identical", "num_prompts")
ROW_FIELDS = ("task", "method", "temperature", "batch_size", *MEASURES)

TEMPLATE = """---
{{ card_data }}
---

{{ mark }}

# {{ name }}

A discrete-diffusion **drafter** for {{ target }}: it makes the target's `generate` several times faster and leaves what it
generates as it is, the same tokens when greedy (in float32) and the same distribution when sampling. It proposes
{{ gamma }} tokens in one parallel pass; the target checks them in one pass. {{ alone }}

| | |
|---|---|
| target | {{ target }} |
| revision of the target | {{ revision }} |
| conditioned on | {{ conditioning }} |
| block size | {{ block_size }} (one anchor and {{ gamma }} drafted tokens) |
| parameters | {{ parameters }} |
| trained on | {{ data }} |
| objective | {{ objective }} |
| licence | {{ license_text }} |

## How to use it

{% if is_language_model -%}
With the package `hf_specdiff` installed; no remote code is run:

```python
import hf_specdiff
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{{ target_id }}")
target = AutoModelForCausalLM.from_pretrained("{{ target_id }}", device_map="auto")
drafter = hf_specdiff.load_drafter("{{ repo_id }}", target=target).to(target.device)
inputs = tokenizer("Once upon a time", return_tensors="pt").to(target.device)
hf_specdiff.generate(target, **inputs, assistant_model=drafter)
```

`hf_specdiff.attach(target)` lets everything that calls the target's own `generate` do the same, pipelines among them. `gamma`,
`draft_shape`, `acceptance` and the other arguments of speculation are keyword arguments of `generate`; this repository's
`generation_config.json` holds the drafter's own defaults{{ defaults }}.
{%- else -%}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{{ target_id }}")
target = AutoModelForCausalLM.from_pretrained("{{ target_id }}", device_map="auto")
drafter = AutoModelForCausalLM.from_pretrained("{{ repo_id }}", trust_remote_code=True).to(target.device)
inputs = tokenizer("Once upon a time", return_tensors="pt").to(target.device)
```

1. {{ way_1 }}

2. **With nothing but transformers**, the full loop from this repository (read its code first, then trust it):

   ```python
   target.generate(**inputs, assistant_model=drafter, custom_generate="{{ repo_id }}", trust_remote_code=True)
   ```

3. **With the package `hf_specdiff` installed**, no remote code:

   ```python
   import hf_specdiff

   drafter = AutoModelForCausalLM.from_pretrained("{{ repo_id }}").to(target.device)
   hf_specdiff.generate(target, **inputs, assistant_model=drafter)
   ```

4. **In everything that calls the target's `generate`**, pipelines among them:

   ```python
   from transformers import pipeline

   hf_specdiff.attach(target)
   pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=drafter)
   ```

`gamma`, `draft_shape`, `tree_budget`, `acceptance` and the other arguments of speculation are keyword arguments of ways 2 to 4;
this repository's `generation_config.json` holds the drafter's own defaults{{ defaults }}.
{%- endif %}

## Measured

{% if rows -%}
Ratios are to the target's plain `generate` in the same process, prompts interleaved. Conditions: {{ conditions }}.
Measured by `{{ command }}`.

| task | temperature | batch | method | ratio to plain | tokens per round | tokens/s | identical to plain |
|---|---|---|---|---|---|---|---|
{% for row in rows -%}
{{ row }}
{% endfor %}
Tokens per round counts the target's own token; plain decoding has one per round.
{%- else -%}
Not measured. `hf-specdiff doctor TARGET DRAFTER --output results.json` measures, and `hf-specdiff publish --results
results.json` puts the figures here.
{%- endif %}

## Limits

- It fits the target it was made for, and no other. How much it brings depends on the text: what is easy to foresee gains
  most.
- In bfloat16 two logits can be so close that the shape of a pass decides which is larger. Then any speculative decoder may
  write another token than plain decoding, as any change of the batch size may.
- Encoder-decoder models are refused, beams too. Models with a running state take chains.

## Sources

```bibtex
@article{christopher2024specdiff,
  title = {Speculative Diffusion Decoding: Accelerating Language Generation through Diffusion},
  author = {Christopher, Jacob K. and Bartoldson, Brian R. and Ben-Nun, Tal and Cardei, Michael and
            Kailkhura, Bhavya and Fioretto, Ferdinando},
  journal = {arXiv preprint arXiv:2408.05636},
  year = {2024}
}
@article{sandler2025specdiff2,
  title = {SpecDiff-2: Scaling Diffusion Drafter Alignment For Faster Speculative Decoding},
  author = {Sandler, Jameson and Christopher, Jacob K. and Hartvigsen, Thomas and Fioretto, Ferdinando},
  journal = {arXiv preprint arXiv:2511.00606},
  year = {2025}
}
```
"""

WAY_1 = """**In transformers' own loop**:

   ```python
   target.generate(**inputs, assistant_model=drafter)
   ```
"""
ALONE = "Alone it is no language model."
LANGUAGE_MODEL = "It is a masked diffusion language model, aligned with that target."
NO_WAY_1 = (
    "**In transformers' own loop**: not this drafter, which reads the target's hidden states; that loop never shows them."
)


def drafter_card(
    config: Any,
    num_parameters: int,
    *,
    repo_id: str | None = None,
    results: dict[str, Any] | None = None,
    license_name: str | None = None,
    defaults: dict[str, Any] | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """Write a drafter's card.

    Args:
        config (`SpecDiffConfig`): what the drafter is and how it was made.
        num_parameters (`int`): of the drafter alone.
        repo_id (`str`, *optional*): where the drafter will be found; by default a placeholder.
        results (`dict`, *optional*): what was measured: "conditions" (with "command") and "rows", as `hf-specdiff doctor
            --output` writes them.
        license_name (`str`, *optional*): the Hub's name of a licence.
        defaults (`dict`, *optional*): the drafter's own arguments of speculation.
        tags (`list[str]`, *optional*): more tags.

    Returns:
        `huggingface_hub.ModelCard`: metadata and text.

    Raises:
        ValueError: if `results` is no such record.
    """
    rows = [] if results is None else check_results(results)["rows"]
    target_id = config.target_model if is_repository(config.target_model) else None
    repo_id = repo_id or "your-name/your-drafter"
    training = config.training or {}
    is_own_kind = not is_language_model(config)
    own_tags = [tag for tag in TAGS if is_own_kind or tag != "custom_generate"]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license_name,
        base_model=target_id,
        tags=[*own_tags, *(tag for tag in tags or [] if tag not in TAGS)],
        model_name=repo_id.split("/")[-1],
        eval_results=[result for row in rows for result in _eval_results(row)] or None,
    )
    conditions = {} if results is None else results["conditions"]
    template_values = {
        "mark": MARK,
        "is_language_model": not is_own_kind,
        "alone": ALONE if is_own_kind else LANGUAGE_MODEL,
        "name": repo_id.split("/")[-1],
        "repo_id": repo_id,
        "target": f"[{target_id}](https://huggingface.co/{target_id})"
        if target_id
        else f"`{config.target_model or NOT_STATED}`",
        "target_id": target_id or "org/target",
        "revision": config.target_revision or NOT_STATED,
        "conditioning": _conditioning(config),
        "block_size": config.block_size,
        "gamma": config.max_gamma,
        "parameters": f"{num_parameters:,}",
        "data": training.get("data", NOT_STATED),
        "objective": training.get("objective", NOT_STATED),
        "license_text": license_name or NOT_STATED,
        "way_1": NO_WAY_1 if config.target_layer_ids is not None else WAY_1.strip(),
        "defaults": f" ({', '.join(f'`{name}={value!r}`' for name, value in defaults.items())})" if defaults else "",
        "rows": [_shown(row) for row in rows],
        "conditions": ", ".join(f"{name} {value}" for name, value in conditions.items() if name != "command"),
        "command": conditions.get("command"),
    }
    return ModelCard.from_template(card_data, template_str=TEMPLATE, **template_values)


def check_results(results: Any) -> dict[str, Any]:
    """Refuse what is no record of a measurement.

    Args:
        results (`dict`): "conditions", a dictionary with a "command", and "rows", a list of dictionaries.

    Returns:
        `dict`: the same object.

    Raises:
        ValueError: if a part is missing.
    """
    conditions = results.get("conditions") if isinstance(results, dict) else None
    rows = results.get("rows") if isinstance(results, dict) else None
    if not isinstance(conditions, dict) or "command" not in conditions or not isinstance(rows, list) or not rows:
        raise ValueError(
            "`results` must have 'conditions' with the 'command' that measured and a list of 'rows', got a file without. "
            "`hf-specdiff doctor TARGET DRAFTER --output FILE` writes one."
        )
    for row in rows:
        missing = [name for name in ROW_FIELDS if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"`results` must have {', '.join(missing)} in every row, got {str(row)[:60]!r}.")
        strange = [name for name in ("temperature", "batch_size", *MEASURES) if not isinstance(row[name], int | float)]
        if strange:
            raise ValueError(f"`results` must hold numbers, got {strange[0]!r} {row[strange[0]]!r} in {str(row)[:60]!r}.")
    return results


def _conditioning(config: Any) -> str:
    if config.target_layer_ids is None:
        return "the text alone (embedding and head of its own)"
    layers = ", ".join(str(layer) for layer in config.target_layer_ids)
    reads = f"the target's hidden states (outputs of layers {layers}); embedding and head are the target's"
    kind, rank = config.markov_head_type, config.markov_rank
    return f"{reads}; a {kind} head of rank {rank} knows the token before" if rank else reads


def _shown(row: dict[str, Any]) -> str:
    """Return a row as a line of the card's table."""
    identical = f"{row['num_identical']}/{row['num_prompts']}" if row["temperature"] == 0 else "by law"
    return (
        f"| {row['task']} | {row['temperature']:g} | {row['batch_size']} | {row['method']} | {row['ratio_to_plain']:.2f}x "
        f"| {row['tokens_per_round']:.2f} | {row['tokens_per_second']:.0f} | {identical} |"
    )


def _eval_results(row: dict[str, Any]) -> list[EvalResult]:
    """Return a row as entries of the card's `model-index`."""
    conditions = f"{row['method']}, temperature {row['temperature']:g}, batch {row['batch_size']}"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=f"{row['task']} prompts",
            dataset_name=f"{row['task']} prompts",
            dataset_config=conditions,  # entries with the same are merged
            metric_type=metric,
            metric_name=label,
            metric_value=round(row[metric], 2),
        )
        for metric, label in (("tokens_per_round", "tokens per round"), ("ratio_to_plain", "speed against plain generate"))
    ]
