"""The fused MoE kernel for Hopper, in CuTe DSL: up projection, SwiGLU, requantisation, down projection, weighted sum.

    out[t] += sum over t's routed ids p of routing[p] * (silu(x[t] Wg_e) * (x[t] Wu_e)) Wd_e          e: p's expert

One launch, after a schedule that sorts ids by expert into blocks. Weights are fp8 e4m3 with a float32 scale for each
[128, 128] block, tokens fp8 with a scale for each 128 columns; or all is bf16, and scales are ignored.

A CTA takes one M-tile (`block` slots of the schedule, of one expert) and `wide` times 256 rows of gate and up, which
are 128 intermediates. Both GEMMs swap operands: weights are WGMMA's A (64 rows a tile), tokens its B (N = block), so
that a block may be as small as 8 tokens. The intermediates never leave shared memory.

Roles        warp 0        loads weights by TMA, 256 rows x 128 bytes a stage, first of gate and up, then of down
             warps 1-3     copy tokens' 128 bytes (and scales) by cp.async, from where they lie unsorted
             warps 4-      consumers: warpgroup g multiplies rows [g * 256 / warpgroups, ...) of every stage

Timeline     warp 0        W1 W1 W1 ... W1 | W2 W2 ... W2           runs ahead by `stages`, also over the phases
             warps 1-3     x  x  x  ... x
             consumers     mma + scale ... | SwiGLU, quantise | mma + scale, out | mma + scale, out ...

             warps 1-3     know their tokens' rows from the start, in registers; a padded slot's are zeros

Barriers     full_w[s]     1 arrival that expects 32 KiB            empty_w[s]   1 a consumer warp (pair: both CTAs')
             full_x[s]     96, as each thread's copies land         empty_x[s]   1 a consumer warp
             gathered      1 that expects the others' sums (split_k)
             named 1       all consumers: maxima and intermediates; named 2 + g: warpgroup g, around staged output

Registers    `setmaxnreg` gives the producers' to the consumers (Config.registers). A consumer holds the sums, block / 2
             a tile of 64 rows, and in fp8 as many again for each of `in_flight` accumulators: a step of 128 columns is
             multiplied into an accumulator and then added to the sums with its scales, since WGMMA knows no scales.

Layouts      Gate and up alternate by 8 rows, whatever the order in memory: a 5-dimensional tensor map reads 8 rows of
             gate, the same 8 of up, and so on. So the accumulator's rows r and r + 8, which one thread holds, are the
             gate and the up of one intermediate. Register i of a lane: j = i % 2, half = i // 2 % 2, m = i // 4; row
             16 * warp + 8 * half + lane // 4, token 8 * m + 2 * (lane % 4) + j (`layout.py`, tested by arithmetic).
             Example, block 8: lane 5 of warp 2 holds in register 3 row 16 * 2 + 8 + 1 = 41 of token 2 * 1 + 1 = 3: up
             of intermediate 8 * 2 + 1 = 17, whose gate is in its register 1.

Out          128 columns of a warpgroup at a time: bf16, transposed by stmatrix, staged, and a thread a token adds its
             256 bytes to the output by cp.reduce.async.bulk, while the next columns are multiplied. `f32` adds 512
             bytes to a float32 output; `rows` stores them to a row of every id and part, summed in order afterwards.

split_k      The CTAs of a cluster multiply a part of hidden_size each and send their sums to all others, who add
             them up in the same order: all have the same intermediates. Each computes its part of the output columns.
pair         Two CTAs of a cluster whose M-tiles belong to one expert load half of every stage each, for both (TMA
             multicast), and so read weights from L2 once for two M-tiles. M-tiles of two experts load for themselves.

blocks       One launch that is any of several token blocks, all else equal: the one chosen on the device, of which the
             schedule is, too. Every CTA reads the choice first; registers and shared memory are the largest's.

What hangs or corrupts, learnt the hard way: TMA under a branch of one thread (it elects one itself); the token of an
accumulator taken from a warpgroup's slice instead of the lane; a plain store to shared memory before cp.async's arrival
on a barrier, which does not release it (scales are copied by cp.async, too); a CTA of a cluster that ends before
another has arrived on its barriers; consumers that ask for more registers than the CTA was launched with, less the
producers'. And what slows: WGMMA in flight at a branch or at a loop's end, which the assembler then serialises; copies
of tokens that branch (a third of the time of bf16 at 8,192 tokens).

compute-sanitizer's racecheck names hazards between cp.async's writes of scales and the reads of the round before. It
follows an mbarrier from a thread that arrives, and here one lane arrives for its warp, after __syncwarp: the same loop
of twenty lines shows the same hazards, and none where every lane arrives.
"""
# The DSL traces Python: annotations must be types at run time, and its functions are untyped.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call, misc"

from pathlib import Path
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float8E4M3FN, Float32, Int16, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.experimental import primitives as prims

from .config import (
    GATHER_THREADS,
    INTERMEDIATES,
    OUT_COLUMNS,
    PRODUCER_THREADS,
    ROW_BYTES,
    UP_ROWS,
    Config,
    smem_bytes,
    smem_map,
)

