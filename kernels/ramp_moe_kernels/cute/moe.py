# ruff: noqa
# mypy: ignore-errors
"""Fused FP8 W8A8 block-scaled MoE for Hopper (sm_90a): gate/up GEMM + SwiGLU + requant + down GEMM + top-k sum.

One CTA = one m-block (bm sorted token slots of one expert) x 256 interleaved gate/up rows (= 128 intermediates).
GEMMs are swap-AB: weights are the wgmma A operand (64 rows per tile), tokens are the N dimension (bm).

Warp roles   warps 0-3   producer: warp 0 also issues the weight TMA, all 128 threads gather x rows with cp.async
             warps 4..   consumers: wgs warpgroups of 4 warps; warpgroup w owns weight rows [w*256/wgs, ...)
Barriers     full[s]     128 producer arrivals (cp.async noinc, or plain in the down phase) + 1 expect_tx arrival
             empty[s]    one arrival per consumer thread (32*wn); the producer starts on phase 1 (passes at once)
             named 1     all consumers (SwiGLU amax exchange, H ready);  named 2+w: consumer warpgroup w (down epilogue)
Layouts      W1 rows are interleaved 8 gate / 8 up => accumulator rows r and r+8 of a thread are a gate/up pair
             accumulator register i of a lane: j=i%2, half=i//2%2, m=i//4;  row = 16*warp + 8*half + lane//4,
             token column = 8*m + 2*(lane%4) + j        (the lane part must NOT be taken from a warpgroup slice)
Epilogue     down output goes out in chunks of 128 columns per warpgroup: bf16 -> stmatrix -> smem staging (1 or 2 buffers,
             sharing memory with the x stages) -> cp.reduce.async.bulk add; one thread per token row issues its 256 bytes
Scales       token scale x routing weight is kept in sTs[token, ib]; W scales are read from global (L1 hits)
Requires     hidden % 256 == 0, intermediate % (128*ni) == 0, hidden/128 >= stages, out zeroed by the caller,
             tw = topk_weights.view(-1) indexed by ids[p] = token*top_k + j (pad slots: ids[p] >= M*top_k),
             eids has one entry per launched m-block (grid.y)
Checked      H200, 4.8.1: rel. error 0.022-0.025 to an unquantised-h float32 reference (requantisation alone: 0.022-0.023)
"""
import time, sys, math
from dataclasses import dataclass
import cutlass, cutlass.cute as cute, cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
import cuda.bindings.driver as cuda
from cutlass import Int32, Float32, BFloat16, Float8E4M3FN, const_expr
from cutlass.cute.nvgpu import warpgroup, cpasync, warp, OperandMajorMode
from cutlass.experimental import primitives as prims

@dataclass(frozen=True)
class MoeConfig:
    bm: int; bn: int; wn: int; stages: int
    occ: int = 1       # CTAs per SM the registers are budgeted for
    nacc: int = 2      # accumulator tiles in flight in the up phase (<= tiles per warpgroup)
    ni: int = 1        # 128-intermediate blocks per CTA: fewer CTAs, 1/ni of the output reductions

BK = 128
PRODUCER_THREADS = 128
SMEM_MAX = 227 * 1024

