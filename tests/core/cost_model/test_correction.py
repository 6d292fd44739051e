"""What was measured here corrects a cost model, size by size."""

from __future__ import annotations

import numpy as np
import pytest
from graph_cases import KINDS, SHAPE, priced, triton_of
from ramp_moe import Hardware, ProfileStore, Registry, expert_histogram, generate
from ramp_moe.cost_model.correction import Corrections
from ramp_moe.cost_model.model import CostModel
from ramp_moe.dispatch.dispatcher import Dispatcher
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.runtime.graphs.cost_table import CostTable
from select_cases import by_hand


def plain(hardware: Hardware) -> CostModel:
    """Without a residual."""
    return priced(hardware, triton_of())


@pytest.fixture(params=["plain", "smooth"])
def model(request: pytest.FixtureRequest, registry: Registry, shipped: ProfileStore, h200: Hardware) -> CostModel:
    if request.param == "plain":
        return plain(h200)
    return load_model(registry, shipped, registry.shape("olmoe-1b-7b", "fp8"), h200, ["triton"])[0]


def histogram(of: CostModel, tokens: int, kind: str = "uniform") -> np.ndarray:
    return expert_histogram(generate(kind, tokens, of.num_experts, of.shape.top_k), of.num_experts)


def factors(of: CostModel, *by_size: tuple[int, float]) -> Corrections:
    """Of every second candidate."""
    logs = np.log([factor for _, factor in by_size])
    return Corrections(tuple(n for n, _ in by_size), {c.name: logs for c in of.candidates[::2]})


def test_factors_are_interpolated_in_the_logarithms(model: CostModel) -> None:
    corrected = model.corrected(factors(model, (4, 2.0), (64, 0.5)))
    for tokens, factor in ((1, 2.0), (4, 2.0), (16, 1.0), (64, 0.5), (1000, 0.5)):
        at = np.exp(corrected.at(tokens).log_factors)
        assert at[::2] == pytest.approx(factor)
        assert at[1::2] == pytest.approx(1.0)


def test_costs_and_choices_follow(model: CostModel) -> None:
    corrected = model.corrected(factors(model, (16, 0.01)))
    counts = histogram(model, 16)
    contenders, even = model.contenders, model.contenders % 2 == 0
    us = corrected.at(16).cost(counts)[contenders]
    assert us[even] == pytest.approx(0.01 * model.cost(counts)[contenders][even])
    assert us[~even] == pytest.approx(model.cost(counts)[contenders][~even])
    index, predicted, _ = corrected.at(16).choose(counts)
    assert index % 2 == 0
    assert predicted == pytest.approx(us.min(), rel=1e-5)
    assert Dispatcher(corrected).choose(counts, 16).index == index
    assert (corrected.cost(counts) == model.cost(counts)).all(), "of no size in particular"


def test_what_is_left_of_a_model_stays_corrected(model: CostModel) -> None:
    corrected = model.corrected(factors(model, (16, 3.0)))
    gone = {model.candidates[1].name}
    for left in (corrected.without(gone).at(16), corrected.at(16).without(gone)):
        assert dict(zip([c.name for c in left.candidates], left.log_factors, strict=True)) == {
            c.name: pytest.approx(np.log(3.0) if i % 2 == 0 else 0.0) for i, c in enumerate(model.candidates) if i != 1
        }


def test_a_model_of_one_size_is_made_once(model: CostModel) -> None:
    corrected = model.corrected(factors(model, (16, 3.0)))
    assert corrected.at(16) is corrected.at(16)
    assert model.at(16) is model, "nothing was measured"


def test_the_device_is_given_the_factors(model: CostModel) -> None:
    corrected = model.corrected(factors(model, (16, 0.5))).at(16)
    columns = corrected.contenders[:6].tolist()
    table = CostTable.of(corrected, columns)
    for kind in ("uniform", "zipf1.2"):
        counts = histogram(model, 16, kind)
        assert by_hand(table, counts) == pytest.approx(corrected.cost(counts)[columns], rel=1e-3)


def test_triton_chooses_with_the_factors(h200: Hardware) -> None:
    """Of a model without a residual, whose table has constants alone."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from ramp_moe.runtime.graphs.selector_triton import TritonSelector

    model = plain(h200)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for i, candidate in enumerate(model.candidates):
        corrections = Corrections((64,), {candidate.name: np.log([0.01])})
        table = CostTable.of(model.corrected(corrections).at(64), list(range(len(model.candidates))))
        selector = TritonSelector(table, SHAPE.num_experts, torch.device(device))
        ids = torch.tensor(generate(KINDS[0], 64, SHAPE.num_experts, SHAPE.top_k), dtype=torch.int32, device=device)
        selector.launch(ids)
        assert selector.choice.item() == i
