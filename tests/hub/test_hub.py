"""Publishing, and using what was published: huggingface_hub's own client against a Hub on loopback."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import hf_specdiff
from hf_specdiff import SpecDiffConfig
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.commands import main as cli
from hf_specdiff.core.model_card import drafter_card
from hf_specdiff.core.repository import entry_files
from hf_specdiff.core.repository import explain_hub_error
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.hub import publish as hub
from tests.conftest import make_drafter
from tests.conftest import make_target

from .hub_server import Hub
from .hub_server import serve

# The Hub's client and its HTTP library disagree about an argument.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PACKAGE = Path(hf_specdiff.__file__).parent
USER = Path(__file__).with_name("hub_user.py")
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
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    state, http = serve(tmp_path_factory.mktemp("hub"))
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture
def hub_here(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Let this process talk to the server, with nobody logged in."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.faults.clear()
    return server


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


def publish(repository: hub.Staged, repo_id: str, token: str = "hf_writer", **settings: Any) -> hub.Published:
    return hub.publish(repository, repo_id, token=token, report=lambda text: None, **{"private": False, **settings})


# The whole way, in processes of their own: publish, then use it with and without the package, with and without a connection.


@pytest.fixture(scope="module")
def world(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Publish a target and both bundled drafters; return the environment of somebody who has never seen them."""
    home = tmp_path_factory.mktemp("home")
    common = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    common.pop("HF_HUB_OFFLINE", None)
    owner = {**common, "HF_HOME": str(home / "owner"), "HF_TOKEN": "hf_writer"}
    script = """
import sys
import hf_specdiff
from hf_specdiff.commands import main as cli

target, features, tokenizer = hf_specdiff.load_demo("features")
target.push_to_hub("org/target")
tokenizer.push_to_hub("org/target")
tokens = hf_specdiff.load_demo("tokens")[1]
for name, drafter in (("features", features), ("tokens", tokens)):
    drafter.config.target_model = "org/target"
    drafter.save_pretrained(sys.argv[1] + name)
    sys.argv[1:] = [sys.argv[1]]
    cli.app(["publish", sys.argv[1] + name, "org/" + name], standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", script, f"{home}/"], env=owner, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Self-check passed") == 2
    assert "Published org/tokens v1" in done.stdout
    return {**common, "HF_HOME": str(home / "user"), "HF_TOKEN": ""}


def use(environment: dict[str, str], folder: Path, *arguments: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(USER), str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def check_ways(found: dict[str, Any]) -> None:
    ways = [name for name in found if " way " in name or name.endswith(" function")]
    assert {"tokens way 1", "tokens way 2", "features way 2"} <= set(ways)
    for name in ways:
        assert found[name] == found["plain"], name
    for kind in ("tokens", "features"):
        assert found[f"{kind} batch"] == found["plain batch"]
        assert found[f"{kind} tokens per round"] > 1.5
    assert found["pipeline"] == found["plain text"]


def test_a_user_with_nothing_but_transformers(server: Hub, world: dict[str, str], tmp_path: Path) -> None:
    found = use(world, tmp_path)
    check_ways(found)
    assert "trust_remote_code=True" in found["without trust"]
    assert found["tokens class"].startswith("transformers_modules.org.tokens.")
    for kind in ("tokens", "features"):  # saved again without the package: a whole repository still
        saved = {str(path.relative_to(tmp_path / kind)) for path in (tmp_path / kind).rglob("*") if path.is_file()}
        extras = {"tokenizer.json", "tokenizer_config.json"}
        assert saved == set(server.files(f"org/{kind}")) - extras
    calls = len(server.log)
    check_ways(use({**world, "HF_HUB_OFFLINE": "1"}, tmp_path / "offline"))
    assert len(server.log) == calls


def test_a_user_with_the_package_needs_no_trust(world: dict[str, str], tmp_path: Path) -> None:
    found = use(world, tmp_path, "package")
    check_ways(found)
    assert {"tokens way 3", "tokens way 4", "features way 3", "features way 4"} <= set(found)
    assert found["features class"] == "hf_specdiff.core.modeling_specdiff"


def test_a_repository_holds_the_packages_code_and_both_roles(server: Hub, world: dict[str, str]) -> None:
    files = server.files("org/features")
    code = {path: content for path, content in files.items() if path.endswith(".py")}
    assert {"configuration_specdiff.py", "modeling_specdiff.py", "custom_generate/generate.py"} <= set(code)
    for path, content in code.items():
        assert content == (PACKAGE / "core" / Path(path).name).read_bytes(), path
    entry = {f"custom_generate/{path.name}" for path in entry_files()}
    assert {path for path in files if path.startswith("custom_generate/")} == entry | {"custom_generate/requirements.txt"}
    config = json.loads(files["config.json"])
    assert config["auto_map"] == {
        "AutoConfig": "configuration_specdiff.SpecDiffConfig",
        "AutoModel": "modeling_specdiff.SpecDiffDrafter",
        "AutoModelForCausalLM": "modeling_specdiff.SpecDiffDrafter",
    }
    assert config["target_model"] == "org/target"
    assert config["target_revision"] == server.commits("org/target")[-1]["oid"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/target"
    assert "Not measured" in card.text
    assert "tokenizer.json" in files
    assert [path for path in files if "model." in path] == ["model.safetensors"]
    assert [commit["title"] for commit in server.commits("org/features")] == ["initial commit", "Publish drafter"]


# Figures and defaults.


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
    drafter = make_drafter()
    hub._set_defaults(drafter, RESULTS)
    assert (drafter.generation_config.draft_shape, drafter.generation_config.tree_budget) == ("tree", 16)
    drafter = make_drafter()
    drafter.generation_config.gamma = 3  # who has defaults keeps them
    hub._set_defaults(drafter, RESULTS)
    assert getattr(drafter.generation_config, "draft_shape", None) is None


@pytest.mark.parametrize(
    "asked",
    [
        {"acceptance": "block"},
        {"acceptance": "self_selection"},
        {"num_denoising_steps": 3},
        {"draft_temperature": 0.0},
        {"position_ids": torch.tensor([[3, 4, 5]])},
    ],
)
def test_a_default_shape_yields_to_what_a_call_asks_for(asked: dict[str, Any]) -> None:
    prompt, settings = torch.tensor([[5, 6, 7]]), {"do_sample": True, "max_new_tokens": 9, **asked}
    for shape in ("tree", "chain", "samples"):
        drafter = make_drafter()
        drafter.generation_config.draft_shape = shape
        hf_specdiff.generate(make_target(), prompt, assistant_model=drafter, **settings)
    with pytest.raises(ValueError, match="draft_shape"):  # said in the call, it is an order
        hf_specdiff.generate(
            make_target(), prompt, assistant_model=drafter, draft_shape="tree", acceptance="block", max_new_tokens=9
        )


def test_a_card_without_figures_says_so() -> None:
    card = drafter_card(SpecDiffConfig(target_model="org/target"), 1234)
    assert "Not measured" in card.text
    assert "1,234" in card.text
    assert card.data.eval_results is None
    local = drafter_card(SpecDiffConfig(target_model="/home/me/target", target_layer_ids=[1], num_target_layers=3), 1)
    assert local.data.base_model is None
    assert "reads the target's hidden states" in local.text


NO_NUMBER = {**RESULTS, "rows": [{**RESULTS["rows"][0], "ratio_to_plain": None}]}


@pytest.mark.parametrize(
    "broken", [NO_NUMBER, {}, {"conditions": {}, "rows": [1]}, {"conditions": {"command": "x"}, "rows": [{}]}, [1]]
)
def test_figures_of_no_known_form_are_refused(broken: Any, tokens_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="`results` must"), hub.staged(tokens_folder, "org/x", results=file):
        pass


# One commit or none.


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


def test_plain_push_to_hub_is_one_commit_and_keeps_a_card_that_is_there(hub_here: Hub) -> None:
    drafter = make_drafter()
    drafter.push_to_hub("org/plain", token="hf_writer", private=True, tags=["mine"])
    assert hub_here.load("org/plain")["private"]
    files = hub_here.files("org/plain")
    assert {"custom_generate/generate.py", "model.safetensors", "README.md"} <= set(files)
    assert "mine" in ModelCard(files["README.md"].decode()).data.tags
    assert len(hub_here.commits("org/plain")) == 2
    api = HfApi(token="hf_writer")
    theirs = {
        "README.md": b"# My own words",
        "examples/eval.py": b"1",
        "onnx/model.safetensors": b"2",
        "custom_generate/notes.md": b"3",
    }
    for path, content in theirs.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="org/plain")
    with torch.no_grad():
        drafter.norm.weight.add_(1)
    drafter.push_to_hub("plain", token="hf_writer")
    files = hub_here.files("org/plain")
    assert {path: files[path] for path in theirs} == theirs
    assert hub_here.commits("org/plain")[-1]["title"] == "Upload drafter"


def test_branches_and_pull_requests_leave_main_alone(hub_here: Hub) -> None:
    drafter = make_drafter()
    drafter.push_to_hub("org/branched", token="hf_writer")
    before = hub_here.files("org/branched")
    with torch.no_grad():
        drafter.norm.weight.add_(1)
    drafter.push_to_hub("org/branched", token="hf_writer", revision="dev")
    info = drafter.push_to_hub("org/branched", token="hf_writer", create_pr=True)
    assert info.pr_url.endswith("/discussions/1")
    assert hub_here.files("org/branched") == before
    for branch in ("dev", "refs/pr/1"):
        files = hub_here.files("org/branched", branch)
        assert set(files) == set(before)
        assert files["model.safetensors"] != before["model.safetensors"]


def test_a_name_without_a_namespace_is_the_users_own(hub_here: Hub) -> None:
    make_drafter().push_to_hub("mine", token="hf_writer")
    assert 'from_pretrained("org/mine", trust_remote_code=True)' in hub_here.files("org/mine")["README.md"].decode()
    with pytest.raises(ValueError, match="must be org/name where nobody is logged in"):
        make_drafter().push_to_hub("mine")
    with pytest.raises(ValueError, match="a/b/c"):
        make_drafter().push_to_hub("a/b/c", token="hf_writer")


def test_a_public_repository_is_not_taken_for_a_private_one(hub_here: Hub, repository: hub.Staged) -> None:
    publish(repository, "org/public")
    with pytest.raises(ValueError, match="there already and public"):
        publish(repository, "org/public", private=True)


def test_save_pretrained_can_push(hub_here: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / ".env").write_text("SECRET=1")
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"0")
    make_drafter().save_pretrained(folder, push_to_hub=True, repo_id="org/saved", token="hf_writer", tags=["mine"])
    files = hub_here.files("org/saved")
    assert "custom_generate/generate.py" in files
    assert not {".env", "checkpoint-5/optimizer.pt"} & set(files)
    assert 'from_pretrained("org/saved"' in (folder / "README.md").read_text()
    assert "mine" in ModelCard(files["README.md"].decode()).data.tags


def test_a_card_follows_the_drafter_until_its_owner_takes_it_over(tmp_path: Path) -> None:
    make_drafter().save_pretrained(tmp_path)
    make_drafter(block_size=4).save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "| block size | 4 " in card.read_text()
    card.write_text("# My own words")
    (tmp_path / "custom_generate" / "mine.py").write_text("1")
    make_drafter().save_pretrained(tmp_path)
    assert card.read_text() == "# My own words"
    assert (tmp_path / "custom_generate" / "mine.py").is_file()


def test_paths_of_this_machine_are_not_published(tmp_path: Path) -> None:
    drafter = SpecDiffDrafter.from_pretrained(PAIR / "tokens")
    drafter.config.target_model = str(PAIR / "target")
    drafter.save_pretrained(tmp_path)
    with hub.staged(tmp_path, "org/x") as ready:
        assert json.loads((ready.folder / "config.json").read_text())["target_model"] is None
        assert str(PAIR) not in (ready.folder / "README.md").read_text()


# Bad input.


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
    make_drafter().save_pretrained(tmp_path)
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


def test_an_error_without_a_response_is_a_broken_connection() -> None:
    assert isinstance(explain_hub_error(RuntimeError("gone"), "org/x"), ConnectionError)


# Safety.


def test_a_repositorys_code_does_not_run_without_trust(tmp_path: Path) -> None:
    folder, mark = tmp_path / "strange_drafter", tmp_path / "it-ran"
    make_drafter().save_pretrained(folder)
    for path in (folder / "modeling_specdiff.py", folder / "custom_generate" / "generate.py"):
        path.write_text(f"open({str(mark)!r}, 'w').close()\n" + path.read_text())
    drafter = AutoModelForCausalLM.from_pretrained(folder)
    assert type(drafter) is SpecDiffDrafter
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        hf_specdiff.load_demo()[0].generate(torch.tensor([[5, 6]]), custom_generate=str(folder))
    assert not mark.exists()
    trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # control: with trust it does
    assert mark.exists()
    output = trusted.generate(torch.tensor([[5, 6]]), max_new_tokens=3)  # its own `generate`, arguments by position too
    assert output.sequences.shape == (1, 5)


class Payload:
    """Unpickling it leaves a trace."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    folder, mark = tmp_path / "pickled", tmp_path / "it-ran"
    drafter = make_drafter()
    drafter.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Payload(mark), file)
    with pytest.raises(ValueError, match="must hold a whole drafter"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="`use_safetensors` must be True"):
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert not mark.exists()


