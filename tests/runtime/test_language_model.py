"""The language model: injected embeddings in llama.cpp against torch, drafts, and the reading of answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomalygpt_edge.export.checkpoints import open_checkpoint_folder
from anomalygpt_edge.export.gguf_llm import write_gguf
from anomalygpt_edge.models import prompts
from anomalygpt_edge.models.anomalygpt import AnomalyGPT, AnomalyGPTConfig, assemble_prompt
from anomalygpt_edge.models.imagebind import VisionConfig
from anomalygpt_edge.models.llama import LlamaConfig
from anomalygpt_edge.models.nano.save import save_checkpoint
from anomalygpt_edge.models.prompt_learner import PromptLearnerConfig
from anomalygpt_edge.runtime.bundles.bundle import Language, PromptLayout, read_manifest
from anomalygpt_edge.runtime.common.errors import BundleError, ConfigError
from anomalygpt_edge.runtime.language.answer import Answer, Part
from anomalygpt_edge.runtime.language.decoding import Noise
from anomalygpt_edge.runtime.language.dialogue import Dialogue
from anomalygpt_edge.runtime.language.draft_tree import DraftTree, PrefixTree
from anomalygpt_edge.runtime.language.llama_session import LlamaSession
from anomalygpt_edge.runtime.language.model import LanguageModel
from anomalygpt_edge.runtime.language.pass_cost import fixed_costs
from anomalygpt_edge.runtime.language.sampling import Sampling

WIDTH = 128
MAX_RELATIVE_ERROR = 1e-2  # float16 weights and cache against float32 arithmetic
LAYOUT = PromptLayout(
    before_image=prompts.PIECE_BEFORE_IMAGE, after_image=prompts.PIECE_AFTER_IMAGE, num_prompts=18,
    assistant=prompts.PIECE_ASSISTANT, question=prompts.DEFAULT_QUESTION, affirmative=prompts.AFFIRMATIVE,
    negative=prompts.NEGATIVE, stop_piece=prompts.STOP_PIECE, turn_end=prompts.STOP_STRING,
)  # fmt: skip


@pytest.fixture(scope="module")
def nano(tiny_tokenizer: Path) -> AnomalyGPT:
    """Nano's language dimensions with random weights, so that every token depends on the whole prompt."""
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer)).get_piece_size()
    torch.manual_seed(1)
    model = AnomalyGPT(
        AnomalyGPTConfig(
            VisionConfig(width=16, depth=4, heads=2, mlp_width=16, embed_dim=8, tap_layers=(0, 1, 2, 3)),
            PromptLearnerConfig((1, 1, 1, 1, 1), llm_width=WIDTH),
            LlamaConfig(vocab_size, WIDTH, 384, 4, 4, max_position_embeddings=512),
        )
    ).requires_grad_(False)
    for name, parameter in model.llama.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter *= 3
    model.llama.load_state_dict({name: t.half().float() for name, t in model.llama.state_dict().items()})
    return model.eval()


