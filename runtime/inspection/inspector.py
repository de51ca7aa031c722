"""The inspector, which turns frames into verdicts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..bundles.bundle import Augmentation, open_bundle
from ..common.errors import AgptError, BundleError, FrameError, LateError, RecipeError
from ..common.lifetime import Lifetime, single_threaded_blas
from ..common.machine import default_threads
from ..language.answer import Answer, Part
from ..language.dialogue import Dialogue
from ..language.model import LanguageModel
from ..recipes.recipe import Recipe
from ..vision.bank_builder import build_bank, learn_check
from ..vision.batches import Progress
from ..vision.engines import AUTO, choose_engine
from ..vision.frame_check import FrameCheck, refuse_patches, refuse_pixels
from ..vision.images import check_frame
from ..vision.memory_bank import MemoryBank, Storage
from ..vision.pipeline import VisionPipeline
from ..vision.views import FrameSize
from .assemble import Findings, assemble_verdict, make_parts, overrule_by_map, see_frame
from .budget import MAP_STAGES, VERDICT_STAGES, Budget, CostsOfViews, StageCosts
from .conversation import Conversation
from .decide import Decision, decide_by_map, decide_views
from .judge import judge
from .product import Product, prepare_product
from .verdict import Status, Verdict

WARM_UP_RUNS = 2
NO_TIME_FOR_MAP = "no time for the map before the deadline"
NO_TIME_FOR_VERDICT = "no time for the verdict before the deadline"


class Inspector:
    """Inspects frames of one product at a time.

    Calls from several threads run one after the other. A process that was forked after the inspector was opened cannot
    use it. While it is open, NumPy's BLAS runs on one thread.

    Attributes:
        bundle: the bundle that it runs.
        vision: computes maps and prompt embeddings from frames.
        language: answers questions from the embeddings.
        product: the product that is inspected; changed by ``use``.
        clock: current time in seconds; deadlines refer to it.
    """

    def __init__(
        self, vision: VisionPipeline, language: LanguageModel, product: Product, resources: ExitStack
    ) -> None:
        """
        Args:
            vision: the vision pipeline.
            language: the language model.
            product: the product to inspect.
            resources: ``close`` closes it; it must free all native memory, including that of ``vision`` and
                ``language``.
        """
        self.bundle = vision.bundle
        self.vision = vision
        self.language = language
        self.product = product
        self.clock = time.perf_counter
        self._costs = CostsOfViews()
        self._progress: Progress | None = None
        self._resources = resources
        self._lifetime = Lifetime("the inspector")
        self._lock = threading.RLock()

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
        """Check a bundle, load its networks, and run them as a warm-up. If this fails, all memory is freed.

        Args:
            bundle: the folder; the bundle that ships with the package when None.
            recipe: product settings; must be a path if the recipe has a memory bank.
            normals: normal frames, uint8 [H, W, 3] BGR, for a memory bank in this session only.
            class_name: replaces the recipe's class.
            threads: CPU threads; when None as many as this process may use, at most 8.
            engine: the engine for the networks; "auto" for the best that can run on this machine.

        Raises:
            BundleError, RecipeError, ConfigError, ImageError: the message is one sentence that names the fix.
        """
        opened = open_bundle(bundle)
        product = prepare_product(opened, recipe, class_name)
        threads = threads or default_threads()
        engine = choose_engine(opened, engine)
        manifest = opened.manifest
        with ExitStack() as stack:
            stack.enter_context(single_threaded_blas())
            vision = stack.enter_context(closing(VisionPipeline.open(opened, engine, threads)))
            gguf = opened.component_file("language_model")
            language = LanguageModel.open(gguf, manifest.prompt, manifest.language, threads)
            stack.enter_context(closing(language))
            inspector = cls(vision, language, product, stack)
            inspector._warm_up()
            if normals is not None:
                bank = inspector.make_bank(normals)
                inspector.use(bank)
                inspector.product = replace(inspector.product, check=inspector.learn_check(normals, bank))
            inspector._resources = stack.pop_all()
        return inspector

    @property
    def engine(self) -> str:
        """The engine that runs the networks."""
        return self.vision.engine

    @property
    def costs(self) -> StageCosts:
        """Expected durations of the stages for the product's number of views."""
        return self._costs.of(self.product.layout.num_views)

    def reset_costs(self) -> None:
        """Discard the measured durations of the stages, for example after the machine's load has changed."""
        self._costs = CostsOfViews()

    def watch(self, progress: Progress | None) -> None:
        """Show the progress of frames with many views.

        Args:
            progress: called in the thread of the inspection with the stage ("encode", "localise", "prompt" or
                "judge"), the number of views that have passed it and the number of views; None: nothing is called.
        """
        self._progress = progress
        self.vision.watch(progress)

    def close(self) -> None:
        """Free the models' native memory and restore NumPy's threads; may be called twice."""
        if self._lifetime.end():
            self._resources.close()

    def __enter__(self) -> Inspector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, recipe: Path | str | Recipe | None = None, class_name: str | None = None) -> Product:
        """Read and check a recipe and its files for ``use``; the inspector itself is not changed."""
        return prepare_product(self.bundle, recipe, class_name)

    def use(self, product: Product | MemoryBank | Recipe | Path | str | None) -> None:
        """Set the product to inspect.

        Args:
            product: a prepared product, a memory bank for the current product, or a recipe or its path, which is read
                and checked first; None for zero-shot with the bundle's defaults.

        Raises:
            RecipeError: the bank was made with another encoder or for other regions, or the recipe cannot be used.
            ClosedError: the inspector was closed.
        """
        with self._working():
            if isinstance(product, Product):
                self.product = product
            elif isinstance(product, MemoryBank):
                self.product = replace(self.product, bank=self._checked_bank(product), check=None)
            else:
                self.product = self.prepare(product)

    def make_bank(
        self,
        normals: Sequence[np.ndarray],
        storage: Storage = "float32",
        max_patches: int | None = None,
        augmentation: Augmentation | None = None,
        *,
        track: Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]] = iter,
    ) -> MemoryBank:
        """Memory bank of normal frames of the current product, uint8 [H, W, 3] BGR each; see ``build_bank``."""
        with self._working():
            return build_bank(
                self.vision, normals, self.product, storage, max_patches, augmentation, track=track
            )

    def learn_check(self, normals: Sequence[np.ndarray], bank: MemoryBank) -> FrameCheck:
        """The frame check of the normal frames of a memory bank of the current product; see ``bank_builder``."""
        with self._working():
            return learn_check(self.vision, normals, self.product, bank)

    def inspect(self, frame: np.ndarray, deadline: float | None = None) -> Verdict:
        """Inspect a frame, uint8 [H, W, 3] BGR of any size.

        An error while a frame is inspected is not raised: it gives NO_RESULT with the reason, never PASS.

        Args:
            frame: the frame.
            deadline: in seconds of ``clock``. Stages that are expected to end later are skipped: first the sentence,
                then the verdict, then the map; ``rung`` is the last one reached. Without a verdict the status is
                NO_RESULT, unless the recipe lets the map decide.

        Raises:
            ClosedError: the inspector was closed, or opened before a fork.
        """
        return self._run(frame, deadline)[1]

    def _run(self, frame: np.ndarray, deadline: float | None = None) -> tuple[Findings, Verdict]:
        """Inspect a frame; see ``inspect``."""
        with self._working():
            costs = self.costs
            timer = StageTimer(self.clock, costs)
            found = Findings(frame_size_of(frame))
            try:
                self._inspect(frame, found, timer, Budget(costs, self.clock, deadline))
                return found, self._assemble(found, timer)
            except Exception as error:
                found.decision = Decision(Status.NO_RESULT, reason_of(error))
                return found, self._assemble(found, timer)

    def _inspect(self, frame: np.ndarray, found: Findings, timer: StageTimer, budget: Budget) -> None:
        """Run the stages as far as the budget allows and put their results into ``found``.

        Raises:
            LateError: there is no time for a verdict or for a map.
            FrameError: the frame does not show the product.
        """
        vision, product = self.vision, self.product
        if not budget.fits(MAP_STAGES):
            raise LateError(NO_TIME_FOR_MAP)
        with timer.stage("preprocess"):
            views = vision.views(frame, product)
            refuse(refuse_pixels(frame, product.check))
            pixels = vision.preprocess(frame, views, product)
        with timer.stage("encode"):
            encoded = vision.encode(pixels)
        with timer.stage("localise"):
            localised = vision.localise(encoded, product)
            size = frame.shape[:2]
            seen = see_frame(views, localised, product, self._region_level, size, vision.threads)
            found.seen, found.rung = seen, "map"
            if product.check is not None and localised.matches is not None:
                distance, nearest, _ = localised.matches
                refuse(refuse_patches(distance, nearest, product.check, product.name))
        if not budget.fits(VERDICT_STAGES):
            found.decision = self._decide_without_answer(seen.views[seen.highest].score, seen.highest)
            return
        with timer.stage("prompt"):
            prompts = vision.prompt(localised.prompt_maps, pixels, product)
        with timer.stage("judge"):
            found.parts = make_parts(encoded, prompts, seen, product)
            answers = judge(
                self.language, found.parts, product.question, budget, self.costs, self.clock, self._progress
            )
        with timer.stage("decide"):
            names = [view.name for view in views]
            words = self.bundle.manifest.prompt
            found.answers = answers
            decision = decide_views(names, answers, words, product.operating_point)
            found.decision = overrule_by_map(decision, seen, answers, product)
            found.rung = "sentence" if all(answer.complete for answer in answers) else "verdict"

    def ask(self, frame: np.ndarray, question: str) -> Answer:
        """The language model's answer to a question about a frame (the view with the highest map score).

        Raises:
            ImageError: it is not a frame.
            ConfigError: the question is too long.
            ClosedError: the inspector was closed.
        """
        part = self.part(frame)
        return self.language.answer(
            part.image_embedding, part.prompt_embeddings, question, reading=part.reading
        )

    def dialogue(self, frame: np.ndarray) -> Conversation:
        """A conversation about a frame: questions about the decision are answered from the verdict, other questions by
        the language model about the view with the highest map score.

        Raises:
            ImageError: it is not a frame.
            ClosedError: the inspector was closed.
        """
        check_frame(frame)
        with self._working():
            found, verdict = self._run(frame)
            dialogue = None
            if found.seen is not None and found.parts:
                part = found.parts[found.seen.highest]
                dialogue = Dialogue(self.language, part.image_embedding, part.prompt_embeddings, part.reading)
                dialogue.view = part.view
            return Conversation(verdict, dialogue, self.product, self.product.question)

    def part(self, frame: np.ndarray) -> Part:
        """The language model's input for the view with the highest map score, with the product's question.

        Raises:
            ImageError: it is not a frame, or its size differs from that of the product's regions or tiles.
            ClosedError: the inspector was closed.
        """
        return max(self.parts(frame), key=lambda part: part.reading.score if part.reading else 0.0)

    def parts(self, frame: np.ndarray) -> list[Part]:
        """The language model's input for each view of a frame; errors as in ``part``."""
        with self._working():
            vision, product = self.vision, self.product
            views = vision.views(frame, product)
            pixels = vision.preprocess(frame, views, product)
            encoded = vision.encode(pixels)
            localised = vision.localise(encoded, product)
            size = frame.shape[:2]
            seen = see_frame(views, localised, product, self._region_level, size, vision.threads)
            prompts = vision.prompt(localised.prompt_maps, pixels, product)
            return make_parts(encoded, prompts, seen, product)

    def _assemble(self, found: Findings, timer: StageTimer) -> Verdict:
        grid = self.bundle.manifest.vision.grid
        return assemble_verdict(found, self.product, grid, timer.milliseconds, self.costs.milliseconds())

    @property
    def _region_level(self) -> float | None:
        """The level of regions in the maps' units: the bundle's, or the limit if the bundle's is for raw maps."""
        manifest, product = self.bundle.manifest, self.product
        if product.limit is not None and manifest.map_units == "raw":
            return product.limit
        levels = manifest.region_level
        return levels.zero_shot if product.bank is None else levels.few_shot

    def _checked_bank(self, bank: MemoryBank) -> MemoryBank:
        if bank.encoder_sha256 != self.bundle.encoder_sha256:
            raise RecipeError("the memory bank was made with another encoder: make it again with this bundle")
        if len(bank.features) != max(1, len(self.product.layout.regions)):
            raise RecipeError("the memory bank was made for other regions: make it again with this recipe")
        return bank

    def _decide_without_answer(self, score: float, deciding: int) -> Decision:
        """The decision by the map, if the recipe allows it, when there is no time for an answer.

        Raises:
            LateError: the recipe does not allow it.
        """
        point = self.product.operating_point
        if self.product.without_verdict == "map" and point is not None:
            return decide_by_map(score, point, NO_TIME_FOR_VERDICT, deciding)
        raise LateError(NO_TIME_FOR_VERDICT)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Allow one call at a time, and only while the inspector is open.

        Raises:
            ClosedError: the inspector was closed, or opened before a fork.
        """
        self._lifetime.check()
        with self._lock:
            yield

    def _warm_up(self) -> None:
        """Run all stages, so that the first frame takes no longer than later ones.

        Raises:
            BundleError: a stage of the bundle fails.
        """
        size, layout = self.bundle.manifest.preprocess.size, self.product.layout
        height, width = (layout.frame.height, layout.frame.width) if layout.frame else (size, size)
        for _ in range(WARM_UP_RUNS):
            try:
                self.language.answer_all(self.parts(np.full((height, width, 3), 128, np.uint8)))
            except AgptError:
                raise
            except Exception as error:
                raise BundleError(
                    f"{self.bundle.folder} does not run ({error}): re-run agpt export"
                ) from error


class StageTimer:
    """Measures the milliseconds of each stage, in the order of the stages; failing stages are measured too."""

    def __init__(self, clock: Callable[[], float], costs: StageCosts) -> None:
        self.milliseconds: dict[str, float] = {}
        self._clock, self._costs = clock, costs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._costs.add(name, seconds)
            self.milliseconds[name] = round(1e3 * seconds, 3)


def refuse(reason: str) -> None:
    """Raise ``FrameError`` if there is a reason."""
    if reason:
        raise FrameError(reason)


def frame_size_of(frame: object) -> FrameSize | None:
    """The size of an array [H, W, …]; None for an empty array or another object."""
    if not isinstance(frame, np.ndarray) or frame.ndim < 2 or 0 in frame.shape[:2]:
        return None
    height, width = frame.shape[:2]
    return FrameSize(width=width, height=height)


def reason_of(error: Exception) -> str:
    """An error's message; with its type if it is not one of ours, whose messages name the fix."""
    return str(error) if isinstance(error, AgptError) else f"{type(error).__name__}: {error}"
