"""What answer a solution ends in: the last number of a text, whatever is written around it."""

import re
from decimal import Decimal

# A minus behind a digit takes something away: "10-8" ends in 8.
NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:,\d{3})*(?:\.\d+)?")


def final_number(text: str) -> str | None:
    """Return the last number of a text.

    Args:
        text (`str`): a solution.

    Returns:
        `str`: its digits, written in one way: no thousands separators, no zeros behind the point; `None` if there is none.
    """
    found = NUMBER.findall(text)
    if not found:
        return None
    number = Decimal(found[-1].replace(",", ""))
    return format(number.normalize() if number else Decimal(0), "f")


def number_so_far(text: str, *, is_whole: bool) -> str | None:
    """Return the last number that a text has come to.

    Args:
        text (`str`): a solution or its beginning.
        is_whole (`bool`): whether nothing follows: else a number at the very end may have more digits to come, and does not
            count.

    Returns:
        `str`: as `final_number`.
    """
    return final_number(text if is_whole else re.sub(r"-?\d[\d,]*(\.\d*)?$", "", text))


def is_right(text: str, answer: str) -> bool:
    """Return whether a solution ends in a number."""
    return final_number(text) == final_number(answer)
