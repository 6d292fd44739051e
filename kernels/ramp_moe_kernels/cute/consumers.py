"""The consumers of the fused kernel: they multiply what the producers load, and hold the sums in registers."""
# The DSL traces Python: annotations must be types at run time, and its functions are untyped.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call, misc"

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup
from cutlass.experimental import primitives as prims
from cutlass.pipeline import PipelineState, PipelineUserType, make_pipeline_state

from .barriers import OTHER_LANE, OWN_LANE, PRODUCER_WARPS, expected_bytes, part_bytes
from .config import PRODUCER_THREADS, UP_ROWS
from .cta import CtaTile, ItemParameters, ItemTile, KernelParameters, Layouts, Role, Shared
from .output import Output

FP8_MAX = 448.0
LOG2_E = 1.4426950408889634
TINY = 1e-10
"""Least maximum from which a scale is computed."""


class Consumer(Role):
    """A thread of the consumer warps.

    sums: `[block / 2, tiles]`, its registers, with one column per WGMMA tile of 64 weight rows.
    accumulator: the registers to which WGMMA adds in fp8, for `in_flight` tiles.
    """

    def __init__(
        self,
        layouts: Layouts,
        given: KernelParameters | ItemParameters,
        shared: Shared,
        tile: CtaTile | ItemTile,
        thread: Int32,
        warp_index: Int32,
    ) -> None:
        super().__init__(layouts, given, shared, tile)
        c = self.config
        self.own = thread - PRODUCER_THREADS
        self.own_warp = warp_index - PRODUCER_WARPS
        self.group = cute.arch.make_warp_uniform(self.own_warp // 4)
        self.lane = cute.arch.lane_idx()
        self.all_consumers = pipeline.NamedBarrier(barrier_id=1, num_threads=32 * c.warps)
        self.output = Output(layouts, given, shared, tile, self.own, self.group, self.own_warp)
        slice_ = layouts.mma().get_slice(0)
        fragment_a, fragment_b = layouts.mma().make_fragment_A, layouts.mma().make_fragment_B
        self.weights = fragment_a(slice_.partition_A(cute.local_tile(shared.weights, (64, c.block_k), (None, 0, None))))
        self.first_tile = self.group * c.tiles
        self.tokens = fragment_b(slice_.partition_B(shared.tokens))
        self.hidden = fragment_b(slice_.partition_B(shared.hidden))
        self.accumulator = cute.make_rmem_tensor((c.block_m // 2 * c.in_flight if layouts.fp8 else 1,), Float32)
        self.sums = cute.make_rmem_tensor((c.block_m // 2, c.tiles), Float32)

    @cute.jit
    def consume(self):
        """Compute both projections of the CTA's tile."""
        c, tile = self.config, self.tile
        self.read_routing()
        row = self.output.row()
        weights = make_pipeline_state(PipelineUserType.Consumer, c.stages)
        tokens = make_pipeline_state(PipelineUserType.Consumer, c.stages)
        for w in cutlass.range(tile.wide(c), unroll=1):
            weights, tokens = self.gate_up(tile.first_n(c) + w, weights, tokens)
            if const_expr(c.split_k > 1):
                self.share()
            self.swiglu()
            if const_expr(self.layouts.fp8):
                self.quantise(w)
            else:
                self.round(w)
            cute.arch.fence_proxy("async.shared", space="cta")  # written for WGMMA to read
            self.all_consumers.arrive_and_wait()
        buffer = Int32(0)
        for n in cutlass.range(tile.out_first, tile.out_last, tile.out_step, unroll=1):
            weights = self.down(n, weights)
            buffer = self.output.store(self.sums, n, row, buffer)
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def read_routing(self):
        """Put the routing weights of the block's slots into shared memory; 0 if a slot has no token."""
        given, routing = self.given, self.shared.routing
        if self.own < self.config.block_m:
            weight = Float32(0.0)
            if self.own < self.tile.rows(self.config):
                slot = given.sorted_token_ids[self.tile.first_slot(self.config) + self.own]
                if slot < given.x.shape[0] * given.top_k:
                    weight = given.routing[slot]
            routing[self.own] = weight

    @cute.jit
    def gate_up(self, n: Int32, weights: PipelineState, tokens: PipelineState):
        """sums <- rows [256 n, 256 n + 256) of gate and up times the tokens, over this CTA's steps."""
        self.sums.fill(0.0)
        for k in cutlass.range(self.tile.first, self.tile.last, 1, unroll=1):
            scales = self.gate_up_scales(n, k)  # asked for before the wait
            cute.arch.mbarrier_wait(self.barriers.full_x + tokens.index, tokens.phase)
            cute.arch.mbarrier_wait(self.barriers.full_w + weights.index, weights.phase)
            cute.arch.fence_proxy("async.shared", space="cta")  # cp.async wrote for WGMMA to read
            b = self.tokens[(None, None, None, tokens.index)]
            self.multiply_step(weights.index, b, scales, self.shared.x_scale, tokens.index)
            self.release(weights.index, tokens.index)
            weights.advance()
            tokens.advance()
        return weights, tokens

    @cute.jit
    def down(self, n: Int32, weights: PipelineState):
        """sums <- output columns [256 n, 256 n + 256) of the intermediates, times their routing weights."""
        c, sums = self.config, self.sums
        sums.fill(0.0)
        for k in cutlass.range(self.tile.wide(c) * self.layouts.parts_of_h, unroll=1):
            b = self.hidden[(None, None, None, k)]
            scales = self.down_scales(n, k)
            cute.arch.mbarrier_wait(self.barriers.full_w + weights.index, weights.phase)
            self.multiply_step(weights.index, b, scales, self.shared.h_scale, k)
            self.release(weights.index, None)
            weights.advance()
        if const_expr(not self.layouts.fp8):
            for m in cutlass.range_constexpr(c.block_m // 8):
                for i in cutlass.range_constexpr(4):
                    for t in cutlass.range_constexpr(c.tiles):
                        sums[4 * m + i, t] = sums[4 * m + i, t] * self.shared.routing[self.token(m, i % 2)]
        return weights

    def gate_up_scales(self, n, k):
        """fp8: the scales of gate and of up in step k, for each tile; None in bf16."""
        if not self.layouts.fp8:
            return None
        scales, expert = self.given.w1_scale, self.tile.expert
        return [(scales[0, n, k, expert], scales[1, n, k, expert])] * self.config.tiles

    def down_scales(self, n, k):
        """fp8: the scale of each tile's rows in step k. Two tiles, 128 output columns, share one. None in bf16."""
        if not self.layouts.fp8:
            return None
        c, tile, halves = self.config, self.tile, self.config.tiles // 2
        first = 2 * n + self.group * halves
        of_halves = [self.given.w2_scale[first + half, tile.first_n(c) + k, tile.expert] for half in range(halves)]
        return [(of_halves[t // 2],) for t in range(c.tiles)]

    @cute.jit
    def multiply_step(self, stage: Int32, b: cute.Tensor, weight_scales, token_scales: cute.Tensor, column: Int32):
        """sums += the weights of a stage times b; in fp8 with the weights' scales and a column of the tokens'."""
        if const_expr(self.layouts.fp8):
            self.multiply_scaled(stage, b, weight_scales, token_scales, column)
        else:
            self.multiply_unscaled(stage, b)

    @cute.jit
    def multiply_scaled(self, stage: Int32, b: cute.Tensor, weight_scales, token_scales: cute.Tensor, column: Int32):
        """fp8: while `in_flight` tiles are in WGMMA, another is scaled. `weight_scales` has for each tile the scale of
        its rows, or two: of the first eight rows in sixteen, and of the others."""
        block, tiles, in_flight = self.config.block_m, self.config.tiles, self.config.in_flight
        warpgroup.fence()
        for t in cutlass.range_constexpr(in_flight):
            self.multiply(self.accumulator, t * (block // 2), t, stage, b, False)
        for t in cutlass.range_constexpr(tiles):
            warpgroup.wait_group(min(t + in_flight, tiles) - (t + 1))
            at = t % in_flight * (block // 2)
            scales = weight_scales[t]
            # By tokens if gate and up have a scale each, else by rows: the order decides how registers are assigned.
            order = (0, 2, 1, 3) if len(scales) == 2 else (0, 1, 2, 3)
            for m in cutlass.range_constexpr(block // 8):
                for i in order:
                    scale = scales[i // 2 % len(scales)] * token_scales[self.token(m, i % 2), column]
                    self.sums[4 * m + i, t] = self.sums[4 * m + i, t] + self.accumulator[at + 4 * m + i] * scale
            if const_expr(t + in_flight < tiles):
                warpgroup.fence()
                self.multiply(self.accumulator, at, t + in_flight, stage, b, False)

    @cute.jit
    def multiply_unscaled(self, stage: Int32, b: cute.Tensor):
        """bf16: WGMMA adds to the sums themselves."""
        warpgroup.fence()
        for t in cutlass.range_constexpr(self.config.tiles):
            self.multiply(self.sums, t * (self.config.block_m // 2), t, stage, b, True)
        warpgroup.wait_group(0)

    def multiply(self, to, at, t, stage, b, add):
        """Multiply a tile of 64 weight rows and b over a step, in WGMMA. Commits a group.

        The result is 64 x block registers of `to`, from `at` on. It is added to them if `add`.
        """
        a = self.weights[(None, None, None, self.first_tile + t, stage)]
        mma = self.layouts.mma()
        tile = cute.make_tensor(to.iterator + at, cute.make_layout(mma.partition_shape_C((64, self.config.block_m))))
        for k in range(cute.size(a, mode=[2])):
            mma.set(warpgroup.Field.ACCUMULATE, add or k != 0)
            cute.gemm(mma, tile, a[(None, None, k)], b[(None, None, k)], tile)
        warpgroup.commit_group()

    @cute.jit
    def release(self, stage: Int32, tokens_stage):
        """Give a stage of weights back to its producers, and one of tokens, unless that is None."""
        cute.arch.sync_warp()
        if self.lane == OWN_LANE:
            cute.arch.mbarrier_arrive(self.barriers.empty_w + stage)
            if const_expr(tokens_stage is not None):
                cute.arch.mbarrier_arrive(self.barriers.empty_x + tokens_stage)
        if const_expr(self.config.pair):
            if (self.lane == OTHER_LANE) & (self.tile.paired == 1):
                cute.arch.mbarrier_arrive(self.barriers.empty_w + stage, self.tile.rank ^ 1)

    @cute.jit
    def share(self):
        """sums <- the sum over the cluster, added up in the order of its CTAs."""
        c, own, rank, gathered = self.config, self.own, self.tile.rank, self.barriers.gathered
        octets, threads = c.block_m // 8, 32 * c.warps
        parts = cute.recast_ptr(self.shared.base + self.layouts.map.parts, dtype=Float32)
        for t in cutlass.range_constexpr(c.tiles):
            for m in cutlass.range_constexpr(octets):
                at = ((rank * c.tiles + t) * octets + m) * threads + own
                quad = cute.make_tensor((parts + at * 4).align(16), cute.make_layout(4))
                for i in cutlass.range_constexpr(4):
                    quad[i] = self.sums[4 * m + i, t]
        cute.arch.fence_proxy("async.shared", space="cta")
        self.all_consumers.arrive_and_wait()
        if own == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(gathered, expected_bytes(c).gathered)
        if (own < c.split_k) & (own != rank):
            mine = (parts + rank * (c.block_m * UP_ROWS)).to_llvm_ptr()
            prims.cp_async_bulk_shared_cluster_shared_cta(
                prims.mapa(mine, own), mine, prims.mapa(gathered.to_llvm_ptr(), own), part_bytes(c)
            )
        cute.arch.mbarrier_wait(gathered, 0)
        self.sums.fill(0.0)
        for r in cutlass.range_constexpr(c.split_k):
            for t in cutlass.range_constexpr(c.tiles):
                for m in cutlass.range_constexpr(octets):
                    at = ((r * c.tiles + t) * octets + m) * threads + own
                    quad = cute.make_tensor((parts + at * 4).align(16), cute.make_layout(4))
                    for i in cutlass.range_constexpr(4):
                        self.sums[4 * m + i, t] = self.sums[4 * m + i, t] + quad[i]

    @cute.jit
    def swiglu(self):
        """Compute intermediates from gate and up, into registers 4m and 4m + 1."""
        for t in cutlass.range_constexpr(self.config.tiles):
            for m in cutlass.range_constexpr(self.config.block_m // 8):
                for j in cutlass.range_constexpr(2):
                    gate, up = self.sums[4 * m + j, t], self.sums[4 * m + 2 + j, t]
                    if self.given.up_first == 1:
                        gate, up = up, gate
                    e = cute.math.exp2(gate * -LOG2_E, fastmath=True)
                    self.sums[4 * m + j, t] = gate * cute.arch.rcp_approx(1.0 + e) * up

    @cute.jit
    def quantise(self, w: Int32):
        """fp8: write intermediates to shared memory, and their scales times routing weights.

        A token's maximum is reduced over a thread, then over the 8 lanes that share the token, then over all warps.
        """
        c, sums = self.config, self.sums
        maxima, hidden, scales = self.shared.maxima, self.shared.hidden, self.shared.h_scale
        for m in cutlass.range_constexpr(c.block_m // 8):
            for j in cutlass.range_constexpr(2):
                most = Float32(TINY)
                for t in cutlass.range_constexpr(c.tiles):
                    value = sums[4 * m + j, t]
                    most = cute.arch.fmax(most, cute.arch.fmax(value, -value))
                for distance in cutlass.range_constexpr(2, 5):
                    most = cute.arch.fmax(most, cute.arch.shuffle_sync_bfly(most, 1 << distance))
                if self.lane < 4:
                    maxima[8 * m + self.lane * 2 + j, self.own_warp] = most
        self.all_consumers.arrive_and_wait()
        for m in cutlass.range_constexpr(c.block_m // 8):
            for j in cutlass.range_constexpr(2):
                token = self.token(m, j)
                most = Float32(TINY)
                for other_warp in cutlass.range_constexpr(c.warps):
                    most = cute.arch.fmax(most, maxima[token, other_warp])
                if (self.own_warp == 0) & (self.lane < 4):
                    scales[token, w] = most * (1.0 / FP8_MAX) * self.shared.routing[token]
                inverse = FP8_MAX * cute.arch.rcp_approx(most)
                scaled = cute.make_rmem_tensor((4,), Float32)  # conversions come in fours
                rounded = cute.make_rmem_tensor((4,), Float8E4M3FN)
                for t in cutlass.range_constexpr(4):
                    scaled[t] = sums[4 * m + j, t % c.tiles] * inverse
                rounded.store(scaled.load().to(Float8E4M3FN))
                for t in cutlass.range_constexpr(c.tiles):
                    hidden[token, self.hidden_column(t), w] = rounded[t]

    @cute.jit
    def round(self, w: Int32):
        """bf16: write intermediates to shared memory."""
        c = self.config
        for m in cutlass.range_constexpr(c.block_m // 8):
            for j in cutlass.range_constexpr(2):
                for t in cutlass.range_constexpr(c.tiles):
                    column = self.hidden_column(t)
                    part = w * self.layouts.parts_of_h + column // c.block_k
                    value = BFloat16(self.sums[4 * m + j, t])
                    self.shared.hidden[self.token(m, j), column % c.block_k, part] = value

    def hidden_column(self, t):
        """Index, among the CTA's 128 intermediates, of the one that this thread has in tile t."""
        return (self.first_tile + t) * 32 + self.own_warp % 4 * 8 + self.lane // 4

    def token(self, m, j):
        """The token of registers 4m + j and 4m + 2 + j."""
        return 8 * m + self.lane % 4 * 2 + j
