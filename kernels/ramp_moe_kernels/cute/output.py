"""Moves the fused kernel's sums to global memory: stages them in shared memory, and adds them to the output."""
# The DSL traces Python: annotations must be types at run time, and its functions are untyped.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call, misc"

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import BFloat16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warp
from cutlass.experimental import primitives as prims

from .config import OUT_COLUMNS, UP_ROWS
from .cta import CtaTile, ItemParameters, ItemTile, KernelParameters, Layouts, Role, Shared


class Output(Role):
    """The part of a consumer warpgroup that writes its columns of the output."""

    def __init__(
        self,
        layouts: Layouts,
        given: KernelParameters | ItemParameters,
        shared: Shared,
        tile: CtaTile | ItemTile,
        own: Int32,
        group: Int32,
        own_warp: Int32,
    ) -> None:
        super().__init__(layouts, given, shared, tile)
        self.own, self.group, self.own_warp = own, group, own_warp
        self.own_group = pipeline.NamedBarrier(barrier_id=2 + group, num_threads=128)
        self.staged = shared.base + self.layouts.map.tokens

    @cute.jit
    def row(self):
        """The output's row for this thread's token among its warpgroup's staged rows; -1 if there is no token."""
        c, given = self.config, self.given
        row = Int32(-1)
        if self.own % 128 < self.tile.rows(c):
            slot = given.sorted_token_ids[self.tile.first_slot(c) + self.own % 128]
            if slot < given.x.shape[0] * given.top_k:
                row = slot // given.top_k
                if const_expr(c.combine == "rows"):
                    row = self.tile.n * (given.x.shape[0] * given.top_k) + slot
        return row

    @cute.jit
    def store(self, sums: cute.Tensor, n: Int32, row: Int32, buffer: Int32):
        """Write 256 columns, 128 of a warpgroup at a time. Returns the index of the next buffer."""
        tiles, buffers = self.config.tiles, self.layouts.map.buffers
        for half in cutlass.range_constexpr(tiles // 2):
            if const_expr(buffers == 1):  # the last columns have left
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                self.own_group.arrive_and_wait()
            self.stage(sums, half, buffer)
            cute.arch.fence_proxy("async.shared", space="cta")
            if const_expr(buffers == 2):  # those before have: the other buffer is free from here
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            self.own_group.arrive_and_wait()
            if row >= 0:
                column = n * UP_ROWS + (self.group * (tiles // 2) + half) * OUT_COLUMNS
                self.send(row, column, buffer)
            cute.arch.cp_async_bulk_commit_group()
            if const_expr(buffers == 2):
                buffer ^= 1
        return buffer

    @cute.jit
    def stage(self, sums: cute.Tensor, half: cutlass.Constexpr, buffer: Int32):
        """Write two tiles of sums, 128 output columns, to shared memory, with one row per token."""
        c, own_warp, lane = self.config, self.own_warp, cute.arch.lane_idx()
        pitch = c.out_pitch
        first = (buffer * c.warpgroups + self.group) * (c.block_m * pitch)
        if const_expr(c.combine == "f32"):
            rows = cute.recast_ptr(self.staged, dtype=Float32)
            for m in cutlass.range_constexpr(c.block_m // 8):
                for i in cutlass.range_constexpr(8):
                    token = 8 * m + lane % 4 * 2 + i % 2
                    column = i // 4 * 64 + own_warp % 4 * 16 + i // 2 % 2 * 8 + lane // 4
                    at = cute.make_tensor(rows + (first + token * pitch + column), cute.make_layout(1))
                    at[0] = sums[4 * m + i % 4, 2 * half + i // 4]
        else:
            rows = cute.recast_ptr(self.staged, dtype=BFloat16)
            transpose = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=True, num_matrices=4), BFloat16)
            exact, rounded = cute.make_rmem_tensor((8,), Float32), cute.make_rmem_tensor((8,), BFloat16)
            for m in cutlass.range_constexpr(c.block_m // 8):
                for i in cutlass.range_constexpr(8):
                    exact[i] = sums[4 * m + i % 4, 2 * half + i // 4]
                rounded.store(exact.load().to(BFloat16))
                column = lane // 16 * 64 + own_warp % 4 * 16 + lane // 8 % 2 * 8
                at = rows + (first + (8 * m + lane % 8) * pitch + column)
                cute.copy(transpose, rounded, cute.make_tensor(at.align(16), cute.make_layout(8)))

    @cute.jit
    def send(self, row: Int32, column: Int32, buffer: Int32):
        """Start the copy of this thread's staged row, which is added to the output, or stored."""
        c, out = self.config, self.given.out
        dtype = Float32 if c.combine == "f32" else BFloat16
        at = ((buffer * c.warpgroups + self.group) * c.block_m + self.own % 128) * c.out_pitch
        source = (cute.recast_ptr(self.staged, dtype=dtype) + at).to_llvm_ptr()
        target = (out.iterator + (Int64(row) * out.shape[1] + column)).to_llvm_ptr()
        nbytes = OUT_COLUMNS * dtype.width // 8
        if const_expr(c.combine == "rows"):
            prims.cp_async_bulk_global_shared_cta(target, source, nbytes)
        elif const_expr(c.combine == "f32"):
            prims.cp_reduce_async_bulk_global_shared_cta(
                target, source, nbytes, op=prims.CpReduceOp.ADD, type=prims.CpReduceType.F32
            )
        else:
            prims.cp_reduce_async_bulk_global_shared_cta(
                target, source, nbytes, op=prims.CpReduceOp.ADD, type=prims.CpReduceType.BF16, noftz=True
            )
