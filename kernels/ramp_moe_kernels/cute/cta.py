"""The common objects of a CTA's roles in the fused kernel: parameters, tile, memory and layouts."""
# The DSL traces Python: annotations must be types at run time, and its functions are untyped.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call, misc"

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from .config import INTERMEDIATES, UP_ROWS, Config, SmemMap, smem_map


class KernelParameters(NamedTuple):
    """Parameters of the kernel, in the order in which the device gets them."""

    x: cute.Tensor  # [T, H]
    x_scale: cute.Tensor  # float32 [T, H / 128]
    tma_w1: cute.CopyAtom
    w1: cute.Tensor  # [(8, 2, I / 8), H, E] as the tensor map counts
    w1_scale: cute.Tensor  # float32 [2, I / 128, H / 128, E]
    tma_w2: cute.CopyAtom
    w2: cute.Tensor  # [H, I, E] as the tensor map counts
    w2_scale: cute.Tensor  # float32 [H / 128, I / 128, E]
    out: cute.Tensor  # [T, H]; with combine "rows" [I / 128 / wide * T * k, H]
    sorted_token_ids: cute.Tensor  # int32 [capacity]: routed ids by expert; T * k or more for padding
    expert_ids: cute.Tensor  # int32 [tiles]
    num_tokens_post_padded: cute.Tensor  # int32 [1]: slots in use, whole blocks
    routing: cute.Tensor  # float32 [T * k]
    top_k: Int32
    up_first: Int32  # 1: index 0 of gate_up's second dimension is up
    tiles_n: Int32  # weight tiles
    choice: cute.Tensor  # int32 [1], read if there are several blocks
    blocks: Int32  # by choice, four bits each: index of the block


class ItemParameters(NamedTuple):
    """Parameters of the kernel that works off a list of items. Those of the same name are as in KernelParameters."""

    x: cute.Tensor
    x_scale: cute.Tensor
    tma_w1: cute.CopyAtom
    w1: cute.Tensor
    w1_scale: cute.Tensor
    tma_w2: cute.CopyAtom
    w2: cute.Tensor
    w2_scale: cute.Tensor
    out: cute.Tensor  # [T, H]
    sorted_token_ids: cute.Tensor  # int32 [T * k]: routed ids by expert, without padding
    items: cute.Tensor  # int32 [capacity, 4], see items.py
    num_items: cute.Tensor  # int32 [1]
    routing: cute.Tensor  # float32 [T * k]
    top_k: Int32
    up_first: Int32


class Barriers(NamedTuple):
    """Pointers to the mbarriers. For the first four kinds, they point at the barrier of stage 0."""

    full_w: cute.Pointer
    empty_w: cute.Pointer
    full_x: cute.Pointer
    empty_x: cute.Pointer
    gathered: cute.Pointer


class Shared(NamedTuple):
    """Views of a CTA's shared memory (see SmemMap), and where it begins."""

    base: cute.Pointer
    weights: cute.Tensor  # [256, step, stages]
    boxes: cute.Tensor  # [rows that TMA loads at once, step, boxes]: the same
    tokens: cute.Tensor  # [block, step, stages]
    hidden: cute.Tensor  # [block, step, tiles of intermediates]
    x_scale: cute.Tensor  # float32 [block, stages]
    routing: cute.Tensor  # float32 [block]
    h_scale: cute.Tensor  # float32 [block, wide]
    maxima: cute.Tensor  # float32 [block, warps]
    barriers: Barriers


class CtaTile(NamedTuple):
    """The work of a CTA: an M-tile by a weight tile, or its part of that. Methods are given its configuration."""

    n: Int32  # of tiles_n
    m: Int32
    rank: Int32  # in the cluster
    paired: Int32  # 1: loads weights with the other CTA of its cluster
    expert: Int32
    first: Int32  # steps [first, last) of the reduction over hidden_size
    last: Int32
    out_first: Int32  # of every 256 output columns: from out_first to out_last by out_step
    out_last: Int32
    out_step: int

    def first_slot(self, c):
        """The first slot of sorted_token_ids that is the CTA's."""
        return self.m * c.block_m

    def rows(self, c):
        """Slots of the block that are the CTA's. Not all need to have a token."""
        return c.block_m

    def wide(self, c):
        """How many times 256 rows of gate and up it computes."""
        return c.wide

    def first_n(self, c):
        """The first 256 rows of gate and up, among all."""
        return self.n * c.wide


