"""The fused kernel that works off a list of items: every CTA has a token block and a width of its own.

    items int32 [capacity, 4]    first slot | expert + (code << 16) | first n | width + (rows << 16)
    num_items int32 [1]

An item is `rows` slots of an expert, from `first slot` of sorted_token_ids on, by `width` times 256 rows of gate and
up, from the 256 * `first n`-th on. sorted_token_ids has no padding: slots of the block from `rows` on are empty.
`code` is the index of the block in ITEM_BLOCKS. An expert's tiles can have any blocks. Here a plan gives it equal ones.

A launch has as many CTAs as there can be items, and CTA i takes item i. The hardware starts CTAs in order, so the order
of the list is that of list scheduling. Plans put the longest items first: what starts last then ends early.

There is a body for each block, which is that of `moe.py` for a configuration with its stages. A CTA branches to it after
it has read its item. The width is a bound of loops at run time, so that no code is added for it.

Shared memory    weights, tokens, hidden and the rest: as in the SmemMap of each block
                 barriers: at the same place for all blocks, so that they are initialised before the schedule is awaited
"""
# The DSL traces Python: annotations must be types at run time, and its functions are untyped.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call, misc"

from pathlib import Path

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32
from cutlass.cute.nvgpu import cpasync

from .barriers import PRODUCER_WARPS, WEIGHTS_WARP, expected
from .config import INTERMEDIATES, UP_ROWS, Config, ItemsConfig
from .consumers import Consumer
from .cta import ItemParameters, ItemTile, Layouts
from .producers import CHUNK, TokensProducer, WeightsProducer


class ItemsMoE:
    """The kernel that works off a list."""

    def __init__(self, config: ItemsConfig) -> None:
        self.config = config
        self.bodies = [Body(c, Layouts(c, config.map(c), config.ring)) for c in config.bodies]

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,  # [T, H]
        x_scale: cute.Tensor,  # float32 [T, H / 128]
        gate_up: cute.Tensor,  # [8, 2, I / 8, H, E]: row in eight, gate or up, eight
        gate_up_scale: cute.Tensor,  # float32 [2, I / 128, H / 128, E]
        down: cute.Tensor,  # [H, I, E]
        down_scale: cute.Tensor,  # float32 [H / 128, I / 128, E]
        out: cute.Tensor,  # [T, H]
        sorted_token_ids: cute.Tensor,  # int32 [T * k]: routed ids by expert
        items: cute.Tensor,  # int32 [capacity, 4]
        num_items: cute.Tensor,  # int32 [1]
        routing: cute.Tensor,  # float32 [T * k]
        top_k: Int32,
        capacity: Int32,  # CTAs to launch: as many as there can be items
        up_first: Int32,  # 1: index 0 of gate_up's second dimension is up
        stream: cuda.CUstream,
    ):
        first = self.bodies[0]
        whole = (UP_ROWS, first.config.block_k)
        box = cute.slice_(first.layouts.boxes(), (None, None, 0))
        op = cpasync.CopyBulkTensorTileG2SOp()
        rows = cute.make_layout(
            (gate_up.shape[:3], gate_up.shape[3], gate_up.shape[4]),
            stride=(gate_up.stride[:3], gate_up.stride[3], gate_up.stride[4]),
        )
        tma_w1, w1 = cpasync.make_tiled_tma_atom(op, cute.make_tensor(gate_up.iterator, rows), box, whole)
        tma_w2, w2 = cpasync.make_tiled_tma_atom(op, down, box, whole)
        given = ItemParameters(
            x, x_scale, tma_w1, w1, gate_up_scale, tma_w2, w2, down_scale, out, sorted_token_ids, items, num_items,
            routing, top_k, up_first,
        )  # fmt: skip
        self.kernel(given).launch(
            grid=(capacity, 1, 1),
            block=(first.config.threads, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, given: ItemParameters):
        base = cutlass.utils.SmemAllocator().allocate(self.config.bytes, 1024)
        thread, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == WEIGHTS_WARP:
            cpasync.prefetch_descriptor(given.tma_w1)
            cpasync.prefetch_descriptor(given.tma_w2)
        barriers = self.bodies[0].layouts.shared(base).barriers
        arrivals = expected(self.bodies[0].config)
        if thread == 0:
            for i in cutlass.range_constexpr(self.config.ring):
                cute.arch.mbarrier_init(barriers.full_w + i, arrivals.full_w)
                cute.arch.mbarrier_init(barriers.empty_w + i, arrivals.empty_w)
                cute.arch.mbarrier_init(barriers.full_x + i, arrivals.full_x)
                cute.arch.mbarrier_init(barriers.empty_x + i, arrivals.empty_x)
        cute.arch.griddepcontrol_wait()
        items, count = given.items, given.num_items[0]
        slot, coded, n, sizes = items[index, 0], items[index, 1], items[index, 2], items[index, 3]
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if index < count:
            code, expert, rows, width = coded >> 16, coded & 0xFFFF, sizes >> 16, sizes & 0xFFFF
            for i in cutlass.range_constexpr(len(self.bodies)):
                if code == i:
                    self.bodies[i].run(base, given, slot, rows, n, width, expert)


class Body:
    """What CTAs of one block do."""

    def __init__(self, config: Config, layouts: Layouts) -> None:
        self.config, self.layouts = config, layouts

    @cute.jit
    def run(
        self,
        base: cute.Pointer,
        given: ItemParameters,
        slot: Int32,
        rows: Int32,
        n: Int32,
        width: Int32,
        expert: Int32,
    ):
        c = self.config
        thread, _, _ = cute.arch.thread_idx()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared = self.layouts.shared(base)
        steps, columns = given.x.shape[1] // c.block_k, given.out.shape[1] // UP_ROWS
        tile = ItemTile(slot, rows, n, width, expert, Int32(0), steps, Int32(0), columns)
        if warp_index < PRODUCER_WARPS:
            cute.arch.setmaxregister_decrease(c.registers[0])  # a whole warpgroup, or it is undefined
            if warp_index == WEIGHTS_WARP:
                WeightsProducer(self.layouts, given, shared, tile).produce_weights()
            else:
                TokensProducer(self.layouts, given, shared, tile, thread).gather_tokens()
        else:
            cute.arch.setmaxregister_increase(c.registers[1])
            Consumer(self.layouts, given, shared, tile, thread, warp_index).consume()


def arguments(config: ItemsConfig):
    """Arguments of `ItemsMoE.__call__` for compiling, with tensors of any size."""
    element = Float8E4M3FN if config.dtype == "fp8" else BFloat16
    width = CHUNK * 8 // element.width  # elements in 16 bytes, to which tensor maps align

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
        fake(BFloat16, (free(), hidden), (stride(width), 1), CHUNK),
        fake(Int32, (free(),), (1,), 4),
        fake(Int32, (free(), 4), (4, 1), CHUNK),
        fake(Int32, (1,), (1,), 4),
        fake(Float32, (free(),), (1,), 4),
        Int32(1),
        Int32(1),
        Int32(0),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def compile_items(config: ItemsConfig, function: str, object_path: Path) -> None:
    """Compile for sm_90a, with or without a GPU, and write an object file that exports `function`."""
    compiled = cute.compile(ItemsMoE(config), *arguments(config), options="--enable-tvm-ffi", no_jit_engine=True)
    compiled.export_to_c(str(object_path), function_name=function)
