"""A target that knows chats."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hf_specdiff.demo.bundle import PAIR
from tests.conftest import TEMPLATE


@pytest.fixture
def chat_target(tmp_path: Path) -> Path:
    """The bundled target, its tokenizer with a chat template."""
    folder = tmp_path / "chat-target"
    shutil.copytree(PAIR / "target", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
