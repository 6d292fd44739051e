"""Random layers, each right or refused: a few in Triton's interpreter here, many on a GPU.

pytest tests/core/runtime/test_fuzz.py --fuzz-layers 3000 --fuzz-seed 7
"""

from __future__ import annotations

import pytest
import torch
from fuzz_cases import TINY, Fuzz, Tally, activated
from ramp_moe import Hardware, get_registry
from ramp_moe.registry.detect import detect
from ramp_moe.spec.launchable import ACTIVATIONS, LaunchableKernel
from ramp_moe_kernels.triton.kernel import TritonMoE

LAYERS_OF_A_VARIANT = 250


def judged(fuzz: Fuzz, layers: int) -> Tally:
    for number in range(layers):
        fuzz.run(number)
        if len(fuzz.tally.wrong) == 5:
            break
    assert not fuzz.tally.wrong, "\n".join([*fuzz.tally.wrong, str(fuzz.tally)])
    return fuzz.tally


def test_tiny_layers_are_right_or_refused(h200: Hardware, seed: int) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton's kernels are compiled here; see the test of a GPU")
    tally = judged(Fuzz(seed, [TritonMoE()], h200, torch.device("cpu"), 4, TINY), 10)
    assert tally.right >= 4


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_every_activation_has_a_reference_here(kind: str) -> None:
    gate, up = torch.randn(2, 50, generator=torch.Generator().manual_seed(1)) * 3
    assert activated(gate, up, kind).isfinite().all()


@pytest.mark.parametrize("fault", ["zeros", "one token", "an expert too few", "outside", "raises"])
def test_what_is_wrong_is_found(fault: str, h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: kernels that compute something else do not pass."""

    class Faulty(TritonMoE):
        def launch(self, config, prepared, batch, out, workspace):  # type: ignore[no-untyped-def]
            import fuzz_cases

            ids = batch.topk_ids
            if fault == "an expert too few":
                ids = torch.where(ids == ids.clamp(0, len(prepared.down) - 1).max(), -1, ids)
            wanted, _ = fuzz_cases.expected(prepared, batch.hidden_states, ids, batch.topk_weights, False)
            out.copy_(wanted)
            if fault == "zeros":
                out.zero_()
            if fault == "one token":
                out[0] += out[0].norm() / len(out[0]) ** 0.5 / 8
            if fault == "outside":
                out.as_strided((1, out.shape[1]), out.stride(), out.storage_offset() - out.shape[1]).zero_()
            if fault == "raises":
                raise ZeroDivisionError

        def readable_layouts(self, shape):  # type: ignore[no-untyped-def]
            return ("gate-first",)

        def unsupported(self, shape, hardware):  # type: ignore[no-untyped-def]
            return "fp8 is left out" if shape.dtype == "fp8" else super().unsupported(shape, hardware)

    fuzz = Fuzz(1, [Faulty()], h200, torch.device("cpu"), 4, TINY)
    for number in range(20):
        fuzz.run(number)
    assert len(fuzz.tally.wrong) >= 5, str(fuzz.tally)


@pytest.mark.gpu
def test_gpu_layers_are_right_or_refused(seed: int, layers: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every kernel that runs here, and of the dispatcher."""
    hardware, device = detect(), torch.device("cuda", torch.cuda.current_device())
    found = get_registry().kernels.values()
    kernels = [k for k in found if isinstance(k, LaunchableKernel) and _is_ready(k)]
    kernels.sort(key=lambda kernel: kernel.name != "triton")
    variants = max(4, min(8, layers // LAYERS_OF_A_VARIANT))
    fuzz = Fuzz(seed, kernels, hardware, device, variants)
    tally = judged(fuzz, layers)
    with capsys.disabled():
        print(f"\nseed {seed}, {', '.join(kernel.name for kernel in kernels)}: {tally}")
    assert tally.right >= layers // 2


def _is_ready(kernel: LaunchableKernel) -> bool:
    """Runs here, without hours of compilation first."""
    if kernel.unavailable() is not None:
        return False
    if kernel.name == "flashinfer_cutlass":
        from ramp_moe_adapters.kernels.flashinfer_cutlass import build as flashinfer_cutlass_build

        return flashinfer_cutlass_build.ready()
    return True


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz-seed"))


@pytest.fixture
def layers(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz-layers"))
