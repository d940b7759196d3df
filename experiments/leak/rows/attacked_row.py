"""The attacks on a row's recording, from each side that the grid names, with the priors beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import AttackLimitedError
from isthmus.common.progress import bar
from isthmus.edge.data.batches import encode
from isthmus.experiments.leak.decoy_texts import write_decoys
from isthmus.experiments.leak.grid import Row, known_texts
from isthmus.experiments.leak.leak_texts import UNCUT, LeakTexts, Text
from isthmus.experiments.leak.real_or_decoy import RealOrDecoy, share_picked
from isthmus.experiments.leak.rows.recorded_rows import Crossed, labels_of, sequences, traffic_of
from isthmus.experiments.leak.rows.recorded_run import RecordedRun
from isthmus.experiments.leak.rows.row_checkpoint import RowCheckpoint
from isthmus.privacy.attacks.attack import Knowledge, KnownDefence
from isthmus.privacy.attacks.averaging import AveragedMatching, mean_of
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.attacks.labels.gradient_labels import DirectLabels
from isthmus.privacy.attacks.private_front import fit_front
from isthmus.privacy.defences.decoys import Decoys
from isthmus.privacy.defences.secret_noise import SecretNoise
from isthmus.privacy.ledger.judged_attacks import (
    LABEL_ATTACKS,
    TOKEN_ATTACKS,
    Front as Side,
    Judged,
    Truth,
    guess_of,
    judge_labels,
    judge_tokens,
)
from isthmus.privacy.measures.bootstrap import Interval, share_interval
from isthmus.privacy.measures.priors import free_running_prior, teacher_forced_prior, unigram_prior
from isthmus.privacy.measures.token_accuracy import token_hits
from isthmus.privacy.recording.traffic import Traffic

FURTHER = ("vocabulary_matching",)
"""The attacks from a row's further sides: the strongest where nothing but the front or the codec is in its way."""

_OTHER_PASSES = 1 << 40  # numbers of draws that no public text has

MISSED = 0.01
"""An undefended run may miss this share of the tokens before it is asked whether its lists are to blame: what an attack
misses for other reasons, such as two tokens that hardly differ, is a few in a thousand."""


@dataclass(frozen=True, slots=True)
class Attacker:
    """What there is for attacks on a row.

    Attributes:
        passes: How often the run sends each private text.
        base: The whole model with the frozen weights.
        tuned: The same with the edge's adapter.
        defence: The defences as they are after the run.
        quick: Whether one attack on texts and one on labels are enough.
        say: Told what is under way.
    """

    base: Any
    tuned: Any
    tokenizer: Any
    plan: SplitPlan
    texts: LeakTexts
    n_attacked: int
    passes: int
    defence: KnownDefence | None
    inverter_steps: int
    seed: int
    quick: bool
    say: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Found:
    """What an attack got of a row, from one side and over one codec.

    Attributes:
        real_row_found: How often the real row is picked of a text's rows, where there are decoys: by what the attack
            read, or where it reads labels, by the gradients.
    """

    judged: Judged
    codec: str
    known_texts: int
    real_row_found: Interval | None = None


def attack_row(row: Row, run: RecordedRun, attacker: Attacker, checkpoint: RowCheckpoint) -> list[Found]:
    """All attacks on a row: those that the checkpoint has, and the others made now and stored.

    Raises:
        AttackLimitedError: An attack on an undefended row got less than it could because of its lists.
        DataError: The recording is not that of the row.
    """
    front = Front(attacker.tuned, attacker.plan.bottom)
    found = []
    # Made once, and only for an attack that is not stored; so is a fitted front.
    decoy_classifier = cache(lambda: _decoy_classifier(attacker)) if row.n_decoys else None
    for codec, batches in run.sent.items():
        crossed = sequences(batches, front)
        for view in row.views if codec == row.codec else ("known",):
            attacked, knowledge = _side(row, view, codec, crossed, front, attacker)
            first = codec == row.codec and view == row.views[0]
            names = tuple(TOKEN_ATTACKS) if first and not attacker.quick else FURTHER
            for each in _token_attacks(run, attacked, knowledge, view, names, attacker, decoy_classifier, checkpoint):
                if row.defence_text == "none" and view == "known":
                    check_unlimited(each.judged, f"row {row.name!r} over {codec}")
                found.append(each)
            if first and attacker.passes > 1 and any(each.fresh for each in row.defences()):
                averaged = partial(_averaged, run, attacked, knowledge, view, attacker)
                about = {"codec": codec, "view": view}
                found.append(checkpoint.result(AveragedMatching.name, about, Found, averaged))
    for side in dict.fromkeys(_side_of(view) for view in row.views) if run.learned else ():
        for each in _label_attacks(row, run, side, front, attacker, checkpoint):
            if row.defence_text == "none" and side == "known":
                check_unlimited(each.judged, f"row {row.name!r}")
            found.append(each)
    return found


