from __future__ import annotations

import numpy as np
import pytest
from ramp_moe import Dispatcher, Hardware, MoEShape, ProfileError, ProfileStore, RoutingError, UnknownNameError
from ramp_moe.evaluation.replay import Replay


@pytest.fixture
def dispatcher(replay: Replay) -> Dispatcher:
    return Dispatcher(replay.fit())


def test_chooses_the_lowest_prediction(dispatcher: Dispatcher, replay: Replay) -> None:
    for histogram in replay.histograms:
        choice = dispatcher.choose(histogram)
        us = dispatcher.model.predict(histogram).us
        assert choice.index == us.argmin()
        assert choice.predicted_us == us.min()
        assert choice.candidate == dispatcher.model.candidates[choice.index]
        assert not choice.extrapolated


def test_a_batch_unlike_any_fitted_is_flagged(dispatcher: Dispatcher) -> None:
    assert dispatcher.choose([10**6] * 64).extrapolated


def test_the_choice_depends_on_the_spread_and_not_only_on_the_number(dispatcher: Dispatcher) -> None:
    spread = np.full(64, 16)
    crowded = np.zeros(64, np.int64)
    crowded[:2] = 512
    assert spread.sum() == crowded.sum()
    assert dispatcher.choose(spread).candidate != dispatcher.choose(crowded).candidate


def test_lists_are_taken_and_bad_histograms_refused(dispatcher: Dispatcher) -> None:
    assert dispatcher.choose([1] * 8 + [0] * 56, num_tokens=1).predicted_us > 0
    with pytest.raises(RoutingError, match="has 63 entries, the shape has 64 experts"):
        dispatcher.choose([1] * 63)
    with pytest.raises(RoutingError, match="counts 9 ids, more than tokens x top_k = 8"):
        dispatcher.choose([1] * 9 + [0] * 55, num_tokens=1)
    with pytest.raises(RoutingError, match="one expert histogram, not a batch"):
        dispatcher.choose(np.ones((2, 64), np.int64))


def test_for_a_named_model(shipped: ProfileStore, olmoe: MoEShape, h200: Hardware) -> None:
    _, sweep = shipped.require("alpha_moe", olmoe, h200)
    found = Dispatcher.for_model("olmoe-1b-7b", "h200", ["alpha_moe"]).model.candidates
    assert len(found) == sum(c.stage == "path" for c in sweep.record.columns) > 20
    with pytest.raises(UnknownNameError, match="unknown kernel 'alpha_mo'; did you mean 'alpha_moe'"):
        Dispatcher.for_model("olmoe-1b-7b", "h200", ["alpha_mo"])
    with pytest.raises(ProfileError, match=r"no sweep of vllm_triton for kimi-k2"):
        Dispatcher.for_model("kimi-k2", "h200", ["vllm_triton"])
