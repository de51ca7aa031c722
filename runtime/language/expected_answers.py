"""The answers to expect: the bundle's forms filled in from the map, and what the model has said lately.

Only chances come from here, which order the drafts; what is said is the language model's own choice.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from ..bundles.bundle import AnswerForms
from .answer import MapReading
from .draft_tree import ROOT, Continuations, PrefixTree

MAX_ANSWERS = 64  # kept for a question; the one said least is dropped
MAX_QUESTIONS = 16
MAX_SITUATIONS = 256  # maps told apart, for a question
GROWTH = 1.005  # an answer counts so much more than the one before: two hundred answers are remembered
MAX_WEIGHT = 1e6
PRIOR_WEIGHT = 2.0  # answers that the more general guess counts for
RANKS = (8.0, 1.0, 0.4, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1)  # first guess: how often the map's n-th place is named
SEVERAL = 0.1  # first guess: that a map with several regions is answered with several places
SCORE_STEPS = 3  # classes of score for each factor of two
MATCHED_TOKENS = 2  # an unforeseen answer is continued as another one that had the same last tokens

EVERYTHING = "everything"

Tokens = tuple[int, ...]


class AnswerGrammar:
    """The forms of the bundle as texts."""

    def __init__(self, forms: AnswerForms) -> None:
        self._forms = forms
        self.negative = tuple(forms.none)
        self.single = tuple(
            (place, form.replace("{place}", place)) for form in forms.one for place in forms.places
        )
        self.num_single_forms = len(forms.one)

    def several(self, reading: MapReading) -> list[str]:
        """Answers for the two and for the three strongest regions of a map."""
        places = [place for place in reading.places if place in self._forms.places]
        return [
            self._fill(form, count, places[:count])
            for count in (2, 3)
            for form in self._forms.several
            if len(places) >= count
        ]

    @property
    def affirmative(self) -> list[str]:
        """Texts whose first tokens say yes."""
        several = [self._fill(form, 2, self._forms.places[:2]) for form in self._forms.several]
        return [text for _, text in self.single] + several

    def _fill(self, form: str, count: int, places: list[str]) -> str:
        """Places in reading order, each named once, as the original's training answers have them."""
        named = sorted(set(places), key=self._forms.places.index)
        where = ", ".join(named[:-1]) + " and " + named[-1] if len(named) > 1 else named[0]
        return form.replace("{count}", str(count)).replace("{places}", where)


