"""Training runs without their pictures, which take longer than tiny training; tests of the pictures ask for them."""

import pytest

from hf_specdiff.training import pipeline


@pytest.fixture
def with_pictures() -> None:
    """Let runs draw."""


@pytest.fixture(autouse=True)
def _without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "with_pictures" not in request.fixturenames:
        monkeypatch.setattr(pipeline, "plot_run", lambda history, output: None)