@pytest.fixture(scope="module")
def gguf_file(nano: AnomalyGPT, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    features = {"object": np.eye(2, 8, dtype=np.float32)}
    save_checkpoint(nano, tiny_tokenizer, features, {"few_shot": None, "zero_shot": None}, folder)
    write_gguf(open_checkpoint_folder(folder).llama, folder / "llm.gguf", "nano")
    return folder / "llm.gguf"


@pytest.fixture(scope="module")
def expected(nano: AnomalyGPT) -> Language:
    return Language(WIDTH, nano.config.llama.vocab_size, 4, 512)


@pytest.fixture(scope="module")
def language(gguf_file: Path, expected: Language) -> Iterator[LanguageModel]:
    model = LanguageModel.open(gguf_file, LAYOUT, expected, threads=1)
    yield model
    model.close()


def injected(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=WIDTH).astype(np.float32), rng.normal(size=(18, WIDTH)).astype(np.float32)


def torch_prompt(nano: AnomalyGPT, tokenizer_file: Path, seed: int, question: str) -> torch.Tensor:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    pieces = (
        torch.tensor([[tokenizer.bos_id(), *tokenizer.encode(LAYOUT.before_image)]]),
        torch.tensor([tokenizer.encode(LAYOUT.after_image)]),
        torch.tensor([tokenizer.encode(question + LAYOUT.assistant)]),
    )
    image, rows = injected(seed)
    return assemble_prompt(nano.llama, pieces, torch.tensor(image)[None], torch.tensor(rows)[None])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("question", [prompts.DEFAULT_QUESTION, "Ünd was siehst du? <s> ##"])
def test_llama_cpp_computes_what_torch_computes(
    nano: AnomalyGPT, language: LanguageModel, tiny_tokenizer: Path, seed: int, question: str
) -> None:
    answer = plain(language, seed, 8, question)
    inputs = torch_prompt(nano, tiny_tokenizer, seed, question)
    for step, token in enumerate(answer.token_ids):
        logits = nano.llama(inputs)[0, -1]
        if step == 0:
            error = np.linalg.norm(answer.first_token_logits - logits.numpy()) / logits.norm()
            assert error <= MAX_RELATIVE_ERROR
        assert token == int(logits.argmax()), f"token {step}"
        inputs = torch.cat([inputs, nano.llama.embed(torch.tensor([[token]]))], dim=1)
    assert answer.num_passes == len(answer.token_ids)
    assert len(answer.token_ids) == 8 or answer.token_ids[-1] == 2, "cut, or ended by EOS"


def test_a_model_opened_without_drafting_runs_only_the_passes_of_its_answers(
    language: LanguageModel, gguf_file: Path, expected: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needed to compare a 13B export: when the file is larger than memory, every pass reads it from the disk."""
    passes = []
    decode = LlamaSession.decode
    monkeypatch.setattr(LlamaSession, "decode", lambda *given: passes.append(1) or decode(*given))
    model = LanguageModel.open(gguf_file, LAYOUT, expected, threads=1, drafting=False)
    try:
        answer = model.answer(*injected(0), max_tokens=3)
    finally:
        model.close()
    assert len(passes) <= 1 + len(answer.token_ids)  # the shared prefix, and one pass per token
    assert answer.token_ids == plain(language, 0, 3).token_ids


def test_the_answer_depends_on_every_injected_row(language: LanguageModel) -> None:
    image, rows = injected(0)
    base = language.answer(image, rows, max_tokens=1).first_token_logits
    changed = [language.answer(-image, rows, max_tokens=1)]
    for row in range(18):
        other = rows.copy()
        other[row] *= -1
        changed.append(language.answer(image, other, max_tokens=1))
    for answer in changed:
        assert np.linalg.norm(answer.first_token_logits - base) > 10 * MAX_RELATIVE_ERROR * np.linalg.norm(
            base
        )


def test_an_answer_does_not_influence_the_next_one(language: LanguageModel) -> None:
    first = language.answer(*injected(0), max_tokens=8)
    language.answer(*injected(1), "Something much longer than that, is it not?", max_tokens=20)
    again = language.answer(*injected(0), max_tokens=8)
    assert again.token_ids == first.token_ids
    np.testing.assert_array_equal(again.first_token_logits, first.first_token_logits)


def test_p_anomaly_is_the_softmax_of_two_logits(language: LanguageModel) -> None:
    answer = language.answer(*injected(0), max_tokens=1)
    words = language.first_tokens
    yes, no = answer.first_token_logits[[*words.affirmative, *words.negative]].astype(np.float64)
    assert answer.p_anomaly == pytest.approx(np.exp(yes) / (np.exp(yes) + np.exp(no)))


def test_the_limit_cuts_an_answer(language: LanguageModel) -> None:
    assert len(language.answer(*injected(0), max_tokens=5).token_ids) == 5


def test_an_answer_ends_where_the_context_does(gguf_file: Path, expected: Language) -> None:
    model = LanguageModel.open(gguf_file, LAYOUT, expected, threads=1, max_context=64)
    answer = model.answer(*injected(0), max_tokens=500)
    assert 0 < len(answer.token_ids) < 64
    with pytest.raises(ConfigError, match="positions"):
        model.answer(*injected(0), "a very long question " * 20)
    assert model.answer(*injected(0), max_tokens=500).token_ids == answer.token_ids
    model.close()


@pytest.mark.parametrize(
    ("image", "rows"),
    [
        (np.zeros(WIDTH - 1, np.float32), np.zeros((18, WIDTH), np.float32)),
        (np.zeros(WIDTH, np.float32), np.zeros((17, WIDTH), np.float32)),
        (np.full(WIDTH, np.nan, np.float32), np.zeros((18, WIDTH), np.float32)),
        (np.zeros(WIDTH, np.float32), np.full((18, WIDTH), np.inf, np.float32)),
    ],
    ids=["image shape", "rows shape", "nan", "inf"],
)
def test_rows_that_cannot_be_injected_are_refused(
    language: LanguageModel, image: np.ndarray, rows: np.ndarray
) -> None:
    with pytest.raises(ValueError, match="finite"):
        language.answer(image, rows)


def test_a_trained_answer_is_generated_and_stopped(tiny_bundle: Path, tiny_tokenizer: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    model = LanguageModel.open(tiny_bundle / "llm.gguf", manifest.prompt, manifest.language, threads=1)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    model.decoder.drafting = False
    answer = model.answer(np.zeros(64, np.float32), np.zeros((18, 64), np.float32))
    assert answer.text == "Yes, at the top left."
    assert answer.affirmative is True
    tokens = [
        *tokenizer.encode("Yes, at the top left."),
        tokenizer.piece_to_id("<0x0A>"),
        tokenizer.piece_to_id("##"),
    ]
    assert list(answer.token_ids) == tokens
    assert answer.num_passes == len(tokens)
    model.decoder.drafting, model.decoder.costs = True, fixed_costs([(1, 1.0), (1000, 1.0)])
    again = model.answer(np.zeros(64, np.float32), np.zeros((18, 64), np.float32))
    assert again.token_ids == answer.token_ids
    assert again.num_passes == 1, "a recent answer is expected"
    assert again.num_accepted == len(tokens) - 1
    model.close()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"stop_piece": "no such piece"}, "no stop token"),
        ({"affirmative": "No"}, "begin with the same token"),
    ],
)
def test_a_prompt_layout_that_does_not_fit_the_model_is_refused(
    gguf_file: Path, expected: Language, changes: dict[str, str], complaint: str
) -> None:
    with pytest.raises(BundleError, match=complaint):
        LanguageModel.open(gguf_file, msgspec.structs.replace(LAYOUT, **changes), expected, threads=1)


def test_a_file_that_only_llama_cpp_would_reject_is_a_bundle_error(
    gguf_file: Path, expected: Language, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = gguf_file.read_bytes()
    damaged = tmp_path / "llm.gguf"
    damaged.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(BundleError, match=r"llama\.cpp cannot load"):
        LanguageModel.open(damaged, LAYOUT, expected, threads=1)
    assert capfd.readouterr().err == "", "llama.cpp stays silent"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data, e: (data[: len(data) // 2], e), "outside the file|runs past"),
        (lambda data, e: (data.replace(b"general.architecture", b"general.architectura"), e), "architecture"),
        (lambda data, e: (data, msgspec.structs.replace(e, width=256)), "width is 128"),
        (lambda data, e: (data, msgspec.structs.replace(e, vocab_size=32000)), "vocabulary is"),
        (
            lambda data, e: (data.replace(b"tokenizer.ggml.pre", b"tokenizer.chat_tem")[:-1], e),
            "outside the file|unaligned",
        ),
    ],
    ids=["truncated", "not LLaMA-like", "width", "vocabulary", "cut by a byte"],
)
def test_llama_cpp_is_not_given_a_file_that_differs_from_the_manifest(
    gguf_file: Path,
    expected: Language,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[bytes, Language], tuple[bytes, Language]],
    complaint: str,
) -> None:
    def unreached(*_: object) -> None:
        pytest.fail("llama.cpp was given the file")

    monkeypatch.setattr("anomalygpt_edge.runtime.language.model.LlamaSession", unreached)
    data, wanted = change(gguf_file.read_bytes(), expected)
    (tmp_path / "llm.gguf").write_bytes(data)
    with pytest.raises(BundleError, match=complaint) as caught:
        LanguageModel.open(tmp_path / "llm.gguf", LAYOUT, wanted, threads=1)
    assert "\n" not in str(caught.value)


def test_the_file_may_move_while_the_model_is_open(
    gguf_file: Path, expected: Language, tmp_path: Path
) -> None:
    path = Path(shutil.copy(gguf_file, tmp_path / "llm.gguf"))
    model = LanguageModel.open(path, LAYOUT, expected, threads=1)
    before = model.answer(*injected(0), max_tokens=2).token_ids
    path.unlink()
    assert model.answer(*injected(0), "Another question?", max_tokens=2).token_ids
    assert model.answer(*injected(0), max_tokens=2).token_ids == before
    model.close()


def plain(language: LanguageModel, seed: int, max_tokens: int, question: str = "") -> Answer:
    language.decoder.drafting = False
    try:
        return language.answer(*injected(seed), question, max_tokens)
    finally:
        language.decoder.drafting = True


def drafted_from(language: LanguageModel, paths: list[list[int]], seed: int, max_tokens: int) -> Answer:
    """The answer when these token paths are drafted in every pass."""
    tree = PrefixTree(paths)

    def expect(question: str, reading: object, tokens: Sequence[int] = ()) -> object:
        node = tree.find(tokens)
        if node is None:
            node = -1  # a wrong draft, which must not change the answer
        return tree.below(node, np.full(len(paths), 1 / max(1, len(paths))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language.drafter, "expect", expect)
        patch.setattr(language.decoder, "costs", fixed_costs([(1, 1.0), (1000, 1.0)]))  # drafts cost nothing
        return language.answer(*injected(seed), max_tokens=max_tokens)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_answer_equals_plain_decoding_for_any_draft(language: LanguageModel, data: st.DataObject) -> None:
    """Drafts from the true answer: cut, wrong from some token on, one a prefix of another, empty, random."""
    seed, length = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 14))
    wanted = plain(language, seed, length)
    vocab = language.session.num_vocab
    token = st.integers(0, vocab - 1)
    true = list(wanted.token_ids)
    cut = st.integers(0, len(true)).map(lambda n: true[:n])
    wrong = st.tuples(cut, st.lists(token, max_size=6)).map(lambda pair: pair[0] + pair[1])
    paths = data.draw(st.lists(st.one_of(cut, wrong, st.lists(token, max_size=6)), max_size=12))
    answer = drafted_from(language, paths, seed, length)
    assert answer.token_ids == wanted.token_ids
    assert answer.text == wanted.text
    assert answer.p_anomaly == pytest.approx(wanted.p_anomaly, abs=language.decoder.noise.first)
    assert answer.num_accepted <= answer.num_tokens_drafted


@pytest.mark.parametrize("seed", range(4))
def test_a_right_draft_is_one_pass(language: LanguageModel, seed: int) -> None:
    wanted = plain(language, seed, 12)
    answer = drafted_from(language, [list(wanted.token_ids)[:-1], [5, 6, 7]], seed, 12)
    assert answer.token_ids == wanted.token_ids
    assert answer.redecoded or answer.num_passes == 1
    assert answer.num_accepted == len(wanted.token_ids) - 1


def test_a_tie_is_decoded_again_without_drafts(
    language: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plain(language, 0, 6)
    noise = Noise(1e9, 1e9, language.decoder.noise.min_rows)  # every token is a tie
    monkeypatch.setattr(language.decoder, "noise", noise)
    answer = drafted_from(language, [list(wanted.token_ids)], 0, 6)
    assert answer.redecoded
    assert answer.complete
    assert answer.token_ids == wanted.token_ids
    np.testing.assert_array_equal(answer.first_token_logits, wanted.first_token_logits)


def test_stop_is_called_between_passes(language: LanguageModel) -> None:
    wanted = plain(language, 0, 8)
    language.decoder.drafting = False
    answers = iter([False, False, True])
    answer = language.answer(*injected(0), max_tokens=8, stop=lambda: next(answers))
    language.decoder.drafting = True
    assert not answer.complete
    assert answer.token_ids == wanted.token_ids[:3]
    assert answer.p_anomaly == wanted.p_anomaly
    assert plain(language, 0, 8).token_ids == wanted.token_ids


@pytest.mark.parametrize("count", [2, 3, 8])
def test_several_parts_together_get_the_same_answers_as_alone(language: LanguageModel, count: int) -> None:
    parts = [Part(*injected(seed), question=f"Is {seed} right?") for seed in range(count)]
    alone = [
        language.answer(part.image_embedding, part.prompt_embeddings, part.question, 10) for part in parts
    ]
    for drafting in (False, True):
        language.decoder.drafting = drafting
        together = language.answer_all(parts, 10)
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.p_anomaly == pytest.approx(other.p_anomaly, abs=language.decoder.noise.later)
    assert sum(answer.num_passes for answer in together) < sum(answer.num_passes for answer in alone) * count


def test_more_parts_than_fit_into_the_context_are_answered_in_groups(
    gguf_file: Path, expected: Language
) -> None:
    model = LanguageModel.open(gguf_file, LAYOUT, expected, threads=1, max_context=160)
    parts = [Part(*injected(seed)) for seed in range(5)]
    together = model.answer_all(parts, 6)
    assert [a.token_ids for a in together] == [
        model.answer(p.image_embedding, p.prompt_embeddings, max_tokens=6).token_ids for p in parts
    ]
    model.close()


def test_sampling_uses_no_drafts_and_is_repeatable(language: LanguageModel) -> None:
    greedy = plain(language, 0, 8)
    nearly = language.answer(*injected(0), max_tokens=8, sampling=Sampling(top_p=1e-9))
    assert nearly.token_ids == greedy.token_ids
    assert nearly.num_tokens_drafted == 0
    hot = [
        language.answer(*injected(0), max_tokens=8, sampling=Sampling(temperature=50, seed=seed)).token_ids
        for seed in (1, 1, 2)
    ]
    assert hot[0] == hot[1] != hot[2]
    with pytest.raises(ConfigError, match="temperature"):
        Sampling(temperature=0)


def test_the_noise_bounds_hold_on_drafted_passes(language: LanguageModel) -> None:
    """Logits of the first tokens, with and without drafts in the pass."""
    noise = language.decoder.noise
    assert 0 < noise.first <= noise.later < 0.5
    for seed in range(6):
        image, rows = injected(seed)
        prompt = language.prompt(Part(image, rows))

        def draft(tokens: list[int]) -> DraftTree:
            tree = PrefixTree([tokens, *([i, i, i] for i in range(20) if i != tokens[0])])
            return tree.draft(-1, np.arange(len(tree.tokens)), 64)

        alone, beside = language.decoder.compare(prompt, 3, draft)
        for bound, one, other in zip([noise.first, *[noise.later] * 3], alone, beside, strict=True):
            top = np.argsort(one)[-2:]
            assert abs(np.diff(one[top] - other[top])[0]) < bound


def test_only_the_tokens_up_to_a_tie_are_decoded_again(language: LanguageModel) -> None:
    wanted = plain(language, 0, 12)
    noise = Noise(1e9, 0.0, language.decoder.noise.min_rows)  # the first token ties, no other does
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language.decoder, "noise", noise)
        answer = drafted_from(language, [list(wanted.token_ids)[:-1]], 0, 12)
    assert answer.redecoded
    assert answer.token_ids == wanted.token_ids
    assert answer.num_passes == 2
    dialogue = Dialogue(language, *injected(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language.decoder, "noise", noise)
        first = dialogue.ask("", 12)
    again = Dialogue(language, *injected(0))
    assert first.token_ids == again.ask("", 12).token_ids == wanted.token_ids
    assert dialogue.ask("And now?", 6).token_ids == again.ask("And now?", 6).token_ids, (
        "fewer positions are cached"
    )


def test_drafts_do_not_change_the_first_tokens_logits(language: LanguageModel) -> None:
    """A padded prompt is computed in the same steps with and without drafts."""
    if language.decoder.noise.first > 0.1 * language.decoder.noise.later:
        pytest.skip("on this machine padding a prompt's pass does not reduce the noise")
    for seed in range(4):
        alone = plain(language, seed, 1)
        beside = drafted_from(language, [[i, i, i] for i in range(20)], seed, 4)
        moved = np.ptp(beside.first_token_logits - alone.first_token_logits)
        assert moved < language.decoder.noise.first