def _label_attacks(
    row: Row, run: RecordedRun, side: Side, front: Front, attacker: Attacker, checkpoint: RowCheckpoint
) -> Iterator[Found]:
    """Labels, by the gradients of the last steps. Who knows the edge's own layers has its last ones too."""
    learned = sequences(run.learned, front, run.backwards)
    _, knowledge = _side(row, side, row.codec, [], front, attacker)
    knowledge = replace(knowledge, model=attacker.tuned if side == "known" else attacker.base)
    truth = Truth((), labels=tuple(labels_of(each.text, each.forward.hidden.shape[1]) for each in learned))

    def attack(name: str) -> Found:
        attacker.say(f"{name} on {len(learned)} sequences' gradients, last layers {side}")
        guess = guess_of(LABEL_ATTACKS[name], knowledge, traffic_of(run.traffic, learned))
        picked = by_small_gradients(learned, guess.labels or ()) if row.n_decoys else None
        return Found(judge_labels(name, side, guess, truth), row.codec, 0, picked)

    for name in (DirectLabels.name,) if attacker.quick else LABEL_ATTACKS:
        yield checkpoint.result(name, {"codec": row.codec, "view": side}, Found, partial(attack, name))


def _averaged(
    run: RecordedRun, crossed: Sequence[Crossed], knowledge: Knowledge, view: str, attacker: Attacker
) -> Found:
    """Matching of the mean over as many passes as the run sends of a text: the recorded one, and others like it.

    The others are computed by the edge's own layers and defences, with noise of their own.
    """
    texts = [each.text for each in crossed if each.text is not None]
    recorded = [each.forward for each in crossed if each.text is not None]  # decoys would only be read as well
    attacker.say(f"{AveragedMatching.name} on {len(texts)} sequences in {attacker.passes} passes")

    def passes() -> Iterator[Traffic]:
        first = replace(run.traffic, forwards=tuple(recorded), backwards=(), decodes=())
        yield first
        for turn in range(1, attacker.passes):
            sent = []
            for number, (text, forward) in enumerate(zip(texts, recorded, strict=True)):
                exact = knowledge.front.states(text.tokens)
                hidden = knowledge.sent(text.tokens, exact, _OTHER_PASSES + turn * len(texts) + number)
                sent.append(replace(forward, hidden=hidden[None]))
            yield replace(first, forwards=tuple(sent))

    traffic, counted = mean_of(passes())
    guess = guess_of(partial(AveragedMatching, counted), knowledge, traffic)
    judged = judge_tokens(AveragedMatching.name, _side_of(view), guess, knowledge, _truth(texts))
    return Found(judged, knowledge.codec, 0)


def _truth(texts: Sequence[Text]) -> Truth:
    secrets = tuple(() if text.secret is None else (text.secret,) for text in texts)
    return Truth(tuple(text.tokens for text in texts), secrets=secrets)


def check_unlimited(judged: Judged, where: str) -> None:
    """Refuse an attack that missed more than `MISSED` of its tokens or labels when half of those were not in its lists.

    Its accuracy would say how good the lists are, not what the wire gives away.

    Raises:
        AttackLimitedError: It is one.
    """
    got = judged.token_accuracy or judged.label_accuracy
    if judged.coarse_recall is None or got is None:
        return
    missed, unlisted = 1 - got.value, 1 - judged.coarse_recall.value
    if missed > MISSED and unlisted >= missed / 2:
        raise AttackLimitedError(
            f"{where}: {judged.attack} got {got.value:.1%} with a coarse recall of {judged.coarse_recall.value:.1%}, "
            "so its lists limit it: give it more public texts (--public) or a longer training (--inverter-steps), and "
            "another --out"
        )


def priors_of(base: Any, public: Sequence[Text], texts: Sequence[Text], *, labels: bool) -> dict[str, Interval]:
    """What is guessed of texts without their traffic, under the names that the ledger has for it.

    Args:
        base: The whole model with the frozen weights.
        public: What the attacker has of the same kind.
        labels: Whether only tokens that are labels count, and the most frequent one is that of public texts' labels.
    """
    own, tokens = [text.tokens for text in public], [text.tokens for text in texts]
    counted, true = own, tokens
    if labels:
        true = [torch.tensor(text.encoded.labels) for text in texts]  # padding and prompts are negative
        counted = [each[each >= 0] for each in (torch.tensor(text.encoded.labels) for text in public)]
    guesses: dict[str, list[Tensor]] = {
        "prior_accuracy": teacher_forced_prior(base, own, tokens),
        "prior_free_accuracy": free_running_prior(base, own, tokens),
        "prior_unigram_accuracy": unigram_prior(counted, tokens),
    }
    return {name: share_interval(token_hits(guess, true)) for name, guess in guesses.items()}


