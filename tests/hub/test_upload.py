"""`push_to_hub` and `save_pretrained(push_to_hub=True)`: the whole repository in one commit, and others' files left alone."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub import ModelCard

from hf_specdiff.hub.repository import explain_hub_error
from tests.conftest import make_drafter

from .hub_server import Hub

# The Hub's client and its HTTP library disagree about an argument.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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


def test_code_of_the_old_layout_goes_in_the_same_commit(hub_here: Hub) -> None:
    """It lay in the root: the network's file and what that imports. Other files there are their owner's."""
    drafter = make_drafter()
    drafter.push_to_hub("org/old", token="hf_writer")
    api = HfApi(token="hf_writer")
    old = {
        "modeling_specdiff.py": b"from .configuration_specdiff import C\nfrom .window import W\n",
        "configuration_specdiff.py": b"class C: ...\n",
        "window.py": b"class W: ...\n",
    }
    for path, content in {**old, "evaluate.py": b"print(1)\n"}.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="org/old")
    before = len(hub_here.commits("org/old"))
    drafter.push_to_hub("org/old", token="hf_writer")
    assert len(hub_here.commits("org/old")) == before + 1
    files = hub_here.files("org/old")
    assert [name for name in files if name.endswith(".py") and "/" not in name] == ["evaluate.py"]
    assert "custom_generate/modeling_specdiff.py" in files


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


def test_an_error_without_a_response_is_a_broken_connection() -> None:
    assert isinstance(explain_hub_error(RuntimeError("gone"), "org/x"), ConnectionError)
