"""What somebody types who found a target and its drafters on the Hub: run by test_users.py in a process of its own.

Usage: python hub_user.py FOLDER [package] [short]. Without "package", `hf_specdiff` cannot be imported; with "short" each
drafter writes once, the shortest way. What came out goes to FOLDER/found.json.
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class NotInstalled(MetaPathFinder):
    """Make the package as good as not installed."""

    def find_spec(self, name: str, *arguments: Any) -> None:
        if name.split(".")[0] == "hf_specdiff":
            raise ModuleNotFoundError(f"No module named {name!r}")


FOLDER = sys.argv[1]
HAS_PACKAGE = "package" in sys.argv[2:]
IS_SHORT = "short" in sys.argv[2:]
if not HAS_PACKAGE:
    sys.meta_path.insert(0, NotInstalled())

# Only now: what these import must not find the package either.
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers import pipeline  # noqa: E402

PROMPT = "Nora has 12 apples and buys 30 more."
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}


def main() -> None:
    target = AutoModelForCausalLM.from_pretrained("org/target", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained("org/target")
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    found: dict[str, Any] = {"plain": target.generate(**inputs, **GREEDY).tolist()}
    if HAS_PACKAGE:
        import hf_specdiff

        trust: dict[str, Any] = {}
    else:
        trust = {"trust_remote_code": True}
        try:
            AutoModelForCausalLM.from_pretrained("org/tokens")
        except ValueError as error:
            found["without trust"] = str(error)
    for kind in ("tokens", "features"):
        repository = f"org/{kind}"
        drafter = AutoModelForCausalLM.from_pretrained(repository, dtype="float32", **trust)
        found[f"{kind} class"] = type(drafter).__module__
        if kind == "tokens":
            found["tokens way 1"] = target.generate(**inputs, assistant_model=drafter, **GREEDY).tolist()
        from_hub = {"assistant_model": drafter, "custom_generate": repository, "trust_remote_code": True}
        output = target.generate(**inputs, **from_hub, return_dict_in_generate=True, **GREEDY)
        found[f"{kind} way 2"] = output.sequences.tolist()
        found[f"{kind} tokens per round"] = output.speculation.tokens_per_round
        if HAS_PACKAGE:
            found[f"{kind} way 3"] = hf_specdiff.generate(target, **inputs, assistant_model=drafter, **GREEDY).tolist()
            hf_specdiff.attach(target)
            found[f"{kind} way 4"] = target.generate(**inputs, assistant_model=drafter, **GREEDY).tolist()
            hf_specdiff.detach(target)
        elif not IS_SHORT:
            batch = tokenizer([PROMPT, "Two and two"], return_tensors="pt", padding=True, return_token_type_ids=False)
            found[f"{kind} batch"] = target.generate(**batch, **from_hub, **GREEDY).tolist()
            found["plain batch"] = target.generate(**batch, **GREEDY).tolist()
            # The strategy as a function, which every caller of `generate` can be given.
            strategy = target.load_custom_generate(repository, trust_remote_code=True)
            found[f"{kind} function"] = strategy(model=target, **inputs, assistant_model=drafter, **GREEDY).tolist()
            drafter.save_pretrained(f"{FOLDER}/{kind}")
    if not HAS_PACKAGE and not IS_SHORT:
        drafter = AutoModelForCausalLM.from_pretrained("org/tokens", dtype="float32", **trust)
        write = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=drafter)
        found["pipeline"] = write(PROMPT, **GREEDY)[0]["generated_text"]
        plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
        found["plain text"] = plain(PROMPT, **GREEDY)[0]["generated_text"]
    Path(FOLDER, "found.json").write_text(json.dumps(found))


main()