class ItemTile(NamedTuple):
    """The work of a CTA that has an item of a list. The item says what CtaTile takes from the grid."""

    slot: Int32
    num_rows: Int32
    n: Int32
    width: Int32
    expert: Int32
    first: Int32
    last: Int32
    out_first: Int32
    out_last: Int32
    out_step: int = 1

    def first_slot(self, c):
        return self.slot

    def rows(self, c):
        return self.num_rows

    def wide(self, c):
        return self.width

    def first_n(self, c):
        return self.n


class Layouts:
    """The types, tiled layouts and views of shared memory that follow from a configuration.

    map: of shared memory, if not the configuration's own. ring: stages for which there are barriers, likewise.
    """

    def __init__(self, config: Config, map: SmemMap | None = None, ring: int | None = None) -> None:
        self.config = config
        self.fp8 = config.dtype == "fp8"
        self.element = Float8E4M3FN if self.fp8 else BFloat16
        self.map = map or smem_map(config)
        self.ring = ring or config.stages
        self.parts_of_h = INTERMEDIATES // config.block_k  # tiles of 128 bytes that hold 128 intermediates
        self.box_rows = UP_ROWS // 2 if config.pair else UP_ROWS  # that one TMA copy loads

    def mma(self):
        k = OperandMajorMode.K
        return sm90.make_trivial_tiled_mma(
            self.element, self.element, k, k, Float32, (1, 1, 1), tiler_mn=(64, self.config.block_m)
        )

    def tile(self, rows, stages):
        """The layout of rows of 128 bytes, swizzled so that WGMMA reads eight of them without conflicts."""
        step = self.config.block_k
        order = sm90.get_smem_layout_atom(cutlass.utils.LayoutEnum.ROW_MAJOR, self.element, step)
        atom = warpgroup.make_smem_layout_atom(order, self.element)
        return cute.tile_to_shape(atom, (rows, step, stages), order=(0, 1, 2))

    def boxes(self):
        """The layout of the ring of weights in boxes, each of which one TMA copy loads."""
        return self.tile(self.box_rows, self.config.stages * (UP_ROWS // self.box_rows))

    def shared(self, base) -> Shared:
        c, at = self.config, self.map
        full_w = cute.recast_ptr(base + at.barriers, dtype=Int64)
        return Shared(
            base,
            self._swizzled(base + at.weights, self.tile(UP_ROWS, c.stages)),
            self._swizzled(base + at.weights, self.boxes()),
            self._swizzled(base + at.tokens, self.tile(c.block_m, c.stages)),
            self._swizzled(base + at.hidden, self.tile(c.block_m, c.wide * self.parts_of_h)),
            self._floats(base + at.x_scale, cute.make_layout((c.block_m, c.stages))),
            self._floats(base + at.routing, cute.make_layout(c.block_m)),
            self._floats(base + at.h_scale, cute.make_layout((c.block_m, c.wide))),
            self._floats(base + at.maxima, cute.make_layout((c.block_m, c.warps), stride=(c.warps, 1))),
            Barriers(*(full_w + kind * self.ring for kind in range(len(Barriers._fields)))),
        )

    def _swizzled(self, at, layout):
        return cute.make_tensor(cute.recast_ptr(at, layout.inner, dtype=self.element), layout.outer)

    def _floats(self, at, layout):
        return cute.make_tensor(cute.recast_ptr(at, dtype=Float32), layout)


class Role:
    """A role of a CTA, with the objects on which it works."""

    def __init__(
        self, layouts: Layouts, given: KernelParameters | ItemParameters, shared: Shared, tile: CtaTile | ItemTile
    ) -> None:
        self.config = layouts.config
        self.layouts, self.given, self.shared, self.tile = layouts, given, shared, tile
        self.barriers = shared.barriers
