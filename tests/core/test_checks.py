"""What is refused, and what is not."""

from typing import Any

import pytest

from hf_specdiff.core.checks import check_rotary
from tests.conftest import make_target


@pytest.mark.parametrize(
    ("rope", "length", "is_refused"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 20, False),
        ({"rope_type": "dynamic", "factor": 2.0}, 70, True),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 32},
            20,
            False,
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 32},
            40,
            True,
        ),
        ({"rope_type": "linear", "factor": 2.0}, 70, False),
    ],
)
def test_frequencies_that_follow_the_text_are_refused(rope: dict[str, Any], length: int, is_refused: bool) -> None:
    config = make_target(max_position_embeddings=64).config
    config.rope_parameters = rope
    if not is_refused:
        return check_rotary(config, 7, length)
    with pytest.raises(ValueError, match="rotary frequencies change"):
        check_rotary(config, 7, length)
