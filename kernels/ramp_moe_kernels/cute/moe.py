"""The fused MoE kernel for Hopper, in CuTe DSL: up projection, SwiGLU, requantisation, down projection, weighted sum.

    out[t] += sum over t's routed ids p of routing[p] * (silu(x[t] Wg_e) * (x[t] Wu_e)) Wd_e          e: p's expert

One launch, after a schedule that sorts ids by expert into blocks. Weights are fp8 e4m3 with a float32 scale for each
[128, 128] block, tokens fp8 with a scale for each 128 columns; or all is bf16, and scales are ignored.

A CTA takes one M-tile (`block` slots of the schedule, of one expert) and `wide` times 256 rows of gate and up, which
are 128 intermediates. Both GEMMs swap operands: weights are WGMMA's A (64 rows a tile), tokens its B (N = block), so
that a block may be as small as 8 tokens. The intermediates never leave shared memory.

Roles        warp 0        loads weights by TMA, 256 rows x 128 bytes a stage, first of gate and up, then of down
             warps 1-3     copy tokens' 128 bytes (and scales) by cp.async, from their unsorted rows
             warps 4-      consumers: warpgroup g multiplies rows [g * 256 / warpgroups, ...) of every stage

Timeline     warp 0        W1 W1 W1 ... W1 | W2 W2 ... W2           runs ahead by `stages`, also over the phases
             warps 1-3     x  x  x  ... x
             consumers     mma + scale ... | SwiGLU, quantise | mma + scale, out | mma + scale, out ...

             warps 1-3     know their tokens' rows from the start, in registers; a padded slot's are zeros

Files        `moe.py` the launch, a CTA's tile and its roles; `producers.py`, `consumers.py`, `output.py` the roles;
             `cta.py` what they share; `barriers.py` arrivals, counted on the host before anything is compiled

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
             Example, block 8: register 3 of lane 5 of warp 2 has row 16 * 2 + 8 + 1 = 41 of token 2 * 1 + 1 = 3. It
             is up of intermediate 8 * 2 + 1 = 17, whose gate is in register 1.

Out          128 columns of a warpgroup at a time: bf16, transposed by stmatrix, staged, and a thread a token adds its
             256 bytes to the output by cp.reduce.async.bulk, while the next columns are multiplied. `f32` adds 512
             bytes to a float32 output; `rows` stores them to a row of every id and part, summed in order afterwards.

split_k      The CTAs of a cluster multiply a part of hidden_size each and send their sums to all others, who add
             them up in the same order: all have the same intermediates. Each computes its part of the output columns.
pair         Two CTAs of a cluster have M-tiles of one expert. Each loads half of every stage for both (TMA multicast),
             so that weights are read from L2 once for two M-tiles. M-tiles of two experts load for themselves.

blocks       One launch for several token blocks, all else equal. The device chooses one, for the schedule, too. Every
             CTA reads the choice first. Registers and shared memory are those of the largest block.

These hang or corrupt, as experience shows:

- TMA under a branch of one thread: it elects one itself.
- An accumulator's token that is taken from a warpgroup's slice instead of the lane.
- A plain store to shared memory before cp.async's arrival on a barrier, which does not release it. So scales are copied
  by cp.async, too.
- A CTA of a cluster that ends before another has arrived on its barriers.
- Consumers that ask for more registers than the producers leave of those with which the CTA was launched.

These slow down:

- WGMMA in flight at a branch or at a loop's end, which the assembler then serialises.
- Copies of tokens that branch: they took a third of the time of bf16 at 8,192 tokens.

compute-sanitizer's racecheck names hazards between cp.async's writes of scales and the reads of the round before. It
follows an mbarrier from a thread that arrives, and here one lane arrives for its warp, after __syncwarp. The same loop
in twenty lines shows the same hazards, and none if every lane arrives.
"""
# The DSL traces Python: annotations must be types at run time, and its functions are untyped.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call, misc"

from pathlib import Path
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from .barriers import PRODUCER_WARPS, WEIGHTS_WARP, check, expected
from .config import INTERMEDIATES, UP_ROWS, Config, smem_bytes
from .consumers import Consumer
from .cta import Barriers, CtaTile, KernelParameters, Layouts
from .producers import CHUNK, TokensProducer, WeightsProducer


