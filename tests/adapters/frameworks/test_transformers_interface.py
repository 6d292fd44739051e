"""What the installed Transformers' experts interface can say of a module: all of it is known, and what is not computed
is refused by its name. These tests fail where a newer version says more."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers")

import ramp_moe
import torch
from ramp_moe import KernelError
from ramp_moe_adapters.frameworks.transformers import flags as transformers_flags
from ramp_moe_adapters.frameworks.transformers.experts import TransformersExperts
from ramp_moe_adapters.frameworks.transformers.flags import COMPUTED, FP8_COMPUTED, TENSORS
from transformers.integrations import deepgemm, finegrained_fp8, moe, sonicmoe
from transformers_cases import GPU, fp8_experts, model_of

ADAPTER = TransformersExperts()
REFUSED = {"has_post_expert_norm"}
"""Flags that are known and refused where they are set."""
READ = COMPUTED | REFUSED | TENSORS | {"num_experts", "act_fn", "post_expert_norm", "block_size", "activation_scheme"}
READ_IN_FP8 = READ | {"linear", "_deepgemm_disabled"}
MEGAMOE = {"_megamoe_transformed", "symm_buffer"}
"""What `deepgemm_megamoe`, which is refused by its name, keeps on a module."""
GATES = {"gate_softcap", "up_softcap", "swiglu_alpha", "swiglu_limit", "limit"}
"""What fp8 experts' `_apply_gate` reads, which the adapter runs."""


def experts_of_olmoe() -> Any:
    return model_of("olmoe").model.layers[0].mlp.experts


def test_the_decorator_s_flags_are_known() -> None:
    flags = set(inspect.signature(moe.use_experts_implementation).parameters) - {"experts_class", "experts_interface"}
    assert flags <= COMPUTED | REFUSED, "teach transformers_flags.py what these are"
    assert set(transformers_flags._defaults()) <= COMPUTED | REFUSED
    assert flags <= set(transformers_flags._defaults()), "a flag that no module tells cannot be checked"
    assert set(transformers_flags._fp8_defaults()) <= FP8_COMPUTED


def forwards(integration: ModuleType) -> Iterator[FunctionType]:
    for name, function in vars(integration).items():
        if name.endswith("_experts_forward") and function.__module__ == integration.__name__:
            yield function


def attributes_of_self(function: Any) -> set[str]:
    """Names that it reads, or sets, on its first argument."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
    first = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)).args.args[0].arg
    found = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == first}
    called = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "getattr")
    return found | {ast.literal_eval(n.args[1]) for n in called if ast.unparse(n.args[0]) == first}


@pytest.mark.parametrize(
    ("integration", "known"),
    [(moe, READ), (sonicmoe, READ), (deepgemm, READ_IN_FP8 | MEGAMOE), (finegrained_fp8, READ_IN_FP8)],
    ids=lambda given: given.__name__.rpartition(".")[2] if isinstance(given, ModuleType) else "",
)
def test_what_stock_implementations_read_is_known(integration: ModuleType, known: set[str]) -> None:
    functions = list(forwards(integration))
    assert functions
    for function in functions:
        assert attributes_of_self(function) <= known, f"{function.__name__} reads more of a module than the adapter"


def test_what_fp8_experts_read_is_known() -> None:
    for name in ("forward", "linear"):
        function = inspect.unwrap(getattr(finegrained_fp8.FP8Experts, name))
        assert attributes_of_self(function) <= READ_IN_FP8
    assert attributes_of_self(finegrained_fp8.FP8Experts._apply_gate) <= GATES | {"act_fn"}
    assert attributes_of_self(moe._default_apply_gate) == {"act_fn"}


def of_a_newer_version(stock: Any) -> Any:
    """A decorator that knows one flag more, False by default."""

    def use_experts_implementation(experts_class: Any, has_third_matrix: Any = False) -> Any:
        decorated = stock(experts_class)
        before = decorated.__init__

        @functools.wraps(before)
        def with_flag(self: Any, config: Any) -> None:
            before(self, config)
            self.has_third_matrix = has_third_matrix

        decorated.__init__ = with_flag
        return decorated

    return use_experts_implementation


@pytest.mark.parametrize("value", [False, True, 2, "yes", [1]])
def test_a_flag_of_a_newer_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    module = experts_of_olmoe()
    module.has_third_matrix = value
    monkeypatch.setattr(moe, "use_experts_implementation", of_a_newer_version(moe.use_experts_implementation))
    monkeypatch.setattr(transformers_flags, "_defaults", transformers_flags._defaults.__wrapped__)
    if value is False:
        ADAPTER.weights(module)
        return
    with pytest.raises(KernelError, match=r"have has_third_matrix=.* \(transformers .*\), which ramp_moe does not"):
        ADAPTER.weights(module)


def test_an_argument_of_newer_fp8_experts_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fp8_experts()
    known = transformers_flags._fp8_defaults()
    monkeypatch.setattr(transformers_flags, "_fp8_defaults", lambda: known | {"rotation": None})
    ADAPTER.weights(module)
    module.rotation = "hadamard"
    with pytest.raises(KernelError, match=r"have rotation='hadamard' \(transformers"):
        ADAPTER.weights(module)


@pytest.mark.parametrize("name", ["output_scale", "per_expert_norm", "shift"])
def test_what_experts_hold_beside_their_projections_is_refused_by_name(name: str) -> None:
    module = experts_of_olmoe()
    if name == "output_scale":
        module.output_scale = torch.nn.Parameter(torch.ones(8))
    elif name == "shift":
        module.register_buffer("shift", torch.ones(8))
    else:
        module.per_expert_norm = torch.nn.LayerNorm(64)
    with pytest.raises(KernelError, match=f"its experts have {name} of their own, which ramp_moe does not compute"):
        ADAPTER.weights(module)


def test_rows_in_another_order_than_the_flag_says_are_refused() -> None:
    module = experts_of_olmoe()
    module.is_concatenated = False
    with pytest.raises(KernelError, match="is_concatenated is False, but its activation takes"):
        ADAPTER.weights(module)


def test_another_number_of_experts_than_of_weights_is_refused() -> None:
    model = model_of("olmoe")
    model.model.layers[1].mlp.experts.num_experts = 6
    with pytest.raises(
        KernelError, match=r"layers\.1\.mlp\.experts: num_experts is 6, but gate_up_proj holds 8 experts"
    ):
        ramp_moe.wrap(model, device="auto" if GPU else "h200")
