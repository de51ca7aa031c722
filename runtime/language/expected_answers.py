"""Expected answers and their probabilities, from which drafts for speculative decoding are made.

The candidates are the bundle's answer forms, filled in with places of the anomaly map, and the model's recent answers.
The probabilities only decide which tokens are drafted; the language model chooses every token of the answer itself.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from ..bundles.bundle import AnswerForms
from .answer import MapReading
from .draft_tree import ROOT, Continuations, PrefixTree

MAX_ANSWERS = 64  # answers kept per question; the least frequent one is dropped
MAX_QUESTIONS = 16
MAX_SITUATIONS = 256  # situations (see ``_situations``) counted per question
GROWTH = 1.005  # weight of an answer relative to the one before it: about the last 200 answers count
MAX_WEIGHT = 1e6
PRIOR_WEIGHT = 2.0  # weight of the more general estimate, in answers
RANKS = (8.0, 1.0, 0.4, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1)  # initial counts of answers with the n-th place
SEVERAL = 0.1  # initial probability of an answer with several places for a map with several regions
SCORE_STEPS = 3  # classes of the map score per factor of two
MATCHED_TOKENS = 2  # an unknown answer is continued like known answers that contain its last tokens

EVERYTHING = "everything"

Tokens = tuple[int, ...]


class AnswerGrammar:
    """Fills in the bundle's answer forms.

    Attributes:
        negative: answers that report no anomaly.
        single: (place, text) of each answer that names one place.
        num_single_forms: number of forms with one place.
    """

    def __init__(self, forms: AnswerForms) -> None:
        self._forms = forms
        self.negative = tuple(forms.none)
        self.single = tuple(
            (place, form.replace("{place}", place)) for form in forms.one for place in forms.places
        )
        self.num_single_forms = len(forms.one)

    def several(self, reading: MapReading) -> list[str]:
        """Answers that name the two and the three strongest regions of a map."""
        places = [place for place in reading.places if place in self._forms.places]
        return [
            self._fill(form, count, places[:count])
            for count in (2, 3)
            for form in self._forms.several
            if len(places) >= count
        ]

    @property
    def affirmative(self) -> list[str]:
        """Answers that report an anomaly; their first tokens are the affirmative ones."""
        several = [self._fill(form, 2, self._forms.places[:2]) for form in self._forms.several]
        return [text for _, text in self.single] + several

    def _fill(self, form: str, count: int, places: list[str]) -> str:
        """A form with a count and with places in reading order, each once, as in AnomalyGPT's training answers."""
        named = sorted(set(places), key=self._forms.places.index)
        where = ", ".join(named[:-1]) + " and " + named[-1] if len(named) > 1 else named[0]
        return form.replace("{count}", str(count)).replace("{places}", where)


class Expectations:
    """Known answers to one question and their probabilities, P(first token | score) · P(answer | first token, places).

    Each factor is a relative frequency, smoothed by interpolation: the estimate for a situation starts from the one for
    a more general situation, which counts as ``PRIOR_WEIGHT`` answers (Witten and Bell, The zero-frequency problem,
    1991).

    Attributes:
        answers: the tokens of each answer; its index is the answer's number.
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
        """Number of an answer, which is added if it is new; with ``keep`` it is never dropped."""
        number = self._numbers.get(answer)
        if number is None:
            number = self._free_number()
            self.answers[number] = answer
            self._numbers[answer] = number
            self._tree = self._groups = None
            if keep:
                self._kept.add(number)
        return number

    def learn(self, answer: Tokens, reading: MapReading | None) -> None:
        """Count an answer of the model, given the map that it was about."""
        number = self.add(answer)
        general, by_score, *places = _situations(reading)
        for situation in (general, by_score, *((answer[0], place) for place in places)):
            self._counts(situation)[number] += self._step
        self._step *= GROWTH
        if self._step > MAX_WEIGHT:
            for counts in self._weights.values():
                counts /= self._step
            self._step = 1.0

    def probabilities(self, prior: np.ndarray, reading: MapReading | None) -> np.ndarray:
        """Probability of every answer, float [n]; the sum is below 1, the rest is left for unknown answers.

        Args:
            prior: float [n], estimate from the forms and the map. The answers that are never dropped share their
                total probability in the prior's proportions, because the map predicts the place better than recent
                answers do.
            reading: summary of the map; None if there is none.
        """
        general, *particular = _situations(reading)
        prior = prior + 1e-6
        probabilities = self._smoothed(particular[0], self._smoothed(general, prior))
        result = np.zeros(len(probabilities))
        for first, (members, kept) in self._by_first().items():
            within = prior * members
            for situation in particular[1:]:
                within = self._smoothed((first, situation), within) * members
            if kept.any():
                within[kept] = within[kept].sum() * prior[kept] / prior[kept].sum()
            result += probabilities[members].sum() * within / within.sum()
        return result * (1 - 1 / (2 + self._total_weight()))

    def _by_first(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """For each first token: the answers that begin with it, and those of them that are never dropped, bool [n]."""
        if self._groups is None:
            firsts = np.array([answer[0] if answer else -1 for answer in self.answers])
            kept = np.array([number in self._kept for number in range(len(firsts))])
            self._groups = {
                first: (firsts == first, (firsts == first) & kept) for first in set(firsts.tolist())
            }
        return self._groups

    def tree(self) -> PrefixTree:
        """The prefix tree of all answers; rebuilt only after an answer was added."""
        if self._tree is None:
            self._tree = PrefixTree(self.answers)
        return self._tree

    def continuations(self, tokens: Sequence[int]) -> list[Tokens]:
        """How known answers continue after the last ``MATCHED_TOKENS`` of these tokens, without repetition."""
        last = tuple(tokens[-MATCHED_TOKENS:])
        found = {
            answer[i + MATCHED_TOKENS :]: None
            for answer in self.answers
            for i in range(len(answer) - MATCHED_TOKENS + 1)
            if answer[i : i + MATCHED_TOKENS] == last
        }
        return [rest for rest in found if rest]

    def _free_number(self) -> int:
        """Number for a new answer; the least frequent one is dropped when there are ``MAX_ANSWERS``."""
        if len(self.answers) < MAX_ANSWERS:
            self.answers.append(())
            return len(self.answers) - 1
        weights = self._counts(EVERYTHING)
        number = min(set(range(MAX_ANSWERS)) - self._kept, key=lambda number: weights[number])
        del self._numbers[self.answers[number]]
        for counts in self._weights.values():
            counts[number] = 0
        return number

    def _total_weight(self) -> float:
        """Number of answers counted, each weighted by how recent it is."""
        return float(self._counts(EVERYTHING).sum()) / self._step

    def _counts(self, situation: object) -> np.ndarray:
        """Weighted counts of the answers in a situation, float [MAX_ANSWERS]; the least recently used is dropped."""
        counts = self._weights.get(situation)
        if counts is None:
            counts = self._weights[situation] = np.zeros(MAX_ANSWERS)
            if len(self._weights) > MAX_SITUATIONS:
                self._weights.popitem(last=False)
        else:
            self._weights.move_to_end(situation)
        return counts

    def _smoothed(self, situation: object, general: np.ndarray) -> np.ndarray:
        """Probabilities in a situation, float [n]: its counts, interpolated with a more general estimate, float [n]."""
        counts = self._weights.get(situation)
        general = general / general.sum()
        if counts is None:
            return general
        counts = counts[: len(general)] / self._step
        return (counts + PRIOR_WEIGHT * general) / (counts.sum() + PRIOR_WEIGHT)


def _situations(reading: MapReading | None) -> tuple[object, ...]:
    """The situations that an answer is counted in: all, the class of the map score, all, the place of the map's peak,
    and that place with the strongest regions' places. The last three are counted per first token."""
    if reading is None:
        return EVERYTHING, "no map", EVERYTHING
    score_class = round(SCORE_STEPS * math.log2(max(reading.score, 1e-6)))
    peak = reading.ranking[0]
    return EVERYTHING, score_class, EVERYTHING, peak, (peak, reading.places[:3])