@pytest.mark.parametrize("trust", [False, True])
def test_tensors_of_wrong_shape_are_refused(tmp_path: Path, trust: bool) -> None:
    folder = tmp_path / "misshapen"
    make_drafter().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="must hold a whole drafter"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)


def test_block_sizes_that_disagree_are_refused(tmp_path: Path) -> None:
    make_drafter().save_pretrained(tmp_path)
    for name in ("gamma", "num_assistant_tokens"):
        path = tmp_path / "generation_config.json"
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), name: 99}))
        with pytest.raises(ValueError, match=f"`{name}` in the drafter's generation_config.json must be at most"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        path.write_text(before)
    with pytest.raises(ValueError, match="`block_size` must be the same"):
        SpecDiffConfig(block_size=16, dflash_config={"block_size": 8})


def test_defaults_of_speculation_survive_saving(tmp_path: Path) -> None:
    drafter = make_drafter()
    drafter.generation_config.gamma, drafter.generation_config.draft_shape = 3, "chain"
    drafter.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([[5, 6, 7]])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "return_dict_in_generate": True}
    stats = hf_specdiff.generate(make_target(), prompt, assistant_model=loaded, **settings).speculation
    assert stats.draft_shape == "chain"
    assert max(stats.num_drafted[0]) == 3
    stock = make_target().generate(prompt, assistant_model=loaded, **settings)
    assert torch.equal(stock.sequences, make_target().generate(prompt, **settings).sequences)
    for shape in ({"draft_shape": "tree"}, {"tree_budget": "auto"}, {"gamma": "auto"}):  # the stock loop takes one draft
        for name, value in shape.items():
            setattr(loaded.generation_config, name, value)
        assert torch.equal(make_target().generate(prompt, assistant_model=loaded, **settings).sequences, stock.sequences)


