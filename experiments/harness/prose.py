"""Real text for comparisons: sentences of very different lengths from the Declaration of Independence (United States,
1776; public domain)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

_CHARACTERS_PER_TOKEN = 10  # more than any tokenizer makes of English prose

SENTENCES = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands "
    "which have connected them with another, and to assume among the powers of the earth, the separate and equal "
    "station to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of "
    "mankind requires that they should declare the causes which impel them to the separation.",
    "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their "
    "Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness.",
    "Prudence, indeed, will dictate that Governments long established should not be changed for light and "
    "transient causes.",
    "He has refused his Assent to Laws, the most wholesome and necessary for the public good.",
    "He has dissolved Representative Houses repeatedly, for opposing with manly firmness his invasions on the "
    "rights of the people.",
    "He has made Judges dependent on his Will alone, for the tenure of their offices, and the amount and payment "
    "of their salaries.",
    "He has erected a multitude of New Offices, and sent hither swarms of Officers to harrass our people, and eat"
    " out their substance.",
    "He has kept among us, in times of peace, Standing Armies without the Consent of our legislatures.",
    "He has affected to render the Military independent of and superior to the Civil power.",
    "For cutting off our Trade with all parts of the world:",
    "For imposing Taxes on us without our Consent:",
    "For depriving us in many cases, of the benefits of Trial by Jury:",
    "For transporting us beyond Seas to be tried for pretended offences:",
    "He has abdicated Government here, by declaring us out of his Protection and waging War against us.",
    "He has plundered our seas, ravaged our Coasts, burnt our towns, and destroyed the lives of our people.",
    "Nor have We been wanting in attentions to our British brethren.",
    "We must, therefore, acquiesce in the necessity, which denounces our Separation, and hold them, as we hold "
    "the rest of mankind, Enemies in War, in Peace Friends.",
)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_prose(path: Path, batch: int) -> None:
    """Write sentences as JSONL with `text`; the last batch of `batch` is a ragged one of a single sentence."""
    count = max(1, (len(SENTENCES) - 1) // batch) * batch + 1
    write_jsonl(path, ({"text": SENTENCES[index % len(SENTENCES)]} for index in range(count)))


def write_long_texts(path: Path, count: int, seq: int) -> None:
    """Write `count` texts of more than `seq` tokens each as JSONL with `text`, so that cut to it all have one shape."""
    prose = " ".join(SENTENCES)
    length = seq * _CHARACTERS_PER_TOKEN
    long = prose * (2 + length // len(prose))
    starts = (len(" ".join(SENTENCES[:number])) for number in range(len(SENTENCES)))
    texts = [long[start : start + length] for start in starts]
    write_jsonl(path, ({"text": texts[n % len(texts)]} for n in range(count)))
