"""Language models with 7B's layers and generated weights: what they are, and that drafts change nothing they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from anomalygpt_edge.models import prompts
from anomalygpt_edge.runtime.bundles.bundle import Language, PromptLayout
from anomalygpt_edge.runtime.language.answer import Answer, Part
from anomalygpt_edge.runtime.language.draft_tree import PrefixTree
from anomalygpt_edge.runtime.language.gguf_header import check_language_model, read_header
from anomalygpt_edge.runtime.language.model import LanguageModel
from anomalygpt_edge.runtime.language.pass_cost import fixed_costs
from tools.random_gguf import WIDTH, write_random_gguf

VOCABULARY = 2400
MAX_TOKENS = 32
LAYOUT = PromptLayout(
    before_image=prompts.PIECE_BEFORE_IMAGE, after_image=prompts.PIECE_AFTER_IMAGE, num_prompts=18,
    assistant=prompts.PIECE_ASSISTANT, question=prompts.DEFAULT_QUESTION, affirmative=prompts.AFFIRMATIVE,
    negative=prompts.NEGATIVE, stop_piece=prompts.STOP_PIECE, turn_end=prompts.STOP_STRING,
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("random")
    write_random_gguf(folder / "forced.gguf", 1, VOCABULARY)
    write_random_gguf(folder / "free.gguf", 1, VOCABULARY, forced=False, seed=1)
    return {name: folder / f"{name}.gguf" for name in ("forced", "free")}


@pytest.fixture(scope="module", params=["forced", "free"])
def language(files: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[LanguageModel]:
    model = LanguageModel.open(
        files[request.param], LAYOUT, Language(WIDTH, VOCABULARY, 1, 2048), threads=2, max_context=512
    )
    yield model
    model.close()


def part(seed: int) -> Part:
    rng = np.random.default_rng(seed)
    return Part(rng.normal(size=WIDTH).astype(np.float32), rng.normal(size=(18, WIDTH)).astype(np.float32))


def plain(language: LanguageModel, seed: int) -> Answer:
    language.decoder.drafting = False
    try:
        return language.answer_all([part(seed)], MAX_TOKENS)[0]
    finally:
        language.decoder.drafting = True


def drafted(language: LanguageModel, seed: int, paths: Sequence[Sequence[int]] | None = None) -> Answer:
    """With these paths drafted in every pass; what was learned when None."""
    with pytest.MonkeyPatch.context() as patch:
        if paths is not None:
            tree = PrefixTree(paths)

            def expect(question: str, reading: object, spoken: Sequence[int] = ()) -> object:
                node = tree.find(spoken)
                return tree.below(-1 if node is None else node, np.full(len(paths), 1 / max(1, len(paths))))

            patch.setattr(language.drafter, "expect", expect)
            patch.setattr(language.decoder, "costs", fixed_costs([(1, 1.0), (1000, 1.0)]))
        return language.answer_all([part(seed)], MAX_TOKENS)[0]


def adversarial(true: list[int], rng: np.random.Generator) -> list[list[list[int]]]:
    """Wrong from the first, a middle and the last token on; one the beginning of another; unknown tokens; empty."""
    wrong = rng.integers(0, VOCABULARY, (3, 6)).tolist()
    half = len(true) // 2
    return [
        [true],
        [true[:half], true, [*true[:half], *wrong[0]], wrong[1]],
        [[*true[:-1], *wrong[2]], true[:1], true[:2], true[:half]],
        wrong,
        [],
        [[]],
    ]


def check_exact(language: LanguageModel, seeds: range) -> int:
    """How many answers tied."""
    num_settled = 0
    for seed in seeds:
        wanted = plain(language, seed)
        rng = np.random.default_rng(seed)
        for paths in (None, *adversarial(list(wanted.token_ids[:-1]), rng)):
            answer = drafted(language, seed, paths)
            assert answer.token_ids == wanted.token_ids, (seed, paths)
            assert answer.p_anomaly == pytest.approx(wanted.p_anomaly, abs=language.decoder.noise.first)
            num_settled += answer.redecoded
    return num_settled


def test_a_generated_model_is_what_a_manifest_would_say(files: dict[str, Path], tmp_path: Path) -> None:
    header = read_header(files["forced"])
    check_language_model(files["forced"], header, Language(WIDTH, VOCABULARY, 1, 2048))
    kinds = {name: info.type for name, info in header.tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q4_K"
    assert kinds["output.weight"] == "Q8_0"
    assert header.tensors["blk.0.ffn_down.weight"].shape == (WIDTH, 11008)


@pytest.mark.slow
def test_a_forced_model_says_its_answer_and_a_free_one_something_else_each_time(
    files: dict[str, Path],
) -> None:
    said = {}
    for name, path in files.items():
        model = LanguageModel.open(
            path, LAYOUT, Language(WIDTH, VOCABULARY, 1, 2048), threads=2, max_context=512
        )
        said[name] = [plain(model, seed).token_ids for seed in range(3)]
        stops = model.stops
        model.close()
    assert len(set(said["forced"])) == 1
    assert said["forced"][0][-1] in stops
    assert 15 < len(said["forced"][0]) < MAX_TOKENS
    assert len(set(said["free"])) == 3


def test_drafts_change_nothing_at_7b_dimensions(language: LanguageModel) -> None:
    check_exact(language, range(1))


@pytest.mark.slow
def test_drafts_change_nothing_in_many_answers_at_7b_dimensions(language: LanguageModel) -> None:
    print(f"{check_exact(language, range(100, 130))} of 210 answers settled by plain decoding")