class Drafter:
    """Predicts answers for the most recent ``MAX_QUESTIONS`` questions and learns from the model's answers."""

    def __init__(
        self, grammar: AnswerGrammar | None, asked: str, tokenise: Callable[[str], Sequence[int]]
    ) -> None:
        """
        Args:
            grammar: the bundle's answer forms; None: only recent answers are predicted.
            asked: the question that the forms answer; a description may precede it.
            tokenise: tokens of an answer as the model generates them, without the stop token.
        """
        self._grammar, self._asked, self._tokenise = grammar, asked, tokenise
        self._ranks = np.array(RANKS)
        self._questions: OrderedDict[str, Expectations] = OrderedDict()
        self._tokens: dict[str, Tokens] = {}
        single = grammar.single if grammar else ()
        self._places = {tuple(tokenise(text)): place for place, text in single}

    def expect(
        self, question: str, reading: MapReading | None, tokens: Sequence[int] = ()
    ) -> Continuations | None:
        """Continuations of an answer that begins with ``tokens``; None if no known answer continues it."""
        expectations = self._of(question)
        prior = self._prior(expectations, question, reading)
        if not expectations.answers:
            return None
        tree = expectations.tree()
        node = tree.find(tokens)
        if node is not None:
            return tree.below(node, expectations.probabilities(prior, reading))
        rests = expectations.continuations(tokens)
        return PrefixTree(rests).below(ROOT, np.full(len(rests), 1 / (1 + len(rests)))) if rests else None

    def learn(self, question: str, reading: MapReading | None, answer: Tokens) -> None:
        """Count an answer of the model, given without its stop token."""
        if not answer:
            return
        self._of(question).learn(answer, reading)
        place = self._places.get(answer)
        if place is not None and reading and place in reading.ranking:
            self._ranks *= 1 / GROWTH
            self._ranks[reading.ranking.index(place)] += 1

    def _of(self, question: str) -> Expectations:
        """The statistics of a question; the least recently asked question is dropped."""
        expectations = self._questions.setdefault(question, Expectations())
        self._questions.move_to_end(question)
        if len(self._questions) > MAX_QUESTIONS:
            self._questions.popitem(last=False)
        return expectations

    def _prior(self, expectations: Expectations, question: str, reading: MapReading | None) -> np.ndarray:
        """Estimate from forms and map, float [n]: half for the negative answers, half for those with one place, most
        of that for the place of the map's peak, and ``SEVERAL`` for those with several places."""
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
        for number, probability in guesses.items():
            prior[number] = probability
        return prior

    def _number(self, expectations: Expectations, text: str, keep: bool = False) -> int:
        """Number of an answer's text among the expectations."""
        tokens = self._tokens.get(text)
        if tokens is None:
            tokens = self._tokens[text] = tuple(self._tokenise(text))
        return expectations.add(tokens, keep)
