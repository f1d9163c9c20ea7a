"""The whole way, in processes of their own: publish, then use it with and without the package, and without a connection."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import hf_specdiff
from hf_specdiff.core.repository import code_files

from .hub_server import Hub

# The Hub's client and its HTTP library disagree about an argument.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PACKAGE = Path(hf_specdiff.__file__).parent
USER = Path(__file__).with_name("hub_user.py")


@pytest.fixture(scope="module")
def world(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Publish a target and both bundled drafters; return the environment of somebody who has never seen them.

    The publisher then uses what was published, with the package; what came out of that lies beside the user's home.
    """
    home = tmp_path_factory.mktemp("home")
    common = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    common.pop("HF_HUB_OFFLINE", None)
    owner = {**common, "HF_HOME": str(home / "owner"), "HF_TOKEN": "hf_writer"}
    script = """
import runpy
import sys
import hf_specdiff
from hf_specdiff.commands import main as cli

home, user = sys.argv[1:]
target, features, tokenizer = hf_specdiff.load_demo("features")
target.push_to_hub("org/target")
tokenizer.push_to_hub("org/target")
tokens = hf_specdiff.load_demo("tokens")[1]
for name, drafter in (("features", features), ("tokens", tokens)):
    drafter.config.target_model = "org/target"
    drafter.save_pretrained(home + name)
    sys.argv[1:] = [home]
    cli.app(["publish", home + name, "org/" + name], standalone_mode=False)
sys.argv = [user, home, "package"]
runpy.run_path(user)
"""
    command = [sys.executable, "-c", script, f"{home}/", str(USER)]
    done = subprocess.run(command, env=owner, capture_output=True, text=True, check=False)
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


def check_ways(found: dict[str, Any], *, is_short: bool = False) -> None:
    ways = [name for name in found if " way " in name or name.endswith(" function")]
    assert {"tokens way 1", "tokens way 2", "features way 2"} <= set(ways)
    for name in ways:
        assert found[name] == found["plain"], name
    for kind in ("tokens", "features"):
        assert found[f"{kind} tokens per round"] > 1.5
        assert is_short or found[f"{kind} batch"] == found["plain batch"]
    assert is_short or found["pipeline"] == found["plain text"]


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
    check_ways(use({**world, "HF_HUB_OFFLINE": "1"}, tmp_path / "offline", "short"), is_short=True)
    assert len(server.log) == calls


def test_a_user_with_the_package_needs_no_trust(world: dict[str, str]) -> None:
    found = json.loads(Path(world["HF_HOME"]).with_name("found.json").read_text())
    check_ways(found, is_short=True)  # batches and pipelines with the package have tests in its own process
    assert {"tokens way 3", "tokens way 4", "features way 3", "features way 4"} <= set(found)
    assert found["features class"] == "hf_specdiff.core.modeling_specdiff"


def test_a_repository_holds_the_packages_code_and_both_roles(server: Hub, world: dict[str, str]) -> None:
    files = server.files("org/features")
    code = {path: content for path, content in files.items() if path.endswith(".py")}
    assert set(code) == {f"custom_generate/{path.name}" for path in code_files()}
    for path, content in code.items():
        assert content == (PACKAGE / "core" / Path(path).name).read_bytes(), path
    assert {path for path in files if path.startswith("custom_generate/")} == set(code) | {"custom_generate/requirements.txt"}
    config = json.loads(files["config.json"])
    assert config["auto_map"] == {
        "AutoConfig": "custom_generate/configuration_specdiff.SpecDiffConfig",
        "AutoModel": "custom_generate/modeling_specdiff.SpecDiffDrafter",
        "AutoModelForCausalLM": "custom_generate/modeling_specdiff.SpecDiffDrafter",
    }
    assert config["target_model"] == "org/target"
    assert config["target_revision"] == server.commits("org/target")[-1]["oid"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/target"
    assert "Not measured" in card.text
    assert "tokenizer.json" in files
    assert [path for path in files if "model." in path] == ["model.safetensors"]
    assert [commit["title"] for commit in server.commits("org/features")] == ["initial commit", "Publish drafter"]
