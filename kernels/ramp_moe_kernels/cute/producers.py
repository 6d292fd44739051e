"""The producers of the fused kernel: a warp that loads weights by TMA, and three that copy tokens by cp.async."""
# The DSL traces Python: annotations must be types at run time, and its functions are untyped.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call, misc"

import cutlass
import cutlass.cute as cute
from cutlass import Int16, Int32, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.pipeline import PipelineState, PipelineUserType, make_pipeline_state

from .barriers import FIRST_GATHERER, STAGE_BYTES
from .config import GATHER_THREADS, ROW_BYTES
from .cta import CtaTile, ItemParameters, ItemTile, KernelParameters, Layouts, Role, Shared

CHUNK = 16
"""Bytes that a thread copies at once."""
CHUNKS = ROW_BYTES // CHUNK
"""Threads that copy a row's 128 bytes."""


class WeightsProducer(Role):
    """The warp that loads weights. All of its threads call TMA, which elects one itself."""

    @cute.jit
    def produce_weights(self):
        """Load the stages that the consumers multiply: steps of gate and up, then of down."""
        c, given, tile = self.config, self.given, self.tile
        from_w1, to_w1 = self.partition(given.tma_w1, given.w1)
        from_w2, to_w2 = self.partition(given.tma_w2, given.w2)
        state = make_pipeline_state(PipelineUserType.Producer, c.stages)
        for w in cutlass.range(tile.wide(c), unroll=1):
            for k in cutlass.range(tile.first, tile.last, 1, unroll=1):
                self.acquire(state)
                self.load(given.tma_w1, from_w1, to_w1, tile.first_n(c) + w, k, state)
                state.advance()
        parts, first_part = tile.wide(c) * self.layouts.parts_of_h, tile.first_n(c) * self.layouts.parts_of_h
        for n in cutlass.range(tile.out_first, tile.out_last, tile.out_step, unroll=1):
            for k in cutlass.range(parts, unroll=1):
                self.acquire(state)
                self.load(given.tma_w2, from_w2, to_w2, n, first_part + k, state)
                state.advance()

    def partition(self, tma, weights):
        """Partition a matrix into boxes, `[elements, rows, steps, experts]`, and their ring, `[elements, boxes]`."""
        boxes = cute.local_tile(weights, (self.layouts.box_rows, self.config.block_k), (None, None, None))
        ring = cute.group_modes(self.shared.boxes, 0, 2)
        to, source = cpasync.tma_partition(tma, 0, cute.make_layout(1), ring, cute.group_modes(boxes, 0, 2))
        return source, to

    @cute.jit
    def acquire(self, state: PipelineState):
        """Wait until a stage is empty, and have its barrier expect a stage's bytes."""
        cute.arch.mbarrier_wait(self.barriers.empty_w + state.index, state.phase)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.barriers.full_w + state.index, STAGE_BYTES)

    @cute.jit
    def load(self, tma: cute.CopyAtom, source: cute.Tensor, target: cute.Tensor, n: Int32, k: Int32,
             state: PipelineState):  # fmt: skip
        """Load a stage: rows [256 n, 256 n + 256), step k."""
        stage, tile = state.index, self.tile
        full = self.barriers.full_w + stage
        if const_expr(self.config.pair):
            if tile.paired == 1:
                cute.copy(tma, source[(None, 2 * n + tile.rank, k, tile.expert)], target[(None, 2 * stage + tile.rank)],
                          tma_bar_ptr=full, mcast_mask=Int16(3))  # fmt: skip
            else:
                for half in cutlass.range_constexpr(2):
                    cute.copy(tma, source[(None, 2 * n + half, k, tile.expert)], target[(None, 2 * stage + half)],
                              tma_bar_ptr=full, mcast_mask=Int16(1 << tile.rank))  # fmt: skip
        else:
            cute.copy(tma, source[(None, n, k, tile.expert)], target[(None, stage)], tma_bar_ptr=full)