class Expectations:
    """Answers to one question with their chances: P(first token | score) · P(answer | first token, places).

    Each factor is a smoothed count, the general case standing in for the particular one until that has been seen
    (interpolation as in Witten and Bell, 1991).
    """

    def __init__(self) -> None:
        self.answers: list[Tokens] = []
        self._numbers: dict[Tokens, int] = {}
        self._kept: set[int] = set()
        self._weights: OrderedDict[object, np.ndarray] = OrderedDict()
        self._step = 1.0
        self._tree: PrefixTree | None = None
        self._groups: dict[int, tuple[np.ndarray, np.ndarray]] | None = None

    def add(self, answer: Tokens, keep: bool = False) -> int:
        """Number of an answer, which is taken in when it is new; ``keep`` it for ever."""
        number = self._numbers.get(answer)
        if number is None:
            number = self._room()
            self.answers[number] = answer
            self._numbers[answer] = number
            self._tree = self._groups = None
            if keep:
                self._kept.add(number)
        return number

    def learn(self, answer: Tokens, reading: MapReading | None) -> None:
        """The model has said this of a map."""
        number = self.add(answer)
        general, by_score, *places = _situations(reading)
        for situation in (general, by_score, *((answer[0], place) for place in places)):
            self._counts(situation)[number] += self._step
        self._step *= GROWTH
        if self._step > MAX_WEIGHT:
            for counts in self._weights.values():
                counts /= self._step
            self._step = 1.0

    def chances(self, prior: np.ndarray, reading: MapReading | None) -> np.ndarray:
        """Chance of every answer: float [n], summing to less than 1, for something else may be said.

        Args:
            prior: float [n], what the forms and the map suggest. The answers kept for ever share their chance as
                the prior has it, for where something is the map knows better than what was said lately.
            reading: of the map; None when there is none.
        """
        general, *particular = _situations(reading)
        prior = prior + 1e-6
        chances = self._smoothed(particular[0], self._smoothed(general, prior))
        result = np.zeros(len(chances))
        for first, (members, kept) in self._by_first().items():
            within = prior * members
            for situation in particular[1:]:
                within = self._smoothed((first, situation), within) * members
            if kept.any():
                within[kept] = within[kept].sum() * prior[kept] / prior[kept].sum()
            result += chances[members].sum() * within / within.sum()
        return result * (1 - 1 / (2 + self._said()))

    def _by_first(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By first token: which answers begin with it, and which of these are kept for ever (bool [n])."""
        if self._groups is None:
            firsts = np.array([answer[0] if answer else -1 for answer in self.answers])
            kept = np.array([number in self._kept for number in range(len(firsts))])
            self._groups = {
                first: (firsts == first, (firsts == first) & kept) for first in set(firsts.tolist())
            }
        return self._groups

    def tree(self) -> PrefixTree:
        """All answers; made anew only when a new one was taken in."""
        if self._tree is None:
            self._tree = PrefixTree(self.answers)
        return self._tree

    def continuations(self, spoken: Sequence[int]) -> list[Tokens]:
        """How known answers go on from the last tokens of one that is not known."""
        last = tuple(spoken[-MATCHED_TOKENS:])
        found = {
            answer[i + MATCHED_TOKENS :]: None
            for answer in self.answers
            for i in range(len(answer) - MATCHED_TOKENS + 1)
            if answer[i : i + MATCHED_TOKENS] == last
        }
        return [rest for rest in found if rest]

    def _room(self) -> int:
        """Number for a new answer."""
        if len(self.answers) < MAX_ANSWERS:
            self.answers.append(())
            return len(self.answers) - 1
        said = self._counts(EVERYTHING)
        number = min(set(range(MAX_ANSWERS)) - self._kept, key=lambda number: said[number])
        del self._numbers[self.answers[number]]
        for counts in self._weights.values():
            counts[number] = 0
        return number

    def _said(self) -> float:
        """How many answers count, about."""
        return float(self._counts(EVERYTHING).sum()) / self._step

    def _counts(self, situation: object) -> np.ndarray:
        counts = self._weights.get(situation)
        if counts is None:
            counts = self._weights[situation] = np.zeros(MAX_ANSWERS)
            if len(self._weights) > MAX_SITUATIONS:
                self._weights.popitem(last=False)
        else:
            self._weights.move_to_end(situation)
        return counts

    def _smoothed(self, situation: object, general: np.ndarray) -> np.ndarray:
        counts = self._weights.get(situation)
        general = general / general.sum()
        if counts is None:
            return general
        counts = counts[: len(general)] / self._step
        return (counts + PRIOR_WEIGHT * general) / (counts.sum() + PRIOR_WEIGHT)


def _situations(reading: MapReading | None) -> tuple[object, ...]:
    """What counts are kept for: everything, the score's class, then the places from the general to the particular."""
    if reading is None:
        return EVERYTHING, "no map", EVERYTHING
    score_class = round(SCORE_STEPS * math.log2(max(reading.score, 1e-6)))
    peak = reading.ranking[0]
    return EVERYTHING, score_class, EVERYTHING, peak, (peak, reading.places[:3])


class Drafter:
    """What may be answered to each question, most lately asked ones first."""

    def __init__(
        self, grammar: AnswerGrammar | None, asked: str, tokenise: Callable[[str], Sequence[int]]
    ) -> None:
        """
        Args:
            grammar: without any only what was said lately is drafted.
            asked: the question that the grammar answers; it may have a description in front.
            tokenise: of an answer, as the model says it, without the stop token.
        """
        self._grammar, self._asked, self._tokenise = grammar, asked, tokenise
        self._ranks = np.array(RANKS)
        self._questions: OrderedDict[str, Expectations] = OrderedDict()
        self._tokens: dict[str, Tokens] = {}
        single = grammar.single if grammar else ()
        self._places = {tuple(tokenise(text)): place for place, text in single}

    def expect(
        self, question: str, reading: MapReading | None, spoken: Sequence[int] = ()
    ) -> Continuations | None:
        """What may follow the tokens that are spoken already; None when nothing is known."""
        expectations = self._of(question)
        prior = self._prior(expectations, question, reading)
        if not expectations.answers:
            return None
        tree = expectations.tree()
        node = tree.find(spoken)
        if node is not None:
            return tree.below(node, expectations.chances(prior, reading))
        rests = expectations.continuations(spoken)
        return PrefixTree(rests).below(ROOT, np.full(len(rests), 1 / (1 + len(rests)))) if rests else None

    def learn(self, question: str, reading: MapReading | None, answer: Tokens) -> None:
        """``answer`` without its stop token was said."""
        if not answer:
            return
        self._of(question).learn(answer, reading)
        place = self._places.get(answer)
        if place is not None and reading and place in reading.ranking:
            self._ranks *= 1 / GROWTH
            self._ranks[reading.ranking.index(place)] += 1

    def _of(self, question: str) -> Expectations:
        expectations = self._questions.setdefault(question, Expectations())
        self._questions.move_to_end(question)
        if len(self._questions) > MAX_QUESTIONS:
            self._questions.popitem(last=False)
        return expectations

    def _prior(self, expectations: Expectations, question: str, reading: MapReading | None) -> np.ndarray:
        """float [n]: half for no, half for yes, most of that for the map's place."""
        guesses: dict[int, float] = {}
        if self._grammar and question.endswith(self._asked):
            several = self._grammar.several(reading) if reading else []
            ranks = self._ranks / self._ranks.sum()
            for text in self._grammar.negative:
                guesses[self._number(expectations, text, keep=True)] = 0.5 / len(self._grammar.negative)
            for place, text in self._grammar.single:
                rank = reading.ranking.index(place) if reading and place in reading.ranking else -1
                number = self._number(expectations, text, keep=True)
                guesses[number] = 0.5 * ranks[rank] / self._grammar.num_single_forms
            for text in several:
                guesses[self._number(expectations, text)] = SEVERAL / len(several)
        prior = np.zeros(len(expectations.answers))
        for number, chance in guesses.items():
            prior[number] = chance
        return prior

    def _number(self, expectations: Expectations, text: str, keep: bool = False) -> int:
        tokens = self._tokens.get(text)
        if tokens is None:
            tokens = self._tokens[text] = tuple(self._tokenise(text))
        return expectations.add(tokens, keep)
