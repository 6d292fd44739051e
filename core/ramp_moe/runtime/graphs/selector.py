"""What a graph asks of whatever chooses among its bodies on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .recorder import Recorder


class Selector(Protocol):
    """Chooses one of a cost table's candidates.

    choice int32 `[1]`: the candidate's index, after a launch in the order of the stream.
    """

    choice: Tensor

    def launch(
        self,
        topk_ids: Tensor,
        num_valid: Tensor | None = None,
        kernel_ids: Tensor | None = None,
        recorder: Recorder | None = None,
    ) -> object:
        """Choose for topk_ids int32 or int64 `[T, k]`, contiguous, on the current stream.

        num_valid int32 `[1]`: tokens from there on are padding; None if there is none. kernel_ids int32 `[T, k]`, if
        given, becomes the ids as kernels take them: -1 for padding and what is out of range. recorder: gets what was
        routed and chosen. Raises KernelError for what it does not take.
        """
        ...