def acc_tile(t, n, mma, bm):
    """n-th 64 x bm accumulator tile of a flat register tensor."""
    return cute.make_tensor(t.iterator + n * (bm // 2), cute.make_layout(mma.partition_shape_C((64, bm))))

class FusedMoe:
    def __init__(self, cfg: MoeConfig):
        self.cfg = cfg
        self.wgs = cfg.wn // 4
        self.rows_w = 256                      # gate+up rows per CTA, also down output columns per stage
        self.bk2 = 128                         # K of the down GEMM per CTA
        self.bn2 = 256
        self.tn = 4 // self.wgs                # 64-row tiles per warpgroup
        self.nacc = min(cfg.nacc, self.tn)
        self.ostride = 128 + 8                 # output is staged and reduced in chunks of 128 columns per warpgroup
        self.threads = PRODUCER_THREADS + 32 * cfg.wn
        obuf = self.wgs * cfg.bm * self.ostride * 2
        xbytes = cfg.bm * BK * cfg.stages
        rest = cfg.stages * (self.rows_w * BK) + cfg.bm * BK * cfg.ni + cfg.bm * cfg.stages * 4 + cfg.bm * 4 * (4 * self.wgs + 1 + cfg.ni) + 16 * cfg.stages + 3072
        self.obuf = 2 if rest + max(xbytes, 2 * obuf) <= (SMEM_MAX - 1024 * (cfg.occ - 1)) // cfg.occ else 1
        self.xo_bytes = max(xbytes, self.obuf * obuf)      # x stages and the output staging share one region
        if cfg.occ == 1:
            self.regs_p, self.regs_c = (40, 232) if self.wgs <= 2 else (24, 152)
        else:                                  # 2 CTAs/SM
            self.regs_p, self.regs_c = (24, 104) if self.wgs == 2 else (32, 224)

    @cute.jit
    def __call__(self, x: cute.Tensor, xs: cute.Tensor, w1: cute.Tensor, w1s: cute.Tensor,
                 w2: cute.Tensor, w2s: cute.Tensor, out: cute.Tensor, ids: cute.Tensor,
                 eids: cute.Tensor, ntpp: cute.Tensor, tw: cute.Tensor, top_k: Int32, max_mblocks: Int32,
                 stream: cuda.CUstream):
        cfg = self.cfg
        K = OperandMajorMode.K
        bm, S = cfg.bm, cfg.stages
        # one-warpgroup MMA; the weight tile is picked by index, so every warpgroup owns contiguous rows
        mma = sm90.make_trivial_tiled_mma(Float8E4M3FN, Float8E4M3FN, K, K, Float32, (1, 1, 1), tiler_mn=(64, bm))
        def smem_layout(rows, k, stages):
            atom = warpgroup.make_smem_layout_atom(
                sm90.get_smem_layout_atom(cutlass.utils.LayoutEnum.ROW_MAJOR, Float8E4M3FN, k), Float8E4M3FN)
            return cute.tile_to_shape(atom, (rows, k, stages), order=(0, 1, 2))
        sW_l = smem_layout(256, BK, S)           # W1 and W2 stages have the same shape (256 x 128)
        sX_l = smem_layout(bm, BK, S)
        sH_l = smem_layout(bm, self.bk2, cfg.ni)
        g2s = cpasync.CopyBulkTensorTileG2SOp()
        tma_w1, gW1 = cpasync.make_tiled_tma_atom(g2s, w1, cute.slice_(sW_l, (None, None, 0)), (256, BK))
        tma_w2, gW2 = cpasync.make_tiled_tma_atom(g2s, w2, cute.slice_(sW_l, (None, None, 0)), (256, BK))
        n_cta = cute.ceil_div(w1.shape[0], self.rows_w * cfg.ni)

        @cute.struct
        class Storage:
            bar: cute.struct.MemRange[cutlass.Int64, 2 * S]
            xs: cute.struct.MemRange[Float32, bm * S]
            tw: cute.struct.MemRange[Float32, bm]
            ts: cute.struct.MemRange[Float32, bm * cfg.ni]
            red: cute.struct.MemRange[Float32, bm * 4 * self.wgs]
            w: cute.struct.Align[cute.struct.MemRange[Float8E4M3FN, cute.cosize(sW_l)], 1024]
            xo: cute.struct.Align[cute.struct.MemRange[Float8E4M3FN, self.xo_bytes], 1024]
            h: cute.struct.Align[cute.struct.MemRange[Float8E4M3FN, cute.cosize(sH_l)], 1024]
        self.Storage = Storage
        self.kernel(x, xs, tma_w1, gW1, w1s, tma_w2, gW2, w2s, out, ids, eids, ntpp, tw, top_k, mma,
                    sW_l, sX_l, sH_l).launch(
            grid=(n_cta, max_mblocks, 1), block=(self.threads, 1, 1), min_blocks_per_mp=cfg.occ, stream=stream,
            **({} if cfg.occ == 1 else {'preferred_smem_carveout': 100}))   # given explicitly: the default asks the driver at compile time

    @cute.kernel
    def kernel(self, x: cute.Tensor, xs: cute.Tensor, tma_w1: cute.CopyAtom, gW1: cute.Tensor, w1s: cute.Tensor,
               tma_w2: cute.CopyAtom, gW2: cute.Tensor, w2s: cute.Tensor, out: cute.Tensor, ids: cute.Tensor,
               eids: cute.Tensor, ntpp: cute.Tensor, tw: cute.Tensor, top_k: Int32, mma: cute.TiledMma,
               sW_l: cute.ComposedLayout, sX_l: cute.ComposedLayout, sH_l: cute.ComposedLayout):
        # ---------------------------------------------------------------- setup
        cfg = self.cfg
        bm, S = cfg.bm, cfg.stages
        tidx, _, _ = cute.arch.thread_idx()
        bn_i, bm_i, _ = cute.arch.block_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        M = x.shape[0]
        e = eids[bm_i]                               # loaded together with ntpp (eids has one entry per launched m-block)
        if warp_idx == 0:
            cpasync.prefetch_descriptor(tma_w1)
            cpasync.prefetch_descriptor(tma_w2)
        if bm_i * bm < ntpp[0]:                      # unused m-blocks leave at once
            smem = cutlass.utils.SmemAllocator()
            st = smem.allocate(self.Storage)
            sW = st.w.get_tensor(sW_l.outer, swizzle=sW_l.inner)
            sX = st.xo.get_tensor(sX_l.outer, swizzle=sX_l.inner)
            sH = st.h.get_tensor(sH_l.outer, swizzle=sH_l.inner)
            sXs = st.xs.get_tensor(cute.make_layout((bm, S)))
            sTw = st.tw.get_tensor(cute.make_layout(bm))
            sTs = st.ts.get_tensor(cute.make_layout((bm, cfg.ni)))
            red = st.red.get_tensor(cute.make_layout((bm, 4 * self.wgs), stride=(4 * self.wgs, 1)))
            full = st.bar.data_ptr()
            empty = full + S
            if tidx == 0:
                for i in cutlass.range_constexpr(S):
                    cute.arch.mbarrier_init(full + i, PRODUCER_THREADS + 1)
                    cute.arch.mbarrier_init(empty + i, 32 * cfg.wn)
            cute.arch.mbarrier_init_fence()
            cute.arch.sync_threads()
            k_tiles = cute.ceil_div(x.shape[1], BK)
            n2_tiles = cute.ceil_div(out.shape[1], self.bn2)
            # TMA views: W1 (N, K, E), W2 (K_model, N/2, E)
            tW1 = cute.local_tile(gW1, (256, BK), (None, None, None))
            sw, gw = cpasync.tma_partition(tma_w1, 0, cute.make_layout(1), cute.group_modes(sW, 0, 2), cute.group_modes(tW1, 0, 2))
            tW2 = cute.local_tile(gW2, (256, BK), (None, None, None))
            sw2, gw2 = cpasync.tma_partition(tma_w2, 0, cute.make_layout(1), cute.group_modes(sW, 0, 2), cute.group_modes(tW2, 0, 2))
            if warp_idx < 4:
                # ------------------------------------------------------------ producer
                cute.arch.setmaxregister_decrease(self.regs_p)
                if warp_idx == 0:                # first S weight tiles: the stages are empty, so no need to wait for the token ids
                    for i in cutlass.range_constexpr(S):
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive_and_expect_tx(full + i, 256 * BK)
                        cute.copy(tma_w1, gw[(None, bn_i * cfg.ni, i, e)], sw[(None, i)], tma_bar_ptr=full + i)
                cpa = cute.make_copy_atom(cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL), Float8E4M3FN, num_bits_per_copy=128)
                cps = cute.make_copy_atom(cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.ALWAYS), Float32, num_bits_per_copy=32)
                ROWS_PER_IT = PRODUCER_THREADS // 8
                its = (bm + ROWS_PER_IT - 1) // ROWS_PER_IT
                rows = cute.make_rmem_tensor((its,), Int32)
                for r in cutlass.range_constexpr(its):
                    lr = r * ROWS_PER_IT + tidx // 8
                    rows[r] = M
                    if lr < bm:
                        rows[r] = ids[bm_i * bm + lr] // top_k
                stage = Int32(0); phase = Int32(1)
                for ib in cutlass.range(cfg.ni, unroll=1):
                    for kt in cutlass.range(k_tiles, unroll=1):
                        cute.arch.mbarrier_wait(empty + stage, phase)
                        if (warp_idx == 0) & (ib * k_tiles + kt >= S):       # (K / 128 >= stages)
                            with cute.arch.elect_one():
                                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, 256 * BK)
                            cute.copy(tma_w1, gw[(None, bn_i * cfg.ni + ib, kt, e)], sw[(None, stage)], tma_bar_ptr=full + stage)
                        for r in cutlass.range_constexpr(its):
                            row = rows[r]
                            lr = r * ROWS_PER_IT + tidx // 8
                            if row < M:
                                c = (tidx % 8) * 16
                                src = cute.make_tensor((x.iterator + (cutlass.Int64(row) * x.shape[1] + kt * BK + c)).align(16), cute.make_layout(16))
                                dst = cute.local_tile(sX[(lr, None, stage)], (16,), (tidx % 8,))     # swizzled
                                cute.copy(cpa, src, cute.make_tensor(dst.iterator.align(16), cute.make_layout(16)))
                                if tidx % 8 == 0:    # token scale, also by cp.async: no register round trip, tracked by the same barrier
                                    ssrc = cute.make_tensor(xs.iterator + (cutlass.Int64(row) * xs.shape[1] + kt), cute.make_layout(1))
                                    sdst = cute.make_tensor(sXs.iterator + (stage * bm + lr), cute.make_layout(1))
                                    cute.copy(cps, ssrc, sdst)
                        cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                        stage += 1
                        if stage == S:
                            stage = Int32(0); phase ^= 1
                for nt in cutlass.range(n2_tiles, unroll=1):
                    for ib in cutlass.range(cfg.ni, unroll=1):
                        cute.arch.mbarrier_wait(empty + stage, phase)
                        if warp_idx == 0:
                            with cute.arch.elect_one():
                                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, 256 * BK)
                            cute.copy(tma_w2, gw2[(None, nt, bn_i * cfg.ni + ib, e)], sw2[(None, stage)], tma_bar_ptr=full + stage)
                        cute.arch.mbarrier_arrive(full + stage)
                        stage += 1
                        if stage == S:
                            stage = Int32(0); phase ^= 1
            else:
                # ------------------------------------------------------------ consumers: gate/up GEMM
                cute.arch.setmaxregister_increase(self.regs_c)
                ct = tidx - PRODUCER_THREADS
                cwarp = warp_idx - 4
                wg = cute.arch.make_warp_uniform(cwarp // 4)
                lane = cute.arch.lane_idx()
                tn, TM, nacc = self.tn, bm // 8, self.nacc
                cbar = pipeline.NamedBarrier(barrier_id=1, num_threads=32 * cfg.wn)
                if ct < bm:                              # routing weight of each sorted slot
                    slot = ids[bm_i * bm + ct]
                    wt = Float32(0.0)
                    if slot < M * top_k:
                        wt = tw[slot]
                    sTw[ct] = wt
                thr = mma.get_slice(0)
                tA = mma.make_fragment_A(thr.partition_A(cute.local_tile(sW, (64, BK), (None, 0, None))))   # (V,1,kb,tile,stage)
                tB = mma.make_fragment_B(thr.partition_B(sX))                                                # (V,1,kb,stage)
                tH = mma.make_fragment_B(thr.partition_B(sH))
                NK = cute.size(tA, mode=[2])
                acc = cute.make_rmem_tensor((4 * TM * nacc,), Float32)
                main = cute.make_rmem_tensor((4 * TM, tn), Float32)
                stage = Int32(0); phase = Int32(0)
                for ib in cutlass.range(cfg.ni, unroll=1):
                    nb = bn_i * cfg.ni + ib
                    main.fill(0.0)
                    for kt in cutlass.range(k_tiles, unroll=1):
                        s0 = w1s[nb * 2, kt, e]            # gate / up scale of this k block (issued before the wait)
                        s1 = w1s[nb * 2 + 1, kt, e]
                        cute.arch.mbarrier_wait(full + stage, phase)
                        cute.arch.fence_proxy("async.shared", space="cta")
                        warpgroup.fence()
                        for n in cutlass.range_constexpr(nacc):
                            for kb in cutlass.range_constexpr(NK):
                                mma.set(warpgroup.Field.ACCUMULATE, kb != 0)
                                cute.gemm(mma, acc_tile(acc, n, mma, bm), tA[(None, None, kb, wg * tn + n, stage)], tB[(None, None, kb, stage)], acc_tile(acc, n, mma, bm))
                            warpgroup.commit_group()
                        for n in cutlass.range_constexpr(tn):
                            warpgroup.wait_group(min(n + nacc, tn) - (n + 1))
                            for m in cutlass.range_constexpr(TM):
                                for j in cutlass.range_constexpr(2):
                                    xsc = sXs[m * 8 + (lane % 4) * 2 + j, stage]
                                    main[4 * m + j, n] = main[4 * m + j, n] + acc[4 * m + j + 4 * TM * (n % nacc)] * (s0 * xsc)
                                    main[4 * m + 2 + j, n] = main[4 * m + 2 + j, n] + acc[4 * m + 2 + j + 4 * TM * (n % nacc)] * (s1 * xsc)
                            if const_expr(n + nacc < tn):
                                warpgroup.fence()
                                for kb in cutlass.range_constexpr(NK):
                                    mma.set(warpgroup.Field.ACCUMULATE, kb != 0)
                                    cute.gemm(mma, acc_tile(acc, n % nacc, mma, bm), tA[(None, None, kb, wg * tn + n + nacc, stage)], tB[(None, None, kb, stage)], acc_tile(acc, n % nacc, mma, bm))
                                warpgroup.commit_group()
                        cute.arch.mbarrier_arrive(empty + stage)
                        stage += 1
                        if stage == S:
                            stage = Int32(0); phase ^= 1
                    # ------------------------------------------------------------ SwiGLU + per-token requant to FP8
                    h = cute.make_rmem_tensor((tn, TM, 2), Float32)
                    for n in cutlass.range_constexpr(tn):
                        for m in cutlass.range_constexpr(TM):
                            for j in cutlass.range_constexpr(2):
                                g = main[4 * m + j, n]
                                u = main[4 * m + 2 + j, n]
                                h[n, m, j] = g * cute.arch.rcp_approx(1.0 + cute.math.exp2(g * -1.4426950408889634, fastmath=True)) * u
                    for m in cutlass.range_constexpr(TM):
                        for j in cutlass.range_constexpr(2):
                            a = Float32(1e-10)
                            for n in cutlass.range_constexpr(tn):
                                a = cute.arch.fmax(a, cute.arch.fmax(h[n, m, j], -h[n, m, j]))
                            a = cute.arch.fmax(a, cute.arch.shuffle_sync_bfly(a, 4))
                            a = cute.arch.fmax(a, cute.arch.shuffle_sync_bfly(a, 8))
                            a = cute.arch.fmax(a, cute.arch.shuffle_sync_bfly(a, 16))
                            if lane < 4:
                                red[m * 8 + lane * 2 + j, cwarp] = a
                    cbar.arrive_and_wait()
                    for m in cutlass.range_constexpr(TM):
                        for j in cutlass.range_constexpr(2):
                            tok = m * 8 + (lane % 4) * 2 + j
                            a = Float32(1e-10)
                            for ww in cutlass.range_constexpr(4 * self.wgs):
                                a = cute.arch.fmax(a, red[tok, ww])
                            inv = 448.0 * cute.arch.rcp_approx(a)
                            if (cwarp == 0) & (lane < 4):                   # token scale x routing weight of this block
                                sTs[tok, ib] = a * (1.0 / 448.0) * sTw[tok]
                            hq = cute.make_rmem_tensor((4,), Float32)
                            q8 = cute.make_rmem_tensor((4,), Float8E4M3FN)
                            for n in cutlass.range_constexpr(4):
                                hq[n] = h[n % tn, m, j] * inv
                            q8.store(hq.load().to(Float8E4M3FN))
                            for n in cutlass.range_constexpr(tn):
                                col = (wg * tn + n) * 32 + (cwarp % 4) * 8 + lane // 4
                                sH[tok, col, ib] = q8[n]
                    cute.arch.fence_proxy("async.shared", space="cta")
                    cbar.arrive_and_wait()
                # ------------------------------------------------------------ down GEMM; each warpgroup owns wcols output columns
                wbar = pipeline.NamedBarrier(barrier_id=2 + wg, num_threads=128)
                wt_i = ct % 128
                token = M
                if wt_i < bm:
                    token = ids[bm_i * bm + wt_i] // top_k
                OS = self.ostride
                sO = cute.recast_ptr(st.xo.data_ptr(), dtype=BFloat16).align(16) + wg * (bm * OS)
                acc2 = cute.make_rmem_tensor((4 * TM * 2,), Float32)
                sum2 = cute.make_rmem_tensor((4 * TM * 2, tn // 2), Float32)     # only used for ni > 1
                st_atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=True, num_matrices=4), BFloat16)
                frag = cute.make_rmem_tensor((8,), BFloat16)
                f32 = cute.make_rmem_tensor((8,), Float32)
                ob = Int32(0)
                for nt in cutlass.range(n2_tiles, unroll=1):
                    for ib in cutlass.range_constexpr(cfg.ni):
                        nb = bn_i * cfg.ni + ib
                        s2 = cute.make_rmem_tensor((tn // 2,), Float32)
                        for c in cutlass.range_constexpr(tn // 2):            # chunk c of this warpgroup = 128 columns = one W2 scale block
                            s2[c] = w2s[nt * 2 + wg * (tn // 2) + c, nb, e]
                        cute.arch.mbarrier_wait(full + stage, phase)
                        for c in cutlass.range_constexpr(tn // 2):
                            warpgroup.fence()
                            for n in cutlass.range_constexpr(2):
                                for kb in cutlass.range_constexpr(NK):
                                    mma.set(warpgroup.Field.ACCUMULATE, kb != 0)
                                    cute.gemm(mma, acc_tile(acc2, n, mma, bm), tA[(None, None, kb, wg * tn + c * 2 + n, stage)], tH[(None, None, kb, ib)], acc_tile(acc2, n, mma, bm))
                            warpgroup.commit_group()
                            if const_expr(self.obuf == 1 and ib == cfg.ni - 1):   # staging buffer free again (its last bulk reduce has been read)
                                cute.arch.cp_async_bulk_wait_group(0, read=True)
                                wbar.arrive_and_wait()
                            warpgroup.wait_group(0)
                            if const_expr(c == tn // 2 - 1):
                                cute.arch.mbarrier_arrive(empty + stage)
                            for m in cutlass.range_constexpr(TM):
                                for q in cutlass.range_constexpr(8):
                                    i = 4 * (m + TM * (q // 4)) + q % 4
                                    v = acc2[i] * (s2[c] * sTs[m * 8 + (lane % 4) * 2 + q % 2, ib])
                                    if const_expr(ib > 0):
                                        v = v + sum2[i, c]
                                    if const_expr(ib < cfg.ni - 1):
                                        sum2[i, c] = v
                                    else:
                                        f32[q] = v
                                if const_expr(ib == cfg.ni - 1):
                                    frag.store(f32.load().to(BFloat16))
                                    ocol = lane // 16 * 64 + (cwarp % 4) * 16 + (lane // 8 % 2) * 8
                                    p = sO + (ob * (self.wgs * bm * OS) + (m * 8 + lane % 8) * OS + ocol)
                                    cute.copy(st_atom, frag, cute.make_tensor(p.align(16), cute.make_layout(8)))
                            if const_expr(ib == cfg.ni - 1):
                                cute.arch.fence_proxy("async.shared", space="cta")
                                if const_expr(self.obuf == 2):       # the other buffer's reduce (previous chunk) must be read before this barrier
                                    cute.arch.cp_async_bulk_wait_group(0, read=True)
                                wbar.arrive_and_wait()
                                if token < M:
                                    gp = out.iterator + (cutlass.Int64(token) * out.shape[1] + nt * self.bn2 + (wg * (tn // 2) + c) * 128)
                                    sp = sO + (ob * (self.wgs * bm * OS) + wt_i * OS)
                                    prims.cp_reduce_async_bulk_global_shared_cta(gp.to_llvm_ptr(), sp.to_llvm_ptr(), 256,
                                        op=prims.CpReduceOp.ADD, type=prims.CpReduceType.BF16, noftz=True)
                                cute.arch.cp_async_bulk_commit_group()
                                if const_expr(self.obuf == 2):
                                    ob ^= 1
                        stage += 1
                        if stage == S:
                            stage = Int32(0); phase ^= 1
                cute.arch.cp_async_bulk_wait_group(0)

def fake_args():
    mk = cute.runtime.make_fake_compact_tensor
    f8 = Float8E4M3FN
    M, Mo, E, P, B = [cute.sym_int() for _ in range(5)]
    K = cute.sym_int(divisibility=128); N = cute.sym_int(divisibility=128); N2 = cute.sym_int(divisibility=64)
    ks, ns, k2, kb = [cute.sym_int() for _ in range(4)]
    return (mk(f8, (M, K), stride_order=(1, 0), assumed_align=16),
            mk(Float32, (M, ks), stride_order=(1, 0), assumed_align=4),
            mk(f8, (N, K, E), stride_order=(1, 0, 2), assumed_align=16),
            mk(Float32, (ns, ks, E), stride_order=(1, 0, 2), assumed_align=4),
            mk(f8, (K, N2, E), stride_order=(1, 0, 2), assumed_align=16),
            mk(Float32, (ks, k2, E), stride_order=(1, 0, 2), assumed_align=4),
            mk(BFloat16, (M, K), stride_order=(1, 0), assumed_align=16),
            mk(Int32, (P,), stride_order=(0,), assumed_align=4),
            mk(Int32, (B,), stride_order=(0,), assumed_align=4),
            mk(Int32, (1,), stride_order=(0,), assumed_align=4),
            mk(Float32, (cute.sym_int(),), stride_order=(0,), assumed_align=4),
            Int32(8), Int32(100))

def compile_one(cfg, options=""):
    st = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True) if "tvm-ffi" in options else cuda.CUstream(0)
    return cute.compile(FusedMoe(cfg), *fake_args(), st, options=options, no_jit_engine=True)



def compile_config(config: object, function: str, object_path: object) -> None:
    """Compile for the architecture that CUTE_DSL_ARCH names, without a GPU, and write an object file that exports the
    tvm-ffi function `function`."""
    cfg = MoeConfig(config.block, config.sub_tile, config.warps, config.stages, config.occupancy, 2, config.blocks)
    compile_one(cfg, "--enable-tvm-ffi").export_to_c(str(object_path), function_name=function)
