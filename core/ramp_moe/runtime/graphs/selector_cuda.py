"""Chooses a candidate on the device, in one launch of `select.cu`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from . import nvrtc
from .cost_table import CostTable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .recorder import Recorder

SOURCE = Path(__file__).with_name("select.cu")
THREADS = 1024
MAX_EXPERTS, MAX_IDS, MAX_NODES = 1024, 65_536, 128
_POINTERS = ("ids", "num_valid", "choice", "histogram", "kernel_ids", "cost", "last", "ring", "counter")
_ARRAYS = (
    "blocks", "grid_block", "grid_ctas", "grid_cluster", "grid_slots", "grid_work", "launch_of", "coefficients",
    "floor", "first", "parts", "unit", "points", "set_block", "set_of", "constant", "label", "weights",
)  # fmt: skip
_SIZES = (
    "num_shared", "num_blocks", "num_launches", "num_grids", "num_parts", "num_candidates", "num_sets", "num_rows",
    "num_ids", "top_k", "wide", "num_experts", "slots", "num_nodes",
)  # fmt: skip


class Params(ctypes.Structure):
    """`Params` of select.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("handle", ctypes.c_uint64),
        ("nodes", ctypes.c_uint64 * MAX_NODES),
        ("table", ctypes.c_void_p),
        ("at", ctypes.c_int * len(_ARRAYS)),
        *((name, ctypes.c_int) for name in _SIZES),
        ("body_of", ctypes.c_uint8 * MAX_NODES),
    )


def packed(table: CostTable) -> tuple[NDArray[np.int32], list[int]]:
    """The table's arrays one after the other, as words, and the word at which each begins: a multiple of four."""
    at, words = [], []
    size = 0
    for name in _ARRAYS:
        array = np.ascontiguousarray(getattr(table, name)).ravel().view(np.int32)
        at.append(size)
        words += [array, np.zeros(-len(array) % 4, np.int32)]
        size += len(array) + len(words[-1])
    return np.concatenate(words), at


class Launch:
    """Arguments of one launch. They must live until a capture has added its nodes to them."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))

    @property
    def address(self) -> int:
        """The address that the driver takes as kernelParams."""
        return ctypes.addressof(self._arguments)


class CudaSelector:
    """Chooses among a table's candidates. A launch writes its attributes, in the order of the stream.

    choice: int32 `[1]`, index of the cheapest candidate, the first of equal ones.
    histogram: int32 `[E]`, of the batch.
    cost: float32 `[C]`, microseconds of each candidate; None without with_cost.

    Raises KernelError for more than MAX_EXPERTS experts, for a table that does not fit into shared memory, and if the
    kernel cannot be compiled.
    """

    def __init__(self, table: CostTable, num_experts: int, device: torch.device, with_cost: bool = False) -> None:
        import torch

        if num_experts > MAX_EXPERTS:
            raise KernelError(f"choosing on the device takes {MAX_EXPERTS} experts at most, not {num_experts}")
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.function, room = nvrtc.load(SOURCE, "select_candidate", index)
        self.num_experts = num_experts
        self.choice = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.histogram = torch.zeros(num_experts, dtype=torch.int32, device=self.device)
        self.cost = torch.zeros(table.num_candidates, dtype=torch.float32, device=self.device) if with_cost else None
        words, at = packed(table)
        self._table = torch.from_numpy(words).to(self.device)
        # The weights of many candidates may not fit into shared memory. They are then read from global memory.
        num_shared = len(words) if 4 * len(words) <= room else at[_ARRAYS.index("weights")]
        if 4 * num_shared > room:
            raise KernelError(f"a cost model of {4 * num_shared} bytes does not fit into {room}: give fewer candidates")
        self._shared_bytes = 4 * num_shared
        sizes = {
            "num_shared": num_shared,
            "num_experts": num_experts,
            "num_blocks": len(table.blocks),
            "num_launches": table.grid_block.shape[1],
            "num_grids": table.grid_block.shape[0],
            "num_parts": len(table.floor),
            "num_candidates": table.num_candidates,
            "num_sets": len(table.unit),
            "num_rows": len(table.weights),
        }
        outputs = {"choice": self.choice, "histogram": self.histogram, "table": self._table, "cost": self.cost}
        addresses = {name: t.data_ptr() for name, t in outputs.items() if t is not None}
        self._common: dict[str, Any] = {**addresses, **sizes, "at": (ctypes.c_int * len(at))(*at)}

    def launch(
        self,
        topk_ids: Tensor,
        num_valid: Tensor | None = None,
        kernel_ids: Tensor | None = None,
        recorder: Recorder | None = None,
        handle: int = 0,
        last: Tensor | None = None,
    ) -> Launch:
        """Choose a candidate for a batch as `Selector.launch` describes it.

        kernel_ids: ids out of range become -1, too.
        handle: of the conditional node to set to the choice; 0: there is none.
        last: int32 `[1]`, what the nodes are set to, -1 at first. Required if nodes are added to the launch later.

        Raises KernelError for ids that it does not take, and for a recorder of other sizes.
        """
        import torch
        from cuda.bindings import driver

        if topk_ids.dtype not in (torch.int32, torch.int64) or not topk_ids.is_contiguous():
            raise KernelError(f"topk_ids must be contiguous int32 or int64, not {topk_ids.dtype}")
        if topk_ids.device != self.device:
            raise KernelError(f"topk_ids is on {topk_ids.device}, the choice is made on {self.device}; move it there")
        if topk_ids.numel() > MAX_IDS:
            raise KernelError(f"choosing on the device takes {MAX_IDS} routed ids at most, not {topk_ids.numel()}")
        given = {"ids": topk_ids, "num_valid": num_valid, "kernel_ids": kernel_ids, "last": last}
        if recorder is not None:
            recorder.check(self.num_experts, topk_ids.shape[1], self.device)
            given |= {"ring": recorder.ring, "counter": recorder.counter}
        addresses = {name: t.data_ptr() for name, t in given.items() if t is not None}
        launch = Launch(
            Params(
                **self._common, **addresses, handle=handle, num_ids=topk_ids.numel(), top_k=topk_ids.shape[1],
                wide=int(topk_ids.dtype == torch.int64), slots=0 if recorder is None else len(recorder.ring),
            )
        )  # fmt: skip
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            done = driver.cuLaunchKernel(
                self.function, 1, 1, 1, THREADS, 1, 1, self._shared_bytes, stream, launch.address, 0
            )
        nvrtc.checked(done, "launching the choice of a kernel")
        return launch
