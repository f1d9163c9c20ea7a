"""Options made of a plan's fields."""

import re
from pathlib import Path

import pytest
import typer

from hf_specdiff.commands.main import app
from hf_specdiff.commands.plan_options import option_of
from hf_specdiff.commands.plan_options import read_loss_weights
from hf_specdiff.training.plan import FIELDS
from hf_specdiff.training.settings import default_of
from hf_specdiff.training.settings import setting_of


def test_loss_terms_are_read_or_refused() -> None:
    assert read_loss_weights(["ce:1", "streak:0.5", "dpace"]) == {"ce": 1.0, "streak": 0.5, "dpace": 1.0}
    for term in (["typo:1"], ["ce:0"], ["ce:x"], ["ce:1", "ce:2"], ["ce:nan"]):
        with pytest.raises(ValueError, match="`--loss` must be objective:weight"):
            read_loss_weights(term)


def test_every_field_has_an_option_that_says_what_it_means_or_a_reason_not_to() -> None:
    options = {parameter.name: parameter for parameter in typer.main.get_command(app).commands["train"].params}
    for name, field in FIELDS.items():
        setting = setting_of(field)
        assert (name in options) != bool(setting.without_option), name
        if name in options:
            assert option_of(name) in options[name].opts
            assert options[name].default is None  # what nobody names is the plan's business
            assert options[name].rich_help_panel == setting.panel
            if name != "loss_weights":
                assert setting.meaning in options[name].help
                assert setting.rule is None or setting.rule.words in options[name].help
            if isinstance(default_of(field), int | float) and not isinstance(default_of(field), bool):
                assert f"by default {default_of(field):g}" in options[name].help


def test_the_page_on_training_names_the_defaults() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"^\| `(--[\w-]+)` \|.*\| `?([^|`]+)`? \|$", page, flags=re.MULTILINE))
    options = {option_of(name): default_of(field) for name, field in FIELDS.items() if not setting_of(field).without_option}
    shown = {option: named[option] for option in options if option in named}
    assert {"--num-layers", "--block-size", "--head-rank", "--context-weight", "--patience", "--train"} <= set(shown)
    for option, text in shown.items():
        if isinstance(options[option], int | float) and not isinstance(options[option], bool):
            assert text == f"{options[option]:g}", option