class FusedMoE:
    """The kernel of one configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.layouts = Layouts(config)

    def launch_options(self):
        c = self.config
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
        sorted_token_ids: cute.Tensor,  # int32 [capacity]: routed ids by expert; T * k or more for padding
        expert_ids: cute.Tensor,  # int32 [tiles]
        num_tokens_post_padded: cute.Tensor,  # int32 [1]: slots in use, whole blocks
        routing: cute.Tensor,  # float32 [T * k]
        top_k: Int32,
        tiles: Int32,  # M-tiles to launch: as many as there can be
        up_first: Int32,  # 1: index 0 of gate_up's second dimension is up
        choice: cute.Tensor,  # int32 [1], read if there are several blocks
        blocks: Int32,  # by choice, four bits each: index of the block
        stream: cuda.CUstream,
    ):
        c = self.config
        whole = (self.layouts.box_rows, c.block_k)
        box = cute.slice_(self.layouts.boxes(), (None, None, 0))
        op = cpasync.CopyBulkTensorTileG2SMulticastOp() if c.pair else cpasync.CopyBulkTensorTileG2SOp()
        rows = cute.make_layout(
            (gate_up.shape[:3], gate_up.shape[3], gate_up.shape[4]),
            stride=(gate_up.stride[:3], gate_up.stride[3], gate_up.stride[4]),
        )
        tma_w1, w1 = cpasync.make_tiled_tma_atom(op, cute.make_tensor(gate_up.iterator, rows), box, whole)
        tma_w2, w2 = cpasync.make_tiled_tma_atom(op, down, box, whole)
        tiles_n = gate_up.shape[2] * 16 // (UP_ROWS * c.wide)
        tiles_m = (tiles + 1) // 2 * 2 if c.pair else tiles
        given = KernelParameters(
            x, x_scale, tma_w1, w1, gate_up_scale, tma_w2, w2, down_scale, out, sorted_token_ids, expert_ids,
            num_tokens_post_padded, routing, top_k, up_first, tiles_n, choice, blocks,
        )  # fmt: skip
        self.kernel(given).launch(
            grid=(tiles_n * c.split_k, tiles_m, 1),
            block=(c.threads, 1, 1),
            min_blocks_per_mp=c.ctas,
            stream=stream,
            **self.launch_options(),
        )

    @cute.kernel
    def kernel(self, given: KernelParameters):
        base = cutlass.utils.SmemAllocator().allocate(smem_bytes(self.config), 1024)
        if const_expr(len(self.config.blocks) == 1):
            self.body(base, given)
        else:
            cute.arch.griddepcontrol_wait()
            chosen = (given.blocks >> (4 * given.choice[0])) & 15
            for i in cutlass.range_constexpr(len(self.config.blocks)):
                if chosen == i:
                    FusedMoE(self.config.of(self.config.blocks[i])).body(base, given)

    @cute.jit
    def body(self, base: cute.Pointer, given: KernelParameters):
        """Run a CTA: find its tile, initialise its barriers, then take the role of each warp."""
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        bx, by, _ = cute.arch.block_idx()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_index == WEIGHTS_WARP:
            cpasync.prefetch_descriptor(given.tma_w1)
            cpasync.prefetch_descriptor(given.tma_w2)
        shared = self.layouts.shared(base)
        n_i, m_i, rank = self.place(bx, by, given.tiles_n)

        # the schedule's output; a pair's barriers depend on it
        if const_expr(not c.pair):
            self.init_barriers(shared.barriers, thread, 1)
        cute.arch.griddepcontrol_wait()
        expert = given.expert_ids[cutlass.min(m_i, given.expert_ids.shape[0] - 1)]
        m_tiles = given.num_tokens_post_padded[0] // c.block_m
        paired = Int32(0)
        if const_expr(c.pair):
            other = m_i ^ 1
            if (other < m_tiles) & (m_i < m_tiles):
                if given.expert_ids[other] == expert:
                    paired = Int32(1)
            self.init_barriers(shared.barriers, thread, 1 + paired)
        cute.arch.mbarrier_init_fence()
        if const_expr(c.pair or c.split_k > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

        if m_i < m_tiles:
            steps = given.x.shape[1] // c.block_k
            first, last = Int32(0), steps
            out_first, out_last = Int32(0), given.out.shape[1] // UP_ROWS
            if const_expr(c.split_k > 1):
                first, last, out_first = steps * rank // c.split_k, steps * (rank + 1) // c.split_k, rank
            tile = CtaTile(n_i, m_i, rank, paired, expert, first, last, out_first, out_last, c.split_k)
            if warp_index < PRODUCER_WARPS:
                cute.arch.setmaxregister_decrease(c.registers[0])  # a whole warpgroup, or it is undefined
                if warp_index == WEIGHTS_WARP:
                    WeightsProducer(self.layouts, given, shared, tile).produce_weights()
                else:
                    TokensProducer(self.layouts, given, shared, tile, thread).gather_tokens()
            else:
                cute.arch.setmaxregister_increase(c.registers[1])
                Consumer(self.layouts, given, shared, tile, thread, warp_index).consume()
        if const_expr(c.pair or c.split_k > 1):  # others may still arrive here
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def place(self, bx: Int32, by: Int32, tiles_n: Int32):
        """The CTA's weight tile, M-tile, and rank in its cluster: weight tiles first, or group_m M-tiles first."""
        c = self.config
        n_i, m_i = bx // c.split_k, by
        if const_expr(c.group_m > 1):
            _, grid_m, _ = cute.arch.grid_dim()
            linear = by * tiles_n + n_i
            band = linear // (c.group_m * tiles_n)
            band_rows = cutlass.min(grid_m - band * c.group_m, c.group_m)
            within = linear % (c.group_m * tiles_n)
            n_i, m_i = within // band_rows, band * c.group_m + within % band_rows
        return n_i, m_i, bx % c.split_k if c.split_k > 1 else by % 2

    @cute.jit
    def init_barriers(self, barriers: Barriers, thread: Int32, readers: Int32):
        """Initialise the barriers. readers: CTAs of a cluster that read what is loaded into this one's stages."""
        arrivals = expected(self.config, readers)
        if thread == 0:
            for i in cutlass.range_constexpr(self.config.stages):
                cute.arch.mbarrier_init(barriers.full_w + i, arrivals.full_w)
                cute.arch.mbarrier_init(barriers.empty_w + i, arrivals.empty_w)
                cute.arch.mbarrier_init(barriers.full_x + i, arrivals.full_x)
                cute.arch.mbarrier_init(barriers.empty_x + i, arrivals.empty_x)
            cute.arch.mbarrier_init(barriers.gathered, arrivals.gathered)


def arguments(config: Config):
    """Arguments of `FusedMoE.__call__` for compiling, with tensors of any size."""
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
    check(config)
    compiled = cute.compile(FusedMoE(config), *arguments(config), options="--enable-tvm-ffi", no_jit_engine=True)
    compiled.export_to_c(str(object_path), function_name=function)