STAGE_BYTES = UP_ROWS * ROW_BYTES
CHUNK = 16
"""Bytes that a thread copies at once."""
FP8_MAX = 448.0
LOG2_E = 1.4426950408889634
TINY = 1e-10
"""Least maximum that a scale is made of."""


class FusedMoE:
    """The kernel of one configuration."""

    def __init__(self, config: Config) -> None:
        self.c = config
        self.fp8 = config.dtype == "fp8"
        self.element = Float8E4M3FN if self.fp8 else BFloat16
        self.map = smem_map(config)
        self.parts_of_h = INTERMEDIATES // config.block_k  # tiles of 128 bytes that hold 128 intermediates

    def mma(self):
        k = OperandMajorMode.K
        return sm90.make_trivial_tiled_mma(
            self.element, self.element, k, k, Float32, (1, 1, 1), tiler_mn=(64, self.c.block_m)
        )

    def tile_layout(self, rows, stages):
        """Rows of 128 bytes, swizzled so that WGMMA reads eight of them without conflicts."""
        order = sm90.get_smem_layout_atom(cutlass.utils.LayoutEnum.ROW_MAJOR, self.element, self.c.block_k)
        atom = warpgroup.make_smem_layout_atom(order, self.element)
        return cute.tile_to_shape(atom, (rows, self.c.block_k, stages), order=(0, 1, 2))

    def launch_options(self):
        c = self.c
        options: dict[str, Any] = {"use_pdl": True}
        if c.ctas > 1:
            options["preferred_smem_carveout"] = 100
        if c.pair or c.split_k > 1:
            options["cluster"] = (1, 2, 1) if c.pair else (c.split_k, 1, 1)
        return options

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,  # [T, H]
        x_scale: cute.Tensor,  # float32 [T, H / 128]
        gate_up: cute.Tensor,  # [8, 2, I / 8, H, E]: row in eight, gate or up, eight
        gate_up_scale: cute.Tensor,  # float32 [2, I / 128, H / 128, E]
        down: cute.Tensor,  # [H, I, E]
        down_scale: cute.Tensor,  # float32 [H / 128, I / 128, E]
        out: cute.Tensor,  # [T, H]; with combine "rows" [I / 128 / wide * T * k, H]
        sorted_token_ids: cute.Tensor,  # int32 [capacity]: routed ids by expert; T * k or more where there is none
        expert_ids: cute.Tensor,  # int32 [tiles]
        num_tokens_post_padded: cute.Tensor,  # int32 [1]: slots in use, whole blocks
        routing: cute.Tensor,  # float32 [T * k]
        top_k: Int32,
        tiles: Int32,  # M-tiles to launch: as many as there can be
        up_first: Int32,  # 1: index 0 of gate_up's second dimension is up
        choice: cute.Tensor,  # int32 [1], read where there are several blocks
        blocks: Int32,  # by choice, four bits each: index of the block
        stream: cuda.CUstream,
    ):
        c = self.c
        w_layout = self.tile_layout(UP_ROWS, c.stages)
        box_rows = UP_ROWS // 2 if c.pair else UP_ROWS
        box_layout = self.tile_layout(box_rows, c.stages * (UP_ROWS // box_rows))
        box = cute.slice_(box_layout, (None, None, 0))
        op = cpasync.CopyBulkTensorTileG2SMulticastOp() if c.pair else cpasync.CopyBulkTensorTileG2SOp()
        rows = cute.make_layout(
            (gate_up.shape[:3], gate_up.shape[3], gate_up.shape[4]),
            stride=(gate_up.stride[:3], gate_up.stride[3], gate_up.stride[4]),
        )
        mW1 = cute.make_tensor(gate_up.iterator, rows)
        tma_w1, gW1 = cpasync.make_tiled_tma_atom(op, mW1, box, (box_rows, c.block_k))
        tma_w2, gW2 = cpasync.make_tiled_tma_atom(op, down, box, (box_rows, c.block_k))
        tiles_n = gate_up.shape[2] * 16 // (UP_ROWS * c.wide)
        tiles_m = (tiles + 1) // 2 * 2 if c.pair else tiles
        self.kernel(
            x, x_scale, tma_w1, gW1, gate_up_scale, tma_w2, gW2, down_scale, out, sorted_token_ids, expert_ids,
            num_tokens_post_padded, routing, top_k, up_first, tiles_n, choice, blocks, w_layout, box_layout,
        ).launch(
            grid=(tiles_n * c.split_k, tiles_m, 1),
            block=(c.threads, 1, 1),
            min_blocks_per_mp=c.ctas,
            stream=stream,
            **self.launch_options(),
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        x_scale: cute.Tensor,
        tma_w1: cute.CopyAtom,
        gW1: cute.Tensor,
        w1_scale: cute.Tensor,
        tma_w2: cute.CopyAtom,
        gW2: cute.Tensor,
        w2_scale: cute.Tensor,
        out: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_ids: cute.Tensor,
        num_tokens_post_padded: cute.Tensor,
        routing: cute.Tensor,
        top_k: Int32,
        up_first: Int32,
        tiles_n: Int32,
        choice: cute.Tensor,
        blocks: Int32,
        w_layout: cute.ComposedLayout,
        box_layout: cute.ComposedLayout,
    ):
        base = cutlass.utils.SmemAllocator().allocate(smem_bytes(self.c), 1024)
        if const_expr(len(self.c.blocks) == 1):
            self.body(
                base, x, x_scale, tma_w1, gW1, w1_scale, tma_w2, gW2, w2_scale, out, sorted_token_ids, expert_ids,
                num_tokens_post_padded, routing, top_k, up_first, tiles_n, w_layout, box_layout,
            )  # fmt: skip
        else:
            cute.arch.griddepcontrol_wait()
            chosen = (blocks >> (4 * choice[0])) & 15
            for i in cutlass.range_constexpr(len(self.c.blocks)):
                if chosen == i:
                    FusedMoE(self.c.of(self.c.blocks[i])).body(
                        base, x, x_scale, tma_w1, gW1, w1_scale, tma_w2, gW2, w2_scale, out, sorted_token_ids,
                        expert_ids, num_tokens_post_padded, routing, top_k, up_first, tiles_n, w_layout, box_layout,
                    )  # fmt: skip

    @cute.jit
    def body(
        self,
        base: cute.Pointer,
        x: cute.Tensor,
        x_scale: cute.Tensor,
        tma_w1: cute.CopyAtom,
        gW1: cute.Tensor,
        w1_scale: cute.Tensor,
        tma_w2: cute.CopyAtom,
        gW2: cute.Tensor,
        w2_scale: cute.Tensor,
        out: cute.Tensor,
        sorted_token_ids: cute.Tensor,
        expert_ids: cute.Tensor,
        num_tokens_post_padded: cute.Tensor,
        routing: cute.Tensor,
        top_k: Int32,
        up_first: Int32,
        tiles_n: Int32,
        w_layout: cute.ComposedLayout,
        box_layout: cute.ComposedLayout,
    ):
        c = self.c
        block, stages, tiles, in_flight = c.block_m, c.stages, c.tiles, c.in_flight
        octets = block // 8
        thread, _, _ = cute.arch.thread_idx()
        bx, by, _ = cute.arch.block_idx()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        tokens = x.shape[0]
        if warp_index == 0:
            cpasync.prefetch_descriptor(tma_w1)
            cpasync.prefetch_descriptor(tma_w2)

        # Shared memory
        x_layout = self.tile_layout(block, stages)
        h_layout = self.tile_layout(block, c.wide * self.parts_of_h)
        sW = self.swizzled(base + self.map.weights, w_layout)
        sBox = self.swizzled(base + self.map.weights, box_layout)
        sX = self.swizzled(base + self.map.tokens, x_layout)
        sH = self.swizzled(base + self.map.hidden, h_layout)
        sXs = self.floats(base + self.map.x_scale, cute.make_layout((block, stages)))
        sRouting = self.floats(base + self.map.routing, cute.make_layout(block))
        sHs = self.floats(base + self.map.h_scale, cute.make_layout((block, c.wide)))
        sMax = self.floats(base + self.map.maxima, cute.make_layout((block, c.warps), stride=(c.warps, 1)))
        full_w = cute.recast_ptr(base + self.map.barriers, dtype=Int64)
        empty_w, full_x, empty_x = full_w + stages, full_w + 2 * stages, full_w + 3 * stages
        gathered = full_w + 4 * stages

        # Which tile: weight rows first, or group_m M-tiles first
        n_i, m_i = bx // c.split_k, by
        if const_expr(c.group_m > 1):
            _, grid_m, _ = cute.arch.grid_dim()
            linear = by * tiles_n + n_i
            band = linear // (c.group_m * tiles_n)
            band_rows = cutlass.min(grid_m - band * c.group_m, c.group_m)
            within = linear % (c.group_m * tiles_n)
            n_i, m_i = within // band_rows, band * c.group_m + within % band_rows
        rank = bx % c.split_k if c.split_k > 1 else by % 2

        # What the schedule wrote; a pair's barriers depend on it
        if const_expr(not c.pair):
            self.init_barriers(full_w, thread, 1)
        cute.arch.griddepcontrol_wait()
        expert = expert_ids[cutlass.min(m_i, expert_ids.shape[0] - 1)]
        m_tiles = num_tokens_post_padded[0] // block
        paired = Int32(0)
        if const_expr(c.pair):
            other = m_i ^ 1
            if (other < m_tiles) & (m_i < m_tiles):
                if expert_ids[other] == expert:
                    paired = Int32(1)
            self.init_barriers(full_w, thread, 1 + paired)
        cute.arch.mbarrier_init_fence()
        if const_expr(c.pair or c.split_k > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

        if m_i < m_tiles:
            steps = x.shape[1] // c.block_k
            first, last = Int32(0), steps
            out_tiles = out.shape[1] // UP_ROWS
            out_first, out_step = Int32(0), 1
            if const_expr(c.split_k > 1):
                first, last = steps * rank // c.split_k, steps * (rank + 1) // c.split_k
                out_first, out_step = rank, c.split_k
            if warp_index < 4:
                cute.arch.setmaxregister_decrease(c.registers[0])  # a whole warpgroup, or it is undefined
                if warp_index == 0:
                    # ---------------------------------------------------------------- weights
                    box_rows = UP_ROWS // 2 if c.pair else UP_ROWS
                    whole = (box_rows, c.block_k)
                    tW1 = cute.local_tile(gW1, whole, (None, None, None))
                    tW2 = cute.local_tile(gW2, whole, (None, None, None))
                    one, flat = cute.make_layout(1), cute.group_modes(sBox, 0, 2)
                    to_w1, from_w1 = cpasync.tma_partition(tma_w1, 0, one, flat, cute.group_modes(tW1, 0, 2))
                    to_w2, from_w2 = cpasync.tma_partition(tma_w2, 0, one, flat, cute.group_modes(tW2, 0, 2))
                    stage, phase = Int32(0), Int32(1)
                    for w in cutlass.range(c.wide, unroll=1):
                        for k in cutlass.range(first, last, 1, unroll=1):
                            cute.arch.mbarrier_wait(empty_w + stage, phase)
                            with cute.arch.elect_one():
                                cute.arch.mbarrier_arrive_and_expect_tx(full_w + stage, STAGE_BYTES)
                            self.load(tma_w1, from_w1, to_w1, n_i * c.wide + w, k, expert, stage, full_w, rank, paired)
                            stage += 1
                            if stage == stages:
                                stage, phase = Int32(0), phase ^ 1
                    for n in cutlass.range(out_first, out_tiles, out_step, unroll=1):
                        for k in cutlass.range(c.wide * self.parts_of_h, unroll=1):
                            cute.arch.mbarrier_wait(empty_w + stage, phase)
                            with cute.arch.elect_one():
                                cute.arch.mbarrier_arrive_and_expect_tx(full_w + stage, STAGE_BYTES)
                            column = n_i * (c.wide * self.parts_of_h) + k
                            self.load(tma_w2, from_w2, to_w2, n, column, expert, stage, full_w, rank, paired)
                            stage += 1
                            if stage == stages:
                                stage, phase = Int32(0), phase ^ 1
                else:
                    # ---------------------------------------------------------------- tokens
                    own = thread - (PRODUCER_THREADS - GATHER_THREADS)
                    place, chunk = own // (ROW_BYTES // CHUNK), own % (ROW_BYTES // CHUNK)
                    at_once = GATHER_THREADS // (ROW_BYTES // CHUNK)
                    turns, scale_turns = -(-block // at_once), -(-block // GATHER_THREADS)
                    width = CHUNK * 8 // self.element.width
                    # Where rows start stays in registers; negative where there is nothing to copy
                    rows, scale_rows = (cute.make_rmem_tensor((count,), Int32) for count in (turns, scale_turns))
                    for r in cutlass.range_constexpr(turns):
                        rows[r] = self.start(x, sorted_token_ids, m_i * block, r * at_once + place, top_k)
                    for r in cutlass.range_constexpr(scale_turns if self.fp8 else 0):
                        scale_rows[r] = self.start(
                            x_scale, sorted_token_ids, m_i * block, r * GATHER_THREADS + own, top_k
                        )
                    # Where a row's chunk goes; at_once rows further, its place among eight is 4 more, or less
                    first_to = place * ROW_BYTES + (chunk ^ (place % 8)) * CHUNK
                    stage, phase = Int32(0), Int32(1)
                    for _ in cutlass.range(c.wide, unroll=1):
                        for k in cutlass.range(first, last, 1, unroll=1):
                            cute.arch.mbarrier_wait(empty_x + stage, phase)
                            column = k * c.block_k + chunk * width
                            even_to = self.map.tokens + stage * (block * ROW_BYTES) + first_to
                            odd_to = self.map.tokens + stage * (block * ROW_BYTES) + (first_to ^ 4 * CHUNK)
                            for r in cutlass.range_constexpr(turns):
                                row_to = (even_to, odd_to)[r % 2] + r * at_once * ROW_BYTES
                                if const_expr((r + 1) * at_once <= block):  # noqa: SIM114 (the other is asked on the GPU)
                                    self.copy_row(x, rows[r], column, base, row_to, CHUNK)
                                elif r * at_once + place < block:
                                    self.copy_row(x, rows[r], column, base, row_to, CHUNK)
                            for r in cutlass.range_constexpr(scale_turns if self.fp8 else 0):
                                if r * GATHER_THREADS + own < block:
                                    scale_to = self.map.x_scale + (stage * block + r * GATHER_THREADS + own) * 4
                                    self.copy_row(x_scale, scale_rows[r], k, base, scale_to, 4)
                            cute.arch.cp_async_mbarrier_arrive_noinc(full_x + stage)
                            stage += 1
                            if stage == stages:
                                stage, phase = Int32(0), phase ^ 1
            else:
                # ---------------------------------------------------------------- consumers
                cute.arch.setmaxregister_increase(c.registers[1])
                own = thread - PRODUCER_THREADS
                own_warp = warp_index - 4
                group = cute.arch.make_warp_uniform(own_warp // 4)
                lane = cute.arch.lane_idx()
                all_consumers = pipeline.NamedBarrier(barrier_id=1, num_threads=32 * c.warps)
                own_group = pipeline.NamedBarrier(barrier_id=2 + group, num_threads=128)
                slice_ = self.mma().get_slice(0)
                fragment_a, fragment_b = self.mma().make_fragment_A, self.mma().make_fragment_B
                tA = fragment_a(slice_.partition_A(cute.local_tile(sW, (64, c.block_k), (None, 0, None))))
                first_tile = group * tiles
                tX = fragment_b(slice_.partition_B(sX))
                tH = fragment_b(slice_.partition_B(sH))
                accumulator = cute.make_rmem_tensor((block // 2 * in_flight if self.fp8 else 1,), Float32)
                sums = cute.make_rmem_tensor((4 * octets, tiles), Float32)
                if own < block:
                    slot = sorted_token_ids[m_i * block + own]
                    weight = Float32(0.0)
                    if slot < tokens * top_k:
                        weight = routing[slot]
                    sRouting[own] = weight
                row_of_out = Int32(-1)  # of this thread's token in its warpgroup's staged rows
                if own % 128 < block:
                    slot = sorted_token_ids[m_i * block + own % 128]
                    if slot < tokens * top_k:
                        row_of_out = slot // top_k
                        if const_expr(c.combine == "rows"):
                            row_of_out = n_i * (tokens * top_k) + slot
                stage, phase, x_stage, x_phase = Int32(0), Int32(0), Int32(0), Int32(0)

                for w in cutlass.range(c.wide, unroll=1):
                    # ---- gate and up
                    n = n_i * c.wide + w
                    sums.fill(0.0)
                    for k in cutlass.range(first, last, 1, unroll=1):
                        gate_scale, up_scale = Float32(1.0), Float32(1.0)
                        if const_expr(self.fp8):  # asked for before the wait
                            gate_scale, up_scale = w1_scale[0, n, k, expert], w1_scale[1, n, k, expert]
                        cute.arch.mbarrier_wait(full_x + x_stage, x_phase)
                        cute.arch.mbarrier_wait(full_w + stage, phase)
                        cute.arch.fence_proxy("async.shared", space="cta")  # cp.async wrote for WGMMA to read
                        b = tX[(None, None, None, x_stage)]
                        warpgroup.fence()
                        if const_expr(self.fp8):
                            for t in cutlass.range_constexpr(in_flight):
                                self.multiply(accumulator, t * (block // 2), tA, first_tile + t, stage, b, False)
                            for t in cutlass.range_constexpr(tiles):
                                warpgroup.wait_group(min(t + in_flight, tiles) - (t + 1))
                                at = t % in_flight * (block // 2)
                                for m in cutlass.range_constexpr(octets):
                                    for j in cutlass.range_constexpr(2):
                                        scale = sXs[8 * m + lane % 4 * 2 + j, x_stage]
                                        i = 4 * m + j
                                        sums[i, t] = sums[i, t] + accumulator[at + i] * (gate_scale * scale)
                                        sums[i + 2, t] = sums[i + 2, t] + accumulator[at + i + 2] * (up_scale * scale)
                                if const_expr(t + in_flight < tiles):
                                    warpgroup.fence()
                                    self.multiply(accumulator, at, tA, first_tile + t + in_flight, stage, b, False)
                        else:
                            for t in cutlass.range_constexpr(tiles):
                                self.multiply(sums, t * (block // 2), tA, first_tile + t, stage, b, True)
                            warpgroup.wait_group(0)
                        cute.arch.sync_warp()
                        if lane == 0:
                            cute.arch.mbarrier_arrive(empty_w + stage)
                            cute.arch.mbarrier_arrive(empty_x + x_stage)
                        if const_expr(c.pair):
                            if (lane == 1) & (paired == 1):
                                cute.arch.mbarrier_arrive(empty_w + stage, rank ^ 1)
                        stage += 1
                        if stage == stages:
                            stage, phase = Int32(0), phase ^ 1
                        x_stage += 1
                        if x_stage == stages:
                            x_stage, x_phase = Int32(0), x_phase ^ 1
                    if const_expr(c.split_k > 1):
                        self.share(sums, base, gathered, rank, own, all_consumers)

                    # ---- SwiGLU, into registers 4m and 4m + 1
                    for t in cutlass.range_constexpr(tiles):
                        for m in cutlass.range_constexpr(octets):
                            for j in cutlass.range_constexpr(2):
                                gate, up = sums[4 * m + j, t], sums[4 * m + 2 + j, t]
                                if up_first == 1:
                                    gate, up = up, gate
                                e = cute.math.exp2(gate * -LOG2_E, fastmath=True)
                                sums[4 * m + j, t] = gate * cute.arch.rcp_approx(1.0 + e) * up
                    if const_expr(self.fp8):
                        # ---- a token's largest: of a thread's, of the 8 lanes that share it, of all warps'
                        for m in cutlass.range_constexpr(octets):
                            for j in cutlass.range_constexpr(2):
                                most = Float32(TINY)
                                for t in cutlass.range_constexpr(tiles):
                                    most = cute.arch.fmax(most, cute.arch.fmax(sums[4 * m + j, t], -sums[4 * m + j, t]))
                                for distance in cutlass.range_constexpr(2, 5):
                                    most = cute.arch.fmax(most, cute.arch.shuffle_sync_bfly(most, 1 << distance))
                                if lane < 4:
                                    sMax[8 * m + lane * 2 + j, own_warp] = most
                        all_consumers.arrive_and_wait()
                        for m in cutlass.range_constexpr(octets):
                            for j in cutlass.range_constexpr(2):
                                token = 8 * m + lane % 4 * 2 + j
                                most = Float32(TINY)
                                for other_warp in cutlass.range_constexpr(c.warps):
                                    most = cute.arch.fmax(most, sMax[token, other_warp])
                                if (own_warp == 0) & (lane < 4):
                                    sHs[token, w] = most * (1.0 / FP8_MAX) * sRouting[token]
                                inverse = FP8_MAX * cute.arch.rcp_approx(most)
                                scaled = cute.make_rmem_tensor((4,), Float32)  # conversions come in fours
                                rounded = cute.make_rmem_tensor((4,), Float8E4M3FN)
                                for t in cutlass.range_constexpr(4):
                                    scaled[t] = sums[4 * m + j, t % tiles] * inverse
                                rounded.store(scaled.load().to(Float8E4M3FN))
                                for t in cutlass.range_constexpr(tiles):
                                    column = (group * tiles + t) * 32 + own_warp % 4 * 8 + lane // 4
                                    sH[token, column, w] = rounded[t]
                    else:
                        for m in cutlass.range_constexpr(octets):
                            for j in cutlass.range_constexpr(2):
                                for t in cutlass.range_constexpr(tiles):
                                    column = (group * tiles + t) * 32 + own_warp % 4 * 8 + lane // 4
                                    part = w * self.parts_of_h + column // c.block_k
                                    sH[8 * m + lane % 4 * 2 + j, column % c.block_k, part] = BFloat16(
                                        sums[4 * m + j, t]
                                    )
                    cute.arch.fence_proxy("async.shared", space="cta")  # written for WGMMA to read
                    all_consumers.arrive_and_wait()

                # ---- down, 256 columns at a time
                staged, buffer = base + self.map.tokens, Int32(0)
                for n in cutlass.range(out_first, out_tiles, out_step, unroll=1):
                    sums.fill(0.0)
                    for k in cutlass.range(c.wide * self.parts_of_h, unroll=1):
                        b = tH[(None, None, None, k)]
                        if const_expr(self.fp8):
                            scales = cute.make_rmem_tensor((tiles // 2,), Float32)  # 128 columns share one
                            for half in cutlass.range_constexpr(tiles // 2):
                                scales[half] = w2_scale[2 * n + group * (tiles // 2) + half, n_i * c.wide + k, expert]
                            cute.arch.mbarrier_wait(full_w + stage, phase)
                            warpgroup.fence()
                            for t in cutlass.range_constexpr(in_flight):
                                self.multiply(accumulator, t * (block // 2), tA, first_tile + t, stage, b, False)
                            for t in cutlass.range_constexpr(tiles):
                                warpgroup.wait_group(min(t + in_flight, tiles) - (t + 1))
                                at = t % in_flight * (block // 2)
                                for m in cutlass.range_constexpr(octets):
                                    for i in cutlass.range_constexpr(4):
                                        scale = scales[t // 2] * sHs[8 * m + lane % 4 * 2 + i % 2, k]
                                        sums[4 * m + i, t] = sums[4 * m + i, t] + accumulator[at + 4 * m + i] * scale
                                if const_expr(t + in_flight < tiles):
                                    warpgroup.fence()
                                    self.multiply(accumulator, at, tA, first_tile + t + in_flight, stage, b, False)
                        else:
                            cute.arch.mbarrier_wait(full_w + stage, phase)
                            warpgroup.fence()
                            for t in cutlass.range_constexpr(tiles):
                                self.multiply(sums, t * (block // 2), tA, first_tile + t, stage, b, True)
                            warpgroup.wait_group(0)
                        cute.arch.sync_warp()
                        if lane == 0:
                            cute.arch.mbarrier_arrive(empty_w + stage)
                        if const_expr(c.pair):
                            if (lane == 1) & (paired == 1):
                                cute.arch.mbarrier_arrive(empty_w + stage, rank ^ 1)
                        stage += 1
                        if stage == stages:
                            stage, phase = Int32(0), phase ^ 1
                    if const_expr(not self.fp8):
                        for m in cutlass.range_constexpr(octets):
                            for i in cutlass.range_constexpr(4):
                                for t in cutlass.range_constexpr(tiles):
                                    sums[4 * m + i, t] = sums[4 * m + i, t] * sRouting[8 * m + lane % 4 * 2 + i % 2]
                    # ---- out, 128 columns of a warpgroup at a time
                    for half in cutlass.range_constexpr(tiles // 2):
                        if const_expr(self.map.buffers == 1):  # the last columns have left
                            cute.arch.cp_async_bulk_wait_group(0, read=True)
                            own_group.arrive_and_wait()
                        self.stage(sums, half, staged, buffer, group, own_warp, lane)
                        cute.arch.fence_proxy("async.shared", space="cta")
                        if const_expr(self.map.buffers == 2):  # those before have: the other buffer is free from here
                            cute.arch.cp_async_bulk_wait_group(0, read=True)
                        own_group.arrive_and_wait()
                        if row_of_out >= 0:
                            column = n * UP_ROWS + (group * (tiles // 2) + half) * OUT_COLUMNS
                            self.send(out, row_of_out, column, staged, buffer, group, own % 128)
                        cute.arch.cp_async_bulk_commit_group()
                        if const_expr(self.map.buffers == 2):
                            buffer ^= 1
                cute.arch.cp_async_bulk_wait_group(0)
        if const_expr(c.pair or c.split_k > 1):  # others may still arrive here
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def init_barriers(self, full_w: cute.Pointer, thread: Int32, ctas: Int32):
        """ctas: how many of a cluster read what is loaded into this one's stages."""
        c = self.c
        if thread == 0:
            for i in cutlass.range_constexpr(c.stages):
                cute.arch.mbarrier_init(full_w + i, 1)
                cute.arch.mbarrier_init(full_w + (c.stages + i), c.warps * ctas)
                cute.arch.mbarrier_init(full_w + (2 * c.stages + i), GATHER_THREADS)
                cute.arch.mbarrier_init(full_w + (3 * c.stages + i), c.warps)
            cute.arch.mbarrier_init(full_w + 4 * c.stages, 1)

    def swizzled(self, at, layout):
        return cute.make_tensor(cute.recast_ptr(at, layout.inner, dtype=self.element), layout.outer)

    def floats(self, at, layout):
        return cute.make_tensor(cute.recast_ptr(at, dtype=Float32), layout)

    @cute.jit
    def load(self, tma: cute.CopyAtom, source: cute.Tensor, target: cute.Tensor, n: Int32, k: Int32, expert: Int32,
             stage: Int32, full: cute.Pointer, rank: Int32, paired: Int32):  # fmt: skip
        """A stage of weights: rows [256 n, 256 n + 256), step k."""
        if const_expr(self.c.pair):
            if paired == 1:
                cute.copy(tma, source[(None, 2 * n + rank, k, expert)], target[(None, 2 * stage + rank)],
                          tma_bar_ptr=full + stage, mcast_mask=Int16(3))  # fmt: skip
            else:
                for half in cutlass.range_constexpr(2):
                    cute.copy(tma, source[(None, 2 * n + half, k, expert)], target[(None, 2 * stage + half)],
                              tma_bar_ptr=full + stage, mcast_mask=Int16(1 << rank))  # fmt: skip
        else:
            cute.copy(tma, source[(None, n, k, expert)], target[(None, stage)], tma_bar_ptr=full + stage)

    @cute.jit
    def start(self, source: cute.Tensor, sorted_token_ids: cute.Tensor, first: Int32, at: Int32, top_k: Int32):
        """Elements of `source` before the row of a block's slot, -1 where it has none."""
        start = Int32(-1)
        if at < self.c.block_m:
            row = sorted_token_ids[first + at] // top_k
            if row < source.shape[0]:
                start = row * source.shape[1]
        return start

    def copy_row(self, source, start, column, base, to, nbytes):
        """nbytes of a row of `source`, or zeros where there is none, to offset `to` of shared memory, by cp.async. It
        does not branch: all of a thread's copies are under way at once. 16 bytes go past L1, where nobody reads them
        again."""
        cache = cpasync.LoadCacheMode.GLOBAL if nbytes == CHUNK else cpasync.LoadCacheMode.ALWAYS
        dtype, count = source.element_type, nbytes * 8 // source.element_type.width
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(cache_mode=cache), dtype, num_bits_per_copy=8 * nbytes)
        at = cute.assume(start + column, divby=count)
        target = cute.recast_ptr(base + cute.assume(to, divby=nbytes), dtype=dtype)
        exists = cute.make_rmem_tensor(cute.make_layout((count, 1), stride=(0, 0)), cutlass.Boolean)
        exists[0] = start >= 0
        chunk = cute.make_layout((count, 1))
        cute.copy(atom, cute.make_tensor(source.iterator + at, chunk), cute.make_tensor(target, chunk), pred=exists)

    def multiply(self, to, at, weights, tile_index, stage, b, add):
        """A 64 x block tile in registers, from `at` on: (to +) a b, over the columns of a step. Commits a group."""
        a = weights[(None, None, None, tile_index, stage)]
        mma = self.mma()
        tile = cute.make_tensor(to.iterator + at, cute.make_layout(mma.partition_shape_C((64, self.c.block_m))))
        for k in range(cute.size(a, mode=[2])):
            mma.set(warpgroup.Field.ACCUMULATE, add or k != 0)
            cute.gemm(mma, tile, a[(None, None, k)], b[(None, None, k)], tile)
        warpgroup.commit_group()

    @cute.jit
    def share(self, sums: cute.Tensor, base: cute.Pointer, gathered: cute.Pointer, rank: Int32, own: Int32,
              all_consumers: cutlass.Constexpr):  # fmt: skip
        """sums <- the sum over the cluster, added up in the order of its CTAs."""
        c = self.c
        octets, threads, nbytes = c.block_m // 8, 32 * c.warps, c.block_m * UP_ROWS * 4
        parts = cute.recast_ptr(base + self.map.parts, dtype=Float32)
        for t in cutlass.range_constexpr(c.tiles):
            for m in cutlass.range_constexpr(octets):
                at = ((rank * c.tiles + t) * octets + m) * threads + own
                quad = cute.make_tensor((parts + at * 4).align(16), cute.make_layout(4))
                for i in cutlass.range_constexpr(4):
                    quad[i] = sums[4 * m + i, t]
        cute.arch.fence_proxy("async.shared", space="cta")
        all_consumers.arrive_and_wait()
        if own == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(gathered, (c.split_k - 1) * nbytes)
        if (own < c.split_k) & (own != rank):
            mine = (parts + rank * (c.block_m * UP_ROWS)).to_llvm_ptr()
            prims.cp_async_bulk_shared_cluster_shared_cta(
                prims.mapa(mine, own), mine, prims.mapa(gathered.to_llvm_ptr(), own), nbytes
            )
        cute.arch.mbarrier_wait(gathered, 0)
        sums.fill(0.0)
        for r in cutlass.range_constexpr(c.split_k):
            for t in cutlass.range_constexpr(c.tiles):
                for m in cutlass.range_constexpr(octets):
                    at = ((r * c.tiles + t) * octets + m) * threads + own
                    quad = cute.make_tensor((parts + at * 4).align(16), cute.make_layout(4))
                    for i in cutlass.range_constexpr(4):
                        sums[4 * m + i, t] = sums[4 * m + i, t] + quad[i]

    @cute.jit
    def stage(self, sums: cute.Tensor, half: cutlass.Constexpr, staged: cute.Pointer, buffer: Int32, group: Int32,
              own_warp: Int32, lane: Int32):  # fmt: skip
        """Two tiles of sums, 128 output columns, to shared memory: a row a token."""
        c = self.c
        pitch = c.out_pitch
        first = (buffer * c.warpgroups + group) * (c.block_m * pitch)
        if const_expr(c.combine == "f32"):
            rows = cute.recast_ptr(staged, dtype=Float32)
            for m in cutlass.range_constexpr(c.block_m // 8):
                for i in cutlass.range_constexpr(8):
                    token = 8 * m + lane % 4 * 2 + i % 2
                    column = i // 4 * 64 + own_warp % 4 * 16 + i // 2 % 2 * 8 + lane // 4
                    at = cute.make_tensor(rows + (first + token * pitch + column), cute.make_layout(1))
                    at[0] = sums[4 * m + i % 4, 2 * half + i // 4]
        else:
            rows = cute.recast_ptr(staged, dtype=BFloat16)
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
    def send(self, out: cute.Tensor, row: Int32, column: Int32, staged: cute.Pointer, buffer: Int32, group: Int32,
             own: Int32):  # fmt: skip
        """A staged row on its way: added to the output, or stored."""
        c = self.c
        pitch = c.out_pitch
        dtype = Float32 if c.combine == "f32" else BFloat16
        at = ((buffer * c.warpgroups + group) * c.block_m + own) * pitch
        source = (cute.recast_ptr(staged, dtype=dtype) + at).to_llvm_ptr()
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


def arguments(config: Config):
    """Tensors of any size, as `FusedMoE.__call__` takes them."""
    element = Float8E4M3FN if config.dtype == "fp8" else BFloat16
    width = CHUNK * 8 // element.width  # elements in 16 bytes, to which tensor maps align
    result = Float32 if config.combine == "f32" else BFloat16

    def free(divisibility: int = 1):
        return cute.sym_int(divisibility=divisibility)

    def stride(divisibility: int = 1):
        return cute.sym_int64(divisibility=divisibility)

    def fake(dtype, shape, strides, align):
        return cute.runtime.make_fake_tensor(dtype, shape, strides, assumed_align=align)

    tokens, hidden, experts = free(), free(UP_ROWS), free()
    scales_h, scales_i, eights = free(), free(), free(16)
    return (
        fake(element, (tokens, hidden), (stride(width), 1), CHUNK),
        fake(Float32, (tokens, scales_h), (stride(), 1), 4),
        fake(element, (8, 2, eights, hidden, experts), (*(stride(width) for _ in range(3)), 1, stride(width)), CHUNK),
        fake(Float32, (2, scales_i, scales_h, experts), (stride(), stride(), 1, stride()), 4),
        fake(element, (hidden, free(INTERMEDIATES), experts), (stride(width), 1, stride(width)), CHUNK),
        fake(Float32, (free(), free(), experts), (stride(), 1, stride()), 4),
        fake(result, (free(), hidden), (stride(width), 1), CHUNK),
        fake(Int32, (free(),), (1,), 4),
        fake(Int32, (free(),), (1,), 4),
        fake(Int32, (1,), (1,), 4),
        fake(Float32, (free(),), (1,), 4),
        Int32(1),
        Int32(1),
        Int32(0),
        fake(Int32, (1,), (1,), 4),
        Int32(0),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def compile_config(config: Config, function: str, object_path: Path) -> None:
    """Compile for sm_90a, with or without a GPU, and write an object file that exports `function`."""
    compiled = cute.compile(FusedMoE(config), *arguments(config), options="--enable-tvm-ffi", no_jit_engine=True)
    compiled.export_to_c(str(object_path), function_name=function)
