"""A thousand parts of the demo line: answers with drafts equal those of plain greedy decoding. Takes minutes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from anomalygpt_edge.runtime.cameras import open_camera
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.station.run import enroll_demo_products

NUM_PARTS = 1000


@pytest.mark.slow
def test_a_thousand_drafted_answers_equal_plain_decoding() -> None:
    num_passes: Counter[int] = Counter()
    num_redecoded = 0
    with Inspector.open(threads=1) as inspector:
        language = inspector.language
        products = enroll_demo_products(inspector)
        for frame in open_camera("demo", num_parts=NUM_PARTS, seed=7).frames():
            inspector.use(products[frame.product])
            assert frame.pixels is not None
            part = inspector.part(frame.pixels)
            language.decoder.drafting = False
            (plain,) = language.answer_all([part])
            language.decoder.drafting = True
            (drafted,) = language.answer_all([part])
            assert drafted.token_ids == plain.token_ids, frame.part_id
            top = np.argsort(plain.first_token_logits)[-2:]
            apart = np.diff(plain.first_token_logits[top] - drafted.first_token_logits[top])[0]
            assert abs(apart) < language.decoder.noise.first, "within the noise measured at opening"
            num_passes[drafted.num_passes] += 1
            num_redecoded += drafted.redecoded
    print(f"passes {dict(num_passes)}, {num_redecoded} decoded again")
    assert num_passes[1] >= 0.97 * NUM_PARTS
    assert num_redecoded <= 0.02 * NUM_PARTS
