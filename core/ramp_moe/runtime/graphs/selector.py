"""The interface of what chooses among a graph's bodies on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .recorder import Recorder


class Selector(Protocol):
    """Chooses one of a cost table's candidates.

    choice: int32 `[1]`, the candidate's index. A launch writes it, in the order of the stream.
    """

    choice: Tensor

    def launch(
        self,
        topk_ids: Tensor,
        num_valid: Tensor | None = None,
        kernel_ids: Tensor | None = None,
        recorder: Recorder | None = None,
    ) -> object:
        """Choose a candidate for a batch, on the current stream.

        topk_ids: contiguous int32 or int64 `[T, k]`.
        num_valid: int32 `[1]`, number of tokens before the padding; None: there is no padding.
        kernel_ids: int32 `[T, k]`, which becomes the ids as kernels take them: -1 for padding. None: not wanted.
        recorder: records what was routed and chosen.

        Raises KernelError for arguments that it does not take.
        """
        ...