class TokensProducer(Role):
    """Three warps. Eight threads copy a row, so that twelve rows are copied in a turn; scales take a thread each."""

    ROWS = GATHER_THREADS // CHUNKS
    """Rows of a turn."""

    def __init__(
        self,
        layouts: Layouts,
        given: KernelParameters | ItemParameters,
        shared: Shared,
        tile: CtaTile | ItemTile,
        thread: Int32,
    ) -> None:
        super().__init__(layouts, given, shared, tile)
        self.own = thread - FIRST_GATHERER
        self.place, self.chunk = self.own // CHUNKS, self.own % CHUNKS
        self.turns = -(-self.config.block_m // self.ROWS)
        self.scale_turns = -(-self.config.block_m // GATHER_THREADS)

    @cute.jit
    def gather_tokens(self):
        """Copy the tokens' steps that the consumers multiply with gate and up."""
        c, tile = self.config, self.tile
        # The starts of rows stay in registers; negative if there is nothing to copy
        rows = cute.make_rmem_tensor((self.turns,), Int32)
        scale_rows = cute.make_rmem_tensor((self.scale_turns,), Int32)
        for r in cutlass.range_constexpr(self.turns):
            rows[r] = self.start(self.given.x, tile.first_slot(c), r * self.ROWS + self.place)
        for r in cutlass.range_constexpr(self.scale_turns if self.layouts.fp8 else 0):
            scale_rows[r] = self.start(self.given.x_scale, tile.first_slot(c), r * GATHER_THREADS + self.own)
        state = make_pipeline_state(PipelineUserType.Producer, c.stages)
        for _ in cutlass.range(tile.wide(c), unroll=1):
            for k in cutlass.range(tile.first, tile.last, 1, unroll=1):
                self.copy(rows, scale_rows, k, state)
                state.advance()

    @cute.jit
    def copy(self, rows: cute.Tensor, scale_rows: cute.Tensor, k: Int32, state: PipelineState):
        """Fill a stage, once it is empty, with step k of the rows and their scales."""
        block, stage, at = self.config.block_m, state.index, self.layouts.map
        given, width = self.given, CHUNK * 8 // self.layouts.element.width
        cute.arch.mbarrier_wait(self.barriers.empty_x + stage, state.phase)
        column = k * self.config.block_k + self.chunk * width
        # The offset of a row's chunk; one turn later, its position in eight is 4 more, or less
        first_to = self.place * ROW_BYTES + (self.chunk ^ (self.place % 8)) * CHUNK
        even_to = at.tokens + stage * (block * ROW_BYTES) + first_to
        odd_to = at.tokens + stage * (block * ROW_BYTES) + (first_to ^ 4 * CHUNK)
        for r in cutlass.range_constexpr(self.turns):
            row_to = (even_to, odd_to)[r % 2] + r * self.ROWS * ROW_BYTES
            if const_expr((r + 1) * self.ROWS <= block):  # noqa: SIM114 (the other is asked on the GPU)
                self.copy_row(given.x, rows[r], column, row_to, CHUNK)
            elif r * self.ROWS + self.place < block:
                self.copy_row(given.x, rows[r], column, row_to, CHUNK)
        for r in cutlass.range_constexpr(self.scale_turns if self.layouts.fp8 else 0):
            if r * GATHER_THREADS + self.own < block:
                scale_to = at.x_scale + (stage * block + r * GATHER_THREADS + self.own) * 4
                self.copy_row(given.x_scale, scale_rows[r], k, scale_to, 4)
        cute.arch.cp_async_mbarrier_arrive_noinc(self.barriers.full_x + stage)

    @cute.jit
    def start(self, source: cute.Tensor, first: Int32, at: Int32):
        """Offset in `source` of the row of slot `at` in the block that begins at `first`; -1 if it has no token."""
        start = Int32(-1)
        if at < self.tile.rows(self.config):
            row = self.given.sorted_token_ids[first + at] // self.given.top_k
            if row < source.shape[0]:
                start = row * source.shape[1]
        return start

    def copy_row(self, source, start, column, to, nbytes):
        """Copy nbytes of a row of `source` to offset `to` of shared memory by cp.async; zeros if there is no row.

        It does not branch, so that all of a thread's copies are in flight at once. Copies of 16 bytes bypass L1, from
        which nobody would read them again.
        """
        cache = cpasync.LoadCacheMode.GLOBAL if nbytes == CHUNK else cpasync.LoadCacheMode.ALWAYS
        dtype, count = source.element_type, nbytes * 8 // source.element_type.width
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(cache_mode=cache), dtype, num_bits_per_copy=8 * nbytes)
        at = cute.assume(start + column, divby=count)
        target = cute.recast_ptr(self.shared.base + cute.assume(to, divby=nbytes), dtype=dtype)
        exists = cute.make_rmem_tensor(cute.make_layout((count, 1), stride=(0, 0)), cutlass.Boolean)
        exists[0] = start >= 0
        chunk = cute.make_layout((count, 1))
        cute.copy(atom, cute.make_tensor(source.iterator + at, chunk), cute.make_tensor(target, chunk), pred=exists)
