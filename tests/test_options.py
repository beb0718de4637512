"""Numbers of options: refused by the option's name, before anything is measured."""

import argparse
import re
from pathlib import Path

import pytest

from experiments.study_command import read_seeds
from gt_jax.errors import Refused
from gt_jax.options import at_least, positive, positives, whole


@pytest.mark.parametrize(("kind", "right", "wrong"), [
    (at_least(1), {"1": 1, "007": 7}, ("0", "-1", "x", "", "1.5", "1e3", "٣", "²", "9" * 20, "2147483648")),
    (at_least(0), {"0": 0}, ("-1",)), (at_least(1, 8), {"8": 8}, ("9",)),
    (whole, {"-3": -3, str(2**63 - 1): 2**63 - 1}, ()),
    (positive, {"0.5": 0.5, "1e3": 1000.0}, ("0", "-1", "nan", "inf", "1e999", "x", "")),
    (positives, {"1": [1.0], "0.5,2": [0.5, 2.0]}, ("", "0,1", "1,", "3,x")),
])  # fmt: skip
def test_numbers_of_options(kind, right, wrong):
    assert {words: kind(words) for words in right} == right
    for words in (str(2**63), "9" * 5000) if kind is whole else ():
        with pytest.raises(argparse.ArgumentTypeError, match="is beyond 64 bits"):
            kind(words)
    for words in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match="is no "):
            kind(words)


@pytest.mark.parametrize("words", ["-1", "1,", "x", "9" * 20])
def test_seeds_are_whole_numbers_that_a_generator_takes(words):
    assert read_seeds("0,7") == (0, 7)
    with pytest.raises(Refused, match=r"--seeds .* is no list of whole numbers such as 0,1,2"):
        read_seeds(words)


def test_every_experiment_ends_as_a_command_does():
    """With one line and a code, whatever befalls it, not with a traceback."""
    for file in sorted((Path(__file__).parents[1] / "experiments").glob("*.py")):
        _, is_program, end = file.read_text(encoding="utf-8").partition('if __name__ == "__main__":')
        assert not is_program or re.search(r"\brun_command\(\w+\)", end), file.name