def test_defaults_that_a_file_leaves_open_are_filled_in(tmp_path: Path) -> None:
    make_drafter().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"gamma": 4}')
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.generation_config.gamma, loaded.generation_config.num_assistant_tokens) == (4, 5)
    prompt = torch.tensor([[5, 6, 7]])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9}
    assert torch.equal(
        make_target().generate(prompt, assistant_model=loaded, **settings), make_target().generate(prompt, **settings)
    )


def test_a_later_format_is_refused() -> None:
    with pytest.raises(ValueError, match="saved by a later one"):
        SpecDiffConfig(format_version=2)


def test_an_old_transformers_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "for_newer"
    make_drafter().save_pretrained(folder)
    (folder / "custom_generate" / "requirements.txt").write_text("transformers>=99\n")
    with pytest.raises(ImportError, match="transformers>=99"):
        hf_specdiff.load_demo()[0].load_custom_generate(folder, trust_remote_code=True)
    path = folder / "configuration_specdiff.py"
    path.write_text(path.read_text().replace("transformers>=5.17,<6", "transformers>=99,<100"))
    with pytest.raises(ImportError, match="transformers>=99"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_layers_that_the_target_lacks_are_refused() -> None:
    target, drafter, _ = hf_specdiff.load_demo()
    drafter.config.target_layer_ids = [1, 5, 9, 99]
    with pytest.raises(ValueError, match="layers that the target has"):
        hf_specdiff.generate(target, torch.tensor([[5, 6]]), assistant_model=drafter)
