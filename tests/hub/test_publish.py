"""Publishing: figures and defaults, one commit or none, and what is refused before it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub import ModelCard

from hf_specdiff import DiffusionDrafter
from hf_specdiff import SpecDiffDrafter
from hf_specdiff import load_demo
from hf_specdiff import load_drafter
from hf_specdiff.commands import main as cli
from hf_specdiff.core.speculation import SPECULATION_ARGUMENTS
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.hub import publish as hub
from hf_specdiff.training.language_models import add_adapter
from tests.conftest import make_drafter
from tests.diffusion.test_trials import make_body

from .hub_server import Hub

# The Hub's client and its HTTP library disagree about an argument.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RESULTS = {
    "conditions": {"torch": "2.13.0", "command": "hf-specdiff doctor TARGET DRAFTER"},
    "rows": [
        {
            "task": task,
            "method": method,
            "temperature": 0.0,
            "batch_size": 1,
            "arguments": arguments,
            "tokens_per_second": 123.4,
            "ratio_to_plain": ratio,
            "tokens_per_round": rate,
            "num_identical": 8,
            "num_prompts": 8,
        }
        for task, method, arguments, ratio, rate in (
            ("math", "plain generate", {}, 1.0, 1.0),
            ("math", "chain", {"draft_shape": "chain"}, 4.567, 8.9),
            ("math", "tree of 16", {"draft_shape": "tree", "tree_budget": 16}, 4.4, 9.9),
            ("code", "chain", {"draft_shape": "chain"}, 1.5, 3.1),
            ("code", "tree of 16", {"draft_shape": "tree", "tree_budget": 16}, 1.9, 4.1),
        )
    ],
}


@pytest.fixture(scope="module")
def tokens_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled token-conditioned drafter as its owner has it on disk."""
    folder = tmp_path_factory.mktemp("trained") / "tokens"
    SpecDiffDrafter.from_pretrained(PAIR / "tokens").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def repository(tokens_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub.Staged]:
    results = tmp_path_factory.mktemp("figures") / "figures.json"
    results.write_text(json.dumps(RESULTS))
    settings: dict[str, Any] = {"target": str(PAIR / "target"), "results": results, "license_name": "apache-2.0"}
    with hub.staged(tokens_folder, "org/tokens", **settings) as ready:
        yield ready


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the self-check, which `repository` went through and other tests are about."""
    monkeypatch.setattr(hub, "self_check", lambda *arguments: 1.0)


def publish(repository: hub.Staged, repo_id: str, token: str = "hf_writer", **settings: Any) -> hub.Published:
    return hub.publish(repository, repo_id, token=token, report=lambda text: None, **{"private": False, **settings})


def test_the_card_shows_the_results_files_figures_and_no_others(repository: hub.Staged) -> None:
    card = ModelCard.load(repository.folder / "README.md")
    assert "| math | 0 | 1 | chain | 4.57x | 8.90 | 123 | 8/8 |" in card.text
    assert "Measured by `hf-specdiff doctor TARGET DRAFTER`" in card.text
    metrics = {
        (result.dataset_name, result.dataset_config, result.metric_type): result.metric_value
        for result in card.data.eval_results
    }
    assert metrics["math prompts", "chain, temperature 0, batch 1", "ratio_to_plain"] == 4.57
    assert len(metrics) == 2 * len(RESULTS["rows"])
    assert card.data.license == "apache-2.0"
    assert {"speculative-decoding", "diffusion", "custom_generate"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert json.loads((repository.folder / "results.json").read_text()) == RESULTS


def test_the_fastest_measured_method_becomes_the_default() -> None:
    assert hub.tuned_defaults(RESULTS) == {"draft_shape": "tree", "tree_budget": 16}
    slower_tree = [{**row, "ratio_to_plain": 1.0} if row["method"] == "tree of 16" else row for row in RESULTS["rows"]]
    assert hub.tuned_defaults({**RESULTS, "rows": slower_tree}) == {"draft_shape": "chain"}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("own", "written"), [({}, {"draft_shape": "tree", "tree_budget": 16}), ({"gamma": 3}, {"gamma": 3})], ids=["none", "own"]
)
def test_a_drafter_without_defaults_gets_the_measured_ones_and_others_keep_theirs(
    own: dict[str, Any], written: dict[str, Any], tmp_path: Path
) -> None:
    drafter = SpecDiffDrafter.from_pretrained(PAIR / "tokens")
    for name in SPECULATION_ARGUMENTS:
        setattr(drafter.generation_config, name, own.get(name))
    drafter.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "results.json").write_text(json.dumps(RESULTS))
    with hub.staged(tmp_path / "mine", "org/x", target=str(PAIR / "target")) as ready:
        defaults = json.loads((ready.folder / "generation_config.json").read_text())
    assert {name: defaults[name] for name in SPECULATION_ARGUMENTS if defaults.get(name) is not None} == written


NO_NUMBER = {**RESULTS, "rows": [{**RESULTS["rows"][0], "ratio_to_plain": None}]}


@pytest.mark.parametrize(
    "broken", [NO_NUMBER, {}, {"conditions": {}, "rows": [1]}, {"conditions": {"command": "x"}, "rows": [{}]}, [1]]
)
def test_figures_of_no_known_form_are_refused(broken: Any, tokens_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="`results` must"), hub.staged(tokens_folder, "org/x", results=file):
        pass


def test_publishing_again_commits_only_what_changed(hub_here: Hub, repository: hub.Staged) -> None:
    first = publish(repository, "org/again")
    assert (first.tag, publish(repository, "org/again")) == ("v1", hub.Published("org/again", first.commit, "v1"))
    readme = repository.folder / "README.md"
    text = readme.read_text()
    stale = HfApi(token="hf_writer").upload_file(
        path_or_fileobj=b"old", path_in_repo="custom_generate/forgotten.py", repo_id="org/again"
    )
    try:
        readme.write_text(text + "\nOne more line.\n")
        uploads = len([line for line in hub_here.log if line.startswith("PUT")])
        second = publish(repository, "org/again")
    finally:
        readme.write_text(text)
    assert second.tag == "v2"
    assert second.commit != stale.oid
    assert "custom_generate/forgotten.py" not in hub_here.files("org/again")
    assert hub_here.load("org/again")["tags"] == {"v1": first.commit, "v2": second.commit}
    assert len([line for line in hub_here.log if line.startswith("PUT")]) == uploads


@pytest.mark.parametrize(
    ("step", "kind"), [("PUT /lfs", "drop"), ("POST .*/commit/", "drop"), ("POST .*/commit/", "drop after")]
)
def test_a_connection_that_breaks_once_is_tried_again(hub_here: Hub, repository: hub.Staged, step: str, kind: str) -> None:
    name = f"org/once-{step[:3]}-{kind.replace(' ', '-')}"
    hub_here.fail(step, kind)
    assert publish(repository, name).tag == "v1"
    assert [commit["title"] for commit in hub_here.commits(name)] == ["initial commit", "Publish drafter"]


def test_a_connection_that_stays_broken_leaves_no_commit_and_the_next_call_goes_on(
    hub_here: Hub, repository: hub.Staged
) -> None:
    hub_here.fail("POST .*/commit/", "drop", times=99)
    with pytest.raises(ConnectionError, match="goes on where this one stopped"):
        publish(repository, "org/broken")
    assert len(hub_here.commits("org/broken")) == 1  # the empty one that a repository starts with
    hub_here.faults.clear()
    uploads = len([line for line in hub_here.log if line.startswith("PUT")])
    assert publish(repository, "org/broken").tag == "v1"
    assert len([line for line in hub_here.log if line.startswith("PUT")]) == uploads  # the weights had arrived
    assert set(hub_here.files("org/broken")) == {name for name, _ in repository.files}


def test_a_public_repository_is_not_taken_for_a_private_one(hub_here: Hub, repository: hub.Staged) -> None:
    publish(repository, "org/public")
    with pytest.raises(ValueError, match="there already and public"):
        publish(repository, "org/public", private=True)


@pytest.mark.usefixtures("unchecked")
def test_paths_of_this_machine_are_not_published(tmp_path: Path) -> None:
    drafter = SpecDiffDrafter.from_pretrained(PAIR / "tokens")
    drafter.config.target_model = str(PAIR / "target")
    drafter.save_pretrained(tmp_path)
    with hub.staged(tmp_path, "org/x") as ready:
        assert json.loads((ready.folder / "config.json").read_text())["target_model"] is None
        assert str(PAIR) not in (ready.folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "results.json"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, tokens_folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a key")
    folder = tmp_path / "drafter"
    shutil.copytree(tokens_folder, folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"`path` must hold its own {name}"), hub.staged(folder, "org/x"):
        pytest.fail("it was staged")


@pytest.mark.usefixtures("unchecked")
def test_a_link_within_the_folder_is_the_owners_own_card(tokens_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    shutil.copytree(tokens_folder, folder)
    (folder / "README.md").unlink()
    (folder / "card.md").write_text("My own words.")
    (folder / "README.md").symlink_to("card.md")
    with hub.staged(folder, "org/x", target=str(PAIR / "target")) as ready:
        assert (ready.folder / "README.md").read_text() == "My own words."


@pytest.mark.usefixtures("unchecked")
def test_notes_in_the_configurations_are_not_published(tmp_path: Path) -> None:
    drafter = SpecDiffDrafter.from_pretrained(PAIR / "tokens")
    drafter.generation_config.gamma = 3
    drafter.generation_config.note_to_self = "secret-1"
    drafter.config.api_key = "secret-2"
    drafter.config.training = {"data": "100 sequences", "machine": "secret-3", "objective": "ce", "log": ["secret-4"]}
    drafter.save_pretrained(tmp_path)
    with hub.staged(tmp_path, "org/x", target=str(PAIR / "target")) as ready:
        texts = [file.read_text() for file in ready.folder.rglob("*.json")] + [(ready.folder / "README.md").read_text()]
        assert not any("secret-" in text for text in texts)
        assert json.loads((ready.folder / "config.json").read_text())["training"] == {
            "data": "100 sequences",
            "objective": "ce",
        }
        assert json.loads((ready.folder / "generation_config.json").read_text())["gamma"] == 3


def test_no_token_and_a_read_only_token_are_refused_before_any_work(hub_here: Hub) -> None:
    with pytest.raises(ValueError, match=r"got none\. Run `hf auth login`"):
        hub.check_token(None, "org/x")
    with pytest.raises(ValueError, match="read-only"):
        hub.check_token("hf_reader", "org/x")
    with pytest.raises(ValueError, match="`token` must be one that the Hub knows"):
        hub.check_token("hf_nobody", "org/x")
    hub.check_token("hf_writer", "org/x")


def test_a_namespace_without_write_access_is_refused(hub_here: Hub, repository: hub.Staged) -> None:
    with pytest.raises(ValueError, match="may write to, got 'org/theirs'"):
        publish(repository, "org/theirs", token="hf_stranger")
    assert hub_here.load("org/theirs") is None


def test_a_name_taken_by_something_else_is_refused(hub_here: Hub, repository: hub.Staged) -> None:
    api = HfApi(token="hf_writer")
    api.create_repo("org/a-model")
    api.upload_file(path_or_fileobj=b'{"model_type": "llama"}', path_in_repo="config.json", repo_id="org/a-model")
    with pytest.raises(ValueError, match="holds something else"):
        publish(repository, "org/a-model")
    assert set(hub_here.files("org/a-model")) == {"config.json"}


def test_an_unreachable_hub_is_a_connection_error(hub_here: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="broke off"):
        hub.check_token("hf_writer", "org/x")


def test_a_folder_without_a_drafter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without a config\.json"), hub.staged(tmp_path, "org/x"):
        pass
    with pytest.raises(ValueError, match="of type 'llama'"), hub.staged(PAIR / "target", "org/x"):
        pass
    make_drafter().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="must hold a whole drafter"), hub.staged(tmp_path / "a", "org/x"):
        pass


def test_a_drafter_without_its_target_or_for_another_one_is_refused(tmp_path: Path) -> None:
    make_drafter(vocab_size=5000).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass --target"), hub.staged(tmp_path, "org/x"):
        pass
    with pytest.raises(ValueError, match="`target` must be a model folder"), hub.staged(tmp_path, "org/x", target="/nowhere"):
        pass
    with (
        pytest.raises(ValueError, match=r"works with its target, got one that does not: .*vocabulary"),
        hub.staged(tmp_path, "org/x", target=str(PAIR / "target")),
    ):
        pass


def test_a_drafter_that_changes_greedy_tokens_is_not_published(
    tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the self-check looks at the tokens, so code that is not lossless fails it."""
    target = str(PAIR / "target")
    save = SpecDiffDrafter.save_pretrained

    def save_spoilt(self: Any, folder: Path, *arguments: Any, **settings: Any) -> None:
        save(self, folder, *arguments, **settings)
        entry = Path(folder) / "custom_generate" / "generate.py"
        entry.write_text(
            entry.read_text() + "\n_honest = generate\ndef generate(model, inputs=None, **kwargs):\n"
            "    output = _honest(model, inputs, **kwargs)\n    output.sequences[:, -1] += 1\n    return output\n"
        )

    monkeypatch.setattr(SpecDiffDrafter, "save_pretrained", save_spoilt)
    with pytest.raises(ValueError, match="leaves greedy tokens as they are"), hub.staged(tokens_folder, "org/x", target=target):
        pass


