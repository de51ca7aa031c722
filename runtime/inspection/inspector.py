"""The inspector: a frame in, a verdict out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from ...kernels import localise, preprocess, summarise, upsample
from ..bundles.bundle import Bundle, Vision, open_bundle
from ..common.errors import AgptError, BundleError, ClosedError, ConfigError, LateError, RecipeError
from ..language.answer import Answer, Part
from ..language.dialogue import Dialogue
from ..language.model import LanguageModel
from ..recipes.recipe import OperatingPoint, Recipe, WithoutVerdict, load_recipe
from ..vision.augment import COPIES_OF, Copies, check_copies, make_copies
from ..vision.engines import AUTO, Engine, choose_engine, learner_inputs, open_networks
from ..vision.images import check_frame
from ..vision.memory_bank import MemoryBank, Storage, load_bank
from ..vision.regions import (
    find_regions,
    find_regions_of_views,
    half_way_level,
    place_name,
    places_agree,
    read_map,
)
from ..vision.views import WHOLE, Layout, View
from .budget import MAP_STAGES, VERDICT_STAGES, Budget, CostsOfViews, PassTimer, StageCosts
from .decide import decide_by_map, decide_views
from .verdict import Likeness, Region, Status, Verdict, ViewResult

MAX_DEFAULT_THREADS = 8
WARM_UP_RUNS = 2
MAX_COPIED_PATCHES = 12 * 1024  # to choose a bank's from: twelve samples of 256 patches with their copies, moved


@dataclass(frozen=True, eq=False)
class Product:
    """What one product's frames are compared with and asked: a recipe made ready, cheap to switch to.

    Attributes:
        text_features: float32 [2, E]: the zero-shot reference, used when there is no bank.
        bank: normal samples: with a bank the few-shot map replaces the zero-shot one, as in the original.
        question: with the description in front; "" asks the bundle's own.
        resize: how frames, or views of them, are fitted to the encoder.
        operating_point: of p(anomaly) and map; None: the greedy answer decides.
        without_verdict: what a part is for whose answer there was no time.
        layout: the views of a frame: the whole of it, regions or tiles.
    """

    name: str
    text_features: np.ndarray
    bank: MemoryBank | None
    question: str
    resize: Literal["crop", "stretch"]
    operating_point: OperatingPoint | None = None
    without_verdict: WithoutVerdict = "no_result"
    layout: Layout = WHOLE


class Matches(NamedTuple):
    """Of every patch of every view, how far the normal samples are from it, and which of their patches are nearest."""

    distance: np.ndarray  # float32 [views, P]
    nearest: np.ndarray  # int32 [views, T, P], rows of the memory bank


class Inspector:
    """Inspects frames of one product at a time. Not thread-safe: one inspector, one thread.

    While it is open, NumPy's BLAS runs on one thread: its threads spin, and what is multiplied here is small.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: str,
        networks: dict[str, Engine],
        language: LanguageModel,
        product: Product,
        threads: int,
    ) -> None:
        self.bundle = bundle
        self.engine = engine
        self.product = product
        self._networks = networks
        self._language = language
        self._clock = time.perf_counter
        self._costs = CostsOfViews()
        self._threads = threads
        self._blas = ThreadpoolController().select(user_api="blas").limit(limits=1)

    @classmethod
    def open(
        cls,
        bundle: Path | str | None = None,
        recipe: Path | str | Recipe | None = None,
        *,
        normals: Sequence[np.ndarray] | None = None,
        class_name: str | None = None,
        threads: int | None = None,
        engine: str = AUTO,
    ) -> Inspector:
        """Verify a bundle, load its networks, and run them once.

        Args:
            bundle: folder; the shipped nano bundle when None.
            recipe: product settings; a path when the recipe has a memory bank.
            normals: normal frames, uint8 [H, W, 3] BGR: a memory bank for this session only.
            class_name: overrides the recipe's.
            threads: CPU threads; as many as this process may use when None, at most 8.
            engine: what runs the networks; the best that this machine can run when "auto".

        Raises:
            BundleError, RecipeError, ConfigError, ImageError: one sentence that names the fix.
        """
        opened = open_bundle(bundle)
        manifest = opened.manifest
        product = prepare_product(opened, recipe, class_name)
        threads = threads or default_threads()
        engine = choose_engine(opened, engine)
        networks = open_networks(opened, engine, threads)
        language = LanguageModel.open(
            opened.component_file("language_model"), manifest.prompt, manifest.language, threads
        )
        inspector = cls(opened, engine, networks, language, product, threads)
        inspector._warm_up()
        if normals is not None:
            inspector.use(inspector.make_bank(normals))
        return inspector

    @property
    def networks(self) -> dict[str, Engine]:
        """Encoder, decoder and prompt learner as they are open here."""
        return self._networks

    @property
    def costs(self) -> StageCosts:
        """What the stages take for frames of as many views as the product's."""
        return self._costs.of(self.product.layout.num_views)

    def close(self) -> None:
        """Free the models' native memory and give NumPy its threads back."""
        self._language.close()
        for network in self._networks.values():
            network.close()
        self._blas.restore_original_limits()

    def __enter__(self) -> Inspector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, recipe: Path | str | Recipe | None = None, class_name: str | None = None) -> Product:
        """Make a recipe ready for ``use``: reads and checks its files, changes nothing."""
        return prepare_product(self.bundle, recipe, class_name)

    def use(self, product: Product | MemoryBank | Recipe | Path | str | None) -> None:
        """Inspect this product from now on. ``Product`` and ``MemoryBank`` cost nothing; None: zero-shot.

        Raises:
            RecipeError: the bank was made with another encoder or for other views, or the recipe cannot be used.
        """
        if isinstance(product, Product):
            self.product = product
        elif isinstance(product, MemoryBank):
            if product.encoder_sha256 != self.bundle.encoder_sha256:
                raise RecipeError(
                    "the memory bank was made with another encoder: make it again with this bundle"
                )
            if len(product.features) != max(1, len(self.product.layout.regions)):
                raise RecipeError(
                    "the memory bank was made for other regions: make it again with this recipe"
                )
            self.product = replace(self.product, bank=product)
        else:
            self.product = self.prepare(product)

    def make_bank(
        self,
        normals: Sequence[np.ndarray],
        storage: Storage = "float32",
        max_patches: int | None = None,
        copies: Copies | None = None,
        *,
        track: Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]] = iter,
    ) -> MemoryBank:
        """Memory bank of normal frames, uint8 [H, W, 3] BGR each, seen as the current product's.

        Args:
            normals: the frames.
            storage, max_patches: see ``MemoryBank.from_features``.
            copies: see ``make_copies``; None: those that the bundle was made for, if they fit into
                ``MAX_COPIED_PATCHES``: many samples need no copies.
            track: watches the frames go by, to show progress.

        Raises:
            ImageError: something is not a frame, or has another size than the product's regions or tiles are for.
            RecipeError: no frame, features that are not finite, or an unknown storage.
            ConfigError: unknown copies.
        """
        if not normals:
            raise RecipeError("there is no normal image: give at least one")
        copies = self._default_copies(len(normals)) if copies is None else copies
        check_copies(copies)
        vision = self.bundle.manifest.vision
        copied, overlapping = COPIES_OF[copies] > 1, vision.shifts > 1
        thinned = overlapping and not self._few(len(normals))
        kept = _distinct_patches(vision) if thinned else slice(None)
        samples = []
        for frame in track(normals):
            pixels = self._preprocess(frame, self._views(frame))
            made = make_copies(pixels, copies, vision.grid)
            samples.append(np.concatenate([self._encode(copy)[1][:, :, kept] for copy, _ in made], axis=2))
        shown = np.concatenate([patches[kept] for _, patches in made]) if copied or thinned else None
        return MemoryBank.from_features(
            samples,
            self.bundle.encoder_sha256,
            storage,
            max_patches,
            per_view=bool(self.product.layout.regions),
            shown=shown,
            distinct=vision.num_distinct if copied or overlapping else None,
            threads=self._threads,
        )

    def _default_copies(self, num_samples: int) -> Copies:
        """The bundle's own, of few samples: many need none."""
        return self.bundle.manifest.copies if self._few(num_samples) else "none"

    def _few(self, num_samples: int) -> bool:
        """Whether it takes seconds to choose what the bank keeps, from all copies and all overlapping patches."""
        manifest, layout = self.bundle.manifest, self.product.layout
        views = 1 if layout.regions else layout.num_views
        patches = COPIES_OF[manifest.copies] * num_samples * views * manifest.vision.grid**2
        return patches <= MAX_COPIED_PATCHES

    def inspect(self, frame: np.ndarray, deadline: float | None = None) -> Verdict:
        """One frame's life: uint8 [H, W, 3] BGR of any size → a verdict.

        Never raises on a frame: whatever goes wrong gives NO_RESULT with the reason, never a PASS.

        Raises:
            ClosedError: the inspector was closed.

        Args:
            deadline: seconds of ``time.perf_counter``; what would end later is left out, and ``rung`` says so:
                first the sentence, then the verdict, then the map. Without a verdict it is NO_RESULT.
        """
        costs = self.costs
        stages = _Stages(self._clock, costs)
        found: dict[str, Any] = {"rung": "none"}
        budget = Budget(costs, self._clock, deadline)
        try:
            self._climb(frame, stages, budget, found)
        except ClosedError:
            raise
        except Exception as error:
            found.update(status=Status.NO_RESULT, reason=_reason(error))
        size = frame.shape[:2] if isinstance(frame, np.ndarray) and frame.ndim >= 2 else (0, 0)
        return Verdict(
            frame_size=size,
            resize=self.product.resize,
            timings_ms=stages.milliseconds,
            costs_ms=costs.milliseconds(),
            **found,
        )

    def _climb(self, frame: np.ndarray, stages: _Stages, budget: Budget, found: dict[str, Any]) -> None:
        """The stages, as far as they fit; what they find goes into ``found``.

        Raises:
            LateError: no verdict before the deadline.
        """
        if not budget.fits(MAP_STAGES):
            raise LateError("no time for the map before the deadline")
        with stages.timed("preprocess"):
            views = self._views(frame)
            pixels = self._preprocess(frame, views)
        with stages.timed("encode"):
            image_embeddings, patch_features = self._encode(pixels)
        with stages.timed("localise"):
            maps, matches = self._localise(patch_features)
            seen = self._read(maps, views)
            found.update(self._summary(seen), rung="map")
            regions = self._regions(seen, maps, frame.shape[:2])
        if not budget.fits(VERDICT_STAGES):
            found.update(self._without_verdict(found["score"]))
            found["regions"] = self._shown(regions, found["status"])
            return
        with stages.timed("prompt"):
            prompt_embeddings = self._prompt(maps, pixels)
        with stages.timed("judge"):
            answers = self._judge(self._parts(image_embeddings, prompt_embeddings, seen), budget)
        with stages.timed("decide"):
            found.update(self._decide(seen, answers, regions, matches))

    def ask(self, frame: np.ndarray, question: str) -> Answer:
        """The model's answer to any question about a frame.

        Raises:
            ImageError: not a frame.
            ConfigError: the question is too long.
        """
        part = self.part(frame)
        return self._language.answer(
            part.image_embedding, part.prompt_embeddings, question, reading=part.reading
        )

    def dialogue(self, frame: np.ndarray) -> Dialogue:
        """Questions about a frame (of several views the one whose map is highest), each seeing the turns before it.

        Raises:
            ImageError: not a frame.
        """
        part = self.part(frame)
        dialogue = self._language.dialogue(part.image_embedding, part.prompt_embeddings, part.reading)
        dialogue.view = part.view
        return dialogue

    def part(self, frame: np.ndarray) -> Part:
        """What the language model is given of a frame, with the product's question; of several views that of the
        one whose map is highest.

        Raises:
            ImageError: not a frame, or of another size than the product's regions or tiles are for.
        """
        return max(self.parts(frame), key=lambda part: part.reading.score if part.reading else 0.0)

    def parts(self, frame: np.ndarray) -> list[Part]:
        """What the language model is given of each view of a frame; errors as for ``part``."""
        views = self._views(frame)
        pixels = self._preprocess(frame, views)
        image_embeddings, patch_features = self._encode(pixels)
        maps, _ = self._localise(patch_features)
        return self._parts(image_embeddings, self._prompt(maps, pixels), self._read(maps, views))

    def trace(self, frame: np.ndarray, question: str = "", max_tokens: int = 16) -> dict[str, np.ndarray]:
        """Everything that ``inspect`` computes on the way to its answer, for comparison with another program.

        Args:
            frame: uint8 [H, W, 3] BGR.
            question: "" asks the product's.
            max_tokens: where an answer that does not stop is cut.

        Returns:
            float32 ``pixels`` [1, 3, S, S], ``image_embedding`` [D], ``patch_features`` [T, P, V] (raw taps without
            CLS), ``text_features`` [2, E], ``anomaly_map`` [S, S], ``prompt_embeddings`` [num_prompts, D] and
            ``answer_logits`` [vocab] at the last prompt position; int32 ``prompt_token_ids`` [L], -1 where an
            embedding is injected, and ``answer_token_ids``, greedy, the stop token included.

        Raises:
            ImageError: not a frame.
            ConfigError: the question is too long, or the product has regions or tiles.
        """
        if not self.product.layout.is_whole:
            raise ConfigError("a trace is of whole frames: use a recipe without regions or tiles")
        question = question or self.product.question
        pixels = self._preprocess(frame, self._views(frame))
        image_embedding, patch_features = self._encode(pixels)
        anomaly_map, _ = self._localise(patch_features)
        prompt_embeddings = self._prompt(anomaly_map, pixels)
        answer = self._language.answer(image_embedding[0], prompt_embeddings[0], question, max_tokens)
        return {
            "pixels": pixels,
            "image_embedding": image_embedding[0],
            "patch_features": patch_features[0],
            "text_features": self.product.text_features,
            "anomaly_map": anomaly_map[0],
            "prompt_embeddings": prompt_embeddings[0],
            "prompt_token_ids": np.asarray(self._language.prompt.token_ids(question), np.int32),
            "answer_logits": answer.first_token_logits,
            "answer_token_ids": np.asarray(answer.token_ids, np.int32),
        }

    def _views(self, frame: np.ndarray) -> tuple[View, ...]:
        """What is looked at of a frame.

        Raises:
            ImageError: not a frame, or of another size than the product's regions or tiles are for.
        """
        return self.product.layout.views(check_frame(frame).shape[:2])

    def _preprocess(self, frame: np.ndarray, views: Sequence[View]) -> np.ndarray:
        """→ float32 [views, 3, S, S]."""
        settings = self.bundle.manifest.preprocess
        return preprocess(
            frame,
            settings.size,
            self.product.resize,
            settings.mean,
            settings.std,
            boxes=[view.box for view in views],
            threads=self._threads,
        )

    def _encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """→ image embeddings [views, D] in the language model's width, taps [views, T, P, V]."""
        outputs = self._networks["encoder"].run(pixels=pixels)
        return outputs["image_embedding"], outputs["patch_features"]

    def _localise(self, patch_features: np.ndarray) -> tuple[np.ndarray, Matches | None]:
        """→ anomaly maps [views, S, S]: distance to the normal samples, and to which; without any to texts."""
        size = self.bundle.manifest.preprocess.size
        if self.product.bank is not None:
            distance, nearest = self.product.bank.match(patch_features, self._threads)
            return upsample(distance, size, threads=self._threads), Matches(distance, nearest)
        inputs = {"patch_features": patch_features, "text_features": self.product.text_features}
        logits = self._networks["decoder"].run(**inputs)["patch_logits"]
        return localise(logits, size, threads=self._threads), None

    def _read(self, maps: np.ndarray, views: Sequence[View]) -> list[ViewResult]:
        """What each view's map shows: regions from the bundle's level on, or from half way to the peak of a map that
        does not reach it, as a part that is judged defective shall show where.

        Raises:
            ValueError: a map has a value that is not finite.
        """
        seen = []
        for view, anomaly_map in zip(views, maps, strict=True):
            figures = summarise(anomaly_map)
            if not math.isfinite(figures.peak):
                raise ValueError("the anomaly map is not finite")
            box_size = int(view.box.height), int(view.box.width)
            level = half_way_level(figures, self._trained_level)
            regions = find_regions(anomaly_map, level, box_size, self.product.resize)
            seen.append(ViewResult(*view, anomaly_map, figures.top_mean, figures.peak, regions))
        return seen

    def _summary(self, seen: Sequence[ViewResult]) -> dict[str, Any]:
        """What is known before anything is judged."""
        highest = max(seen, key=lambda view: view.score)
        return {
            "anomaly_map": highest.anomaly_map,
            "score": highest.score,
            "peak": max(view.peak for view in seen),
            "view": highest.name,
            "views": ()
            if self.product.layout.is_whole
            else tuple(replace(view, regions=self._at_level(view.regions)) for view in seen),
        }

    def _regions(
        self, seen: Sequence[ViewResult], maps: np.ndarray, frame_size: tuple[int, int]
    ) -> tuple[Region, ...]:
        """Of the frame."""
        if self.product.layout.is_whole:
            return seen[0].regions
        highest = summarise(max(seen, key=lambda view: view.peak).anomaly_map)
        level = half_way_level(highest, self._trained_level)
        boxes = [view.box for view in seen]
        return find_regions_of_views(maps, boxes, level, frame_size, self.product.resize, self._threads)

    def _prompt(self, maps: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """Of the maps, and of what the encoder was given of the same views → prompt embeddings
        [views, num_prompts, D]."""
        learner, bank = self.bundle.manifest.components["prompt_learner"], self.product.bank
        inputs = learner_inputs(learner, maps, 0 if bank is None else bank.num_samples, pixels)
        return self._networks["prompt_learner"].run(**inputs)["prompt_embeddings"]

    def _parts(
        self, image_embeddings: np.ndarray, prompt_embeddings: np.ndarray, seen: Sequence[ViewResult]
    ) -> list[Part]:
        """What the language model is given of each view."""
        question = self.product.question
        return [
            Part(
                image,
                prompt,
                question,
                read_map(view.anomaly_map, view.score, self._at_level(view.regions)),
                view.name,
            )
            for image, prompt, view in zip(image_embeddings, prompt_embeddings, seen, strict=True)
        ]

    def _judge(self, parts: Sequence[Part], budget: Budget) -> list[Answer]:
        """The answers of all views, as many at a time as the language model has room for."""
        timer = PassTimer(self.costs, self._clock, budget, len(parts))
        together = self._language.num_together(self.product.question)
        answers: list[Answer] = []
        for first in range(0, len(parts), together):
            group = parts[first : first + together]
            answers += self._language.answer_all(group, stop=timer.begin(len(group)))
            timer.lap()
        return answers

    def _decide(
        self,
        seen: Sequence[ViewResult],
        answers: Sequence[Answer],
        regions: tuple[Region, ...],
        matches: Matches | None,
    ) -> dict[str, Any]:
        """The language model decides, or its p(anomaly) at the recipe's operating point; the maps only say where."""
        names = [view.name for view in seen]
        words, point = self.bundle.manifest.prompt, self.product.operating_point
        statuses, deciding, found = decide_views(names, answers, words, point)
        view, answer = seen[deciding], answers[deciding]
        judged = (
            replace(
                view,
                status=status,
                p_anomaly=answer.p_anomaly,
                sentence=_spoken(answer),
                regions=self._shown(view.regions, status),
            )
            for view, status, answer in zip(seen, statuses, answers, strict=True)
        )
        return {
            **found,
            "p_anomaly": answer.p_anomaly,
            "sentence": _spoken(answer),
            "anomaly_map": view.anomaly_map,
            "view": view.name,
            "views": () if self.product.layout.is_whole else tuple(judged),
            "regions": self._shown(regions, found["status"]),
            "agreement": places_agree(answer.text, view.regions) if answer.affirmative else None,
            "most_like": self._most_like(seen, deciding, matches) if found["status"] is Status.FAIL else None,
            "rung": "sentence" if all(each.complete for each in answers) else "verdict",
        }

    def _most_like(self, seen: Sequence[ViewResult], index: int, matches: Matches | None) -> Likeness | None:
        """What the most anomalous patch of a view was compared with."""
        if matches is None or self.product.bank is None:
            return None
        worst = int(matches.distance[index].argmax())  # of 256 numbers, where a part fails: no work for a kernel
        number = self.product.bank.most_like(index, matches.nearest[index, :, worst])
        grid = self.bundle.manifest.vision.grid
        number, patch = divmod(number, grid**2)
        shared = len(self.product.bank.features) == 1
        sample, view = divmod(number, len(seen)) if shared else (number, index)
        row, column = divmod(patch, grid)
        place = place_name((row + 0.5) / grid, (column + 0.5) / grid)
        return Likeness(sample + 1, seen[view].name, place, (row, column))

    def _at_level(self, regions: tuple[Region, ...]) -> tuple[Region, ...]:
        """Those that reach the bundle's operating level, if there is one."""
        level = self._trained_level
        return tuple(region for region in regions if level is None or region.peak >= level)

    def _shown(self, regions: tuple[Region, ...], status: Status) -> tuple[Region, ...]:
        """All of a part that fails; of others what the bundle's operating level makes worth a look."""
        if status is Status.FAIL:
            return regions
        return () if self._trained_level is None else self._at_level(regions)

    @property
    def _trained_level(self) -> float | None:
        levels = self.bundle.manifest.region_level
        return levels.zero_shot if self.product.bank is None else levels.few_shot

    def _without_verdict(self, score: float) -> dict[str, Any]:
        """What the recipe wants of a part for whose answer there is no time.

        Raises:
            LateError: nothing: NO_RESULT.
        """
        late = "no time for the verdict before the deadline"
        point = self.product.operating_point
        if self.product.without_verdict == "map" and point is not None:
            return decide_by_map(score, point, late)
        raise LateError(late)

    def _warm_up(self) -> None:
        """The first frame is as fast as the rest, a bundle that cannot run says so now."""
        size, layout = self.bundle.manifest.preprocess.size, self.product.layout
        height, width = (layout.frame.height, layout.frame.width) if layout.frame else (size, size)
        for _ in range(WARM_UP_RUNS):
            try:
                self._language.answer_all(self.parts(np.full((height, width, 3), 128, np.uint8)))
            except AgptError:
                raise
            except Exception as error:
                raise BundleError(
                    f"{self.bundle.folder} does not run ({error}): re-run agpt export"
                ) from error


def prepare_product(
    bundle: Bundle, recipe: Path | str | Recipe | None = None, class_name: str | None = None
) -> Product:
    """A recipe with everything it names read and checked.

    Raises:
        RecipeError: the recipe or its memory bank cannot be used.
        ConfigError: the bundle does not know the class.
    """
    folder = None
    if isinstance(recipe, (Path, str)):
        folder = Path(recipe).parent
        recipe = load_recipe(recipe)
    recipe = recipe or Recipe(name=class_name or bundle.manifest.default_class)
    bank = None
    if recipe.memory_bank is not None:
        if folder is None:
            raise RecipeError(f"recipe {recipe.name!r} has a memory bank beside it: give the recipe's path")
        bank = load_bank(recipe.memory_bank, folder, bundle, recipe.layout)
    question = recipe.question or bundle.manifest.prompt.question
    return Product(
        name=recipe.name,
        text_features=bundle.text_features(class_name or recipe.class_name),
        bank=bank,
        question=f"{recipe.description} {question}".strip(),
        resize=recipe.resize or (bundle.manifest.preprocess.resize if recipe.layout.is_whole else "stretch"),
        operating_point=recipe.operating_point,
        without_verdict=recipe.without_verdict,
        layout=recipe.layout,
    )


def default_threads() -> int:
    """CPUs that this process may use, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_DEFAULT_THREADS)


class _Stages:
    """Milliseconds per stage, in the order they ran; a stage that fails is timed too."""

    def __init__(self, clock: Callable[[], float], costs: StageCosts) -> None:
        self.milliseconds: dict[str, float] = {}
        self._clock, self._costs = clock, costs

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._costs.add(stage, seconds)
            self.milliseconds[stage] = 1e3 * seconds


def _distinct_patches(vision: Vision) -> np.ndarray:
    """Indices of the patches of a view that do not overlap."""
    patches = np.arange(vision.grid**2).reshape(vision.grid, vision.grid)
    return patches[:: vision.shifts, :: vision.shifts].ravel()


def _spoken(answer: Answer) -> str:
    """A sentence that a deadline cut short is none."""
    return answer.text if answer.complete else ""


def _reason(error: Exception) -> str:
    """A user's error speaks for itself; another one says what it is."""
    return str(error) if isinstance(error, AgptError) else f"{type(error).__name__}: {error}"
