"""The fused kernel's barriers: what each expects is what the roles do, as they are counted and as they are written."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from ramp_moe import KernelError, MoEShape
from ramp_moe_kernels.cute import barriers
from ramp_moe_kernels.cute.barriers import Arrivals, arriving, check, expected, expected_bytes, landing
from ramp_moe_kernels.cute.config import ELEMENT, GATHER_THREADS, ROW_BYTES, UP_ROWS, Config
from ramp_moe_kernels.cute.space import configurations, polymorphic

SHAPES = [MoEShape(8, 2, 8192, 128 * 12, dtype) for dtype in ELEMENT]  # for every `wide`
CONFIGS = [c for shape in SHAPES for c in (*configurations(shape), *polymorphic(shape))]
PLAIN = Config(16, 32, 8, 3)
PAIR = Config(48, 64, 4, 2, ctas=2, pair=True)
SPLIT = Config(16, 32, 8, 4, split_k=4)
SEVERAL = Config(32, 64, 4, 2, ctas=2, smaller=(8, 16))
HERE = Path(barriers.__file__).parent
ARRIVE = {"mbarrier_arrive", "mbarrier_arrive_and_expect_tx", "cp_async_mbarrier_arrive_noinc"}


def test_every_configuration_gets_what_it_waits_for() -> None:
    assert len(CONFIGS) > 200
    for c in CONFIGS:
        check(c)


def test_what_is_expected() -> None:
    assert expected(PLAIN) == Arrivals(1, 8, GATHER_THREADS, 8, 1)
    assert expected(PAIR, 2) == Arrivals(1, 8, GATHER_THREADS, 4, 1)  # two CTAs' four warps read the weights
    assert arriving(PAIR, paired=False) == [Arrivals(1, 4, GATHER_THREADS, 4, 0)] * 2
    assert expected_bytes(SPLIT) == Arrivals(UP_ROWS * ROW_BYTES, 0, 0, 0, 3 * 16 * UP_ROWS * 4)
    assert landing(SPLIT) == [expected_bytes(SPLIT)] * 4


@pytest.mark.parametrize("more", [1, -1])
@pytest.mark.parametrize("barrier", Arrivals._fields)
@pytest.mark.parametrize("what", ["arrivals", "bytes"])
@pytest.mark.parametrize("c", [PLAIN, PAIR, SPLIT, SEVERAL], ids=["plain", "pair", "split", "several"])
def test_another_count_is_refused_before_it_hangs(
    c: Config, what: str, barrier: str, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"arrivals": "expected", "bytes": "expected_bytes"}[what]
    right = getattr(barriers, name)

    def wrong(*given: object) -> Arrivals:
        found: Arrivals = right(*given)
        return found._replace(**{barrier: getattr(found, barrier) + more})

    monkeypatch.setattr(barriers, name, wrong)
    if barrier == "gathered" and c.split_k == 1:  # nothing waits for it
        check(c)
    else:
        with pytest.raises(KernelError, match=rf"bm.*: barrier {barrier} waits for -?\d+ {what}, gets \d+"):
            check(c)


@pytest.mark.parametrize("name", ["GATHER_THREADS", "PRODUCER_WARPS", "WEIGHTS_WARP", "OTHER_LANE"])
def test_a_role_that_moves_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever constant the roles branch by."""
    monkeypatch.setattr(barriers, name, {"OTHER_LANE": 32, "WEIGHTS_WARP": 4}.get(name, getattr(barriers, name) - 1))
    with pytest.raises(KernelError, match="waits for"):
        check(PAIR)


def arrivals_in(file: str) -> Counter[tuple[str, str]]:
    """Classes and barriers of every arrival that a source of the kernel has."""
    found = Counter[tuple[str, str]]()
    for role in (s for s in ast.parse((HERE / file).read_text()).body if isinstance(s, ast.ClassDef)):
        for call in (x for x in ast.walk(role) if isinstance(x, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr in ARRIVE:
                named = [x.attr for x in ast.walk(call.args[0]) if isinstance(x, ast.Attribute)]
                named += [x.id for x in ast.walk(call.args[0]) if isinstance(x, ast.Name)]
                found[role.name, next(n for n in named if n in Arrivals._fields)] += 1
    return found


def test_every_arrival_of_the_sources_is_counted() -> None:
    """A new one must be added to `barriers.py`, and here."""
    files = [f.name for f in HERE.glob("*.py") if f.name != "barriers.py"]
    assert sum((arrivals_in(f) for f in files), Counter()) == {
        ("WeightsProducer", "full_w"): 1,
        ("TokensProducer", "full_x"): 1,
        ("Consumer", "empty_w"): 2,  # this CTA's, and the other's of a pair
        ("Consumer", "empty_x"): 1,
        ("Consumer", "gathered"): 1,
    }
