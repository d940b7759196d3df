"""ROUGE-L: the longest common subsequence of words of a guess and the text (Lin 2004)."""

from __future__ import annotations

import re


def rouge_l(guess: str, text: str) -> float:
    """The F1 of ROUGE-L, 0 to 1. Words are runs of letters and digits, in lower case; 0 where either has none."""
    ours, theirs = _words(guess), _words(text)
    common = _common_subsequence(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _common_subsequence(left: list[str], right: list[str]) -> int:
    lengths = [0] * (len(right) + 1)  # of the words of `left` so far and the first so many of `right`
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]