def test_dry_run_says_what_would_be_uploaded_and_uploads_nothing(
    hub_here: Hub, tokens_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = len(hub_here.log)
    arguments = ["publish", str(tokens_folder), "org/dry", "--target", str(PAIR / "target"), "--dry-run", "--private"]
    cli.app(arguments, standalone_mode=False)
    shown = capsys.readouterr().out
    assert "custom_generate/generate.py" in shown
    assert "org/dry (private)" in shown
    assert "nothing was uploaded" in shown
    assert len(hub_here.log) == calls


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [("429", ConnectionError, "broke off"), ("500", ConnectionError, "broke off"), ("400", ValueError, "takes")],
)
def test_what_the_hub_says_is_explained(hub_here: Hub, status: str, kind: type[Exception], words: str) -> None:
    hub_here.fail("whoami", status, times=9)
    with pytest.raises(kind, match=words):
        hub.check_token("hf_writer", "org/x")


def test_an_adapter_is_published_with_the_model_that_it_belongs_to(hub_here: Hub, tmp_path: Path) -> None:
    target, _, tokenizer = load_demo()
    mask = tokenizer.mask_token_id
    body = make_body(vocab_size=len(tokenizer))
    DiffusionDrafter(body, mask_token_id=mask, logit_offset=-1).save_pretrained(tmp_path / "base")
    turned = list(range(len(tokenizer)))[::-1]  # the same words under other ids
    drafter = load_drafter(tmp_path / "base", target=target, block_size=5, own_ids=turned)
    drafter.config.training = {"data": "12 sequences", "objective": "streak"}
    add_adapter(drafter, 2, None, 0)
    for name, weight in drafter.body.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    drafter.save_pretrained(tmp_path / "mine")
    with hub.staged(tmp_path / "mine", "org/aligned", target=str(PAIR / "target")) as ready:
        names = {name for name, _ in ready.files}
        assert {"model.safetensors", "own_ids.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
        assert not {name for name in names if "adapter" in name or name.endswith(".py")}
        assert str(tmp_path) not in (ready.folder / "config.json").read_text()
        card = (ready.folder / "README.md").read_text()
        assert 'hf_specdiff.load_drafter("org/aligned", target=target)' in card
        assert "| objective | streak |" in card
        assert "trust_remote_code" not in card
        assert "custom_generate" not in card
        published, ids = load_drafter(ready.folder, target=target), torch.arange(20, 29)[None]
        with torch.no_grad():
            torch.testing.assert_close(published(ids).logits, drafter.eval()(ids).logits, atol=1e-4, rtol=1e-4)
        first = publish(ready, "org/aligned")
        assert publish(ready, "org/aligned") == first


def test_a_language_model_that_is_no_drafter_of_ours_is_not_published(tmp_path: Path) -> None:
    make_body().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 'qwen2'"), hub.staged(tmp_path, "org/x"):
        pytest.fail("it was staged")