def _side_of(view: str) -> Side:
    return "known" if view == "known" else "tuned"


def _side(
    row: Row, view: str, codec: str, crossed: Sequence[Crossed], front: Front, attacker: Attacker
) -> tuple[list[Crossed], Knowledge]:
    """The sequences that are attacked, and what the attacker knows who has this view."""
    known = {id(text) for text in attacker.texts.sent[attacker.n_attacked :]}
    attacked = [each for each in crossed if each.text is None or id(each.text) not in known]
    given = [each for each in crossed if each.text is not None and id(each.text) in known][: known_texts(view)]
    private = view != "known"
    knowledge = Knowledge(
        attacker.base,
        attacker.tokenizer,
        attacker.plan,
        Front(attacker.base, attacker.plan.bottom) if private else front,
        tuple(text.tokens for text in attacker.texts.public),
        codec=codec,
        private_front=private,
        known=tuple((each.text.tokens, each.forward.hidden[0]) for each in given if each.text is not None),
        defence=attacker.defence,
        inverter_steps=attacker.inverter_steps,
        seed=attacker.seed,
        progress=partial(bar, None),
    )
    return attacked, knowledge


def _token_attacks(
    run: RecordedRun,
    crossed: Sequence[Crossed],
    knowledge: Knowledge,
    view: str,
    names: Sequence[str],
    attacker: Attacker,
    decoy_classifier: Callable[[], RealOrDecoy] | None,
    checkpoint: RowCheckpoint,
) -> Iterator[Found]:
    is_real = torch.tensor([each.text is not None for each in crossed])
    texts = [each.text for each in crossed if each.text is not None]
    truth = _truth(texts)
    traffic = traffic_of(run.traffic, crossed)

    @cache
    def fitted_knowledge() -> Knowledge:
        if known_texts(view) < 2:
            return knowledge
        attacker.say(f"fitting a front to {known_texts(view)} known texts")
        return fit_front(knowledge)

    def attack(name: str) -> Found:
        fitted = fitted_knowledge()
        attacker.say(f"{name} on {len(crossed)} sequences over {fitted.codec}, front {view}")
        guess = guess_of(TOKEN_ATTACKS[name], fitted, traffic)
        chosen = replace(guess, tokens=tuple(guess.tokens[number] for number in is_real.nonzero()[:, 0]))
        judged = judge_tokens(name, _side_of(view), chosen, fitted, truth)
        picked = None
        if decoy_classifier is not None:
            scores = decoy_classifier().scores(guess.tokens)
            picked = share_picked(scores, is_real, [each.text_number for each in crossed])
        return Found(judged, fitted.codec, known_texts(view), picked)

    for name in names:
        yield checkpoint.result(name, {"codec": knowledge.codec, "view": view}, Found, partial(attack, name))


def by_small_gradients(learned: Sequence[Crossed], labels: Sequence[Tensor]) -> Interval:
    """How often the real row is that with the smallest gradient of a label, on average over its labels.

    The adapters learn from real rows alone, so the loss of these falls, and a gradient is small where the loss is.

    Args:
        labels: As they were guessed, `[sequence]` of each; -1 where there is none.
    """
    scores = []
    for each, guessed in zip(learned, labels, strict=True):
        norms = torch.zeros(len(guessed)) if each.backward is None else each.backward.gradient[0].norm(dim=-1)
        found = guessed >= 0
        scores.append(-float(norms[found].mean()) if found.any() else float("-inf"))
    is_real = torch.tensor([each.text is not None for each in learned])
    return share_picked(torch.tensor(scores), is_real, [each.text_number for each in learned])


def _decoy_classifier(attacker: Attacker) -> RealOrDecoy:
    """Learns from half of the public texts, and from decoys that the attacker writes to them with the other half."""
    attacker.say("writing the attacker's own decoys")
    half = len(attacker.texts.public) // 2
    real, others = attacker.texts.public[:half], attacker.texts.public[half:]
    seed = attacker.seed + 1
    written = write_decoys(attacker.base, attacker.tokenizer, real, others, 1, seed)
    encoded, _ = encode(written, attacker.tokenizer, UNCUT)
    ids = [text.encoded.input_ids for text in real]
    noise = SecretNoise(seed.to_bytes(32, "big"))
    decoys = Decoys(1, ids, [(each.input_ids, each.labels) for each in encoded], noise)
    cut = [torch.tensor(tokens) for each in dict.fromkeys(ids) for tokens, _ in decoys.of(each)]
    return RealOrDecoy(attacker.base, [text.tokens for text in real], cut)
