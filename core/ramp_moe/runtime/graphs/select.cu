// Chooses a candidate for a batch, and sets the nodes of the graph that it runs in: top-k ids -> expert histogram ->
// cost of every candidate -> the cheapest, the first of equal ones. One CTA of 1024 threads. The cost is that of
// ramp_moe/cost_model/formula.py, whose steps are named below. The table's arrays are those of CostTable.
//
// Little is computed: most of the time is waiting for memory. So the copy of the table to shared memory begins first,
// and is complete when the histogram is. Other reads of global memory are issued early, too. Between barriers,
//
//   threads    an id each              -> hist[], by atomics; ids as kernels take them
//   a warp     a token block           -> counts[]: its M-tiles (step 1)
//   a thread   a candidate             -> us[] by the terms (steps 2 to 5); others, a point of a set -> away[], how far
//                                         the batch is
//   a column of threads   a candidate  -> share[]: of the sum of weights times distances (step 6)
//   a warp     candidates              -> the cheapest of them (step 7)
//   a thread   a node of the graph     -> on if its body is chosen, else off

constexpr int THREADS = 1024, WARPS = THREADS / 32, EXPERTS = 1024, BLOCKS = 64, CANDIDATES = 512, DISTANCES = 6144;
constexpr int NODES = 128, BATCH = 4;
constexpr unsigned ALL = 0xffffffffu;

// Arrays of the table, by where they begin, in words.
struct Table {
  int blocks, grid_block, grid_ctas, grid_cluster, grid_slots, grid_work, launch_of, coefficients, floor_us, first,
      parts, unit, points, set_block, set_of, constant, label, weights;
};

struct Params {
  // the batch
  const void* ids;            // [num_ids] int32, or int64 if wide
  const int* num_valid;       // [1]: tokens from there on are padding; or null
  // out
  int* choice;                // [1]
  int* histogram;             // [num_experts]
  int* kernel_ids;            // [num_ids]: int32, -1 for padding and for ids out of range; or null
  float* cost;                // [num_candidates], microseconds; or null
  int* last;                  // [1]: the choice that the nodes are set to, -1 at first; or null
  int* ring;                  // [slots, 2 + num_experts]: tokens, label of the choice, histogram; or null
  long long* counter;         // [1]: entries written to the ring so far
  // the graph
  unsigned long long handle;  // of a conditional node, or 0
  unsigned long long nodes[NODES];
  // the table
  const int* table;
  Table at;
  int num_shared;             // words of the table that go to shared memory: all, or all but the weights
  int num_blocks, num_launches, num_grids, num_parts, num_candidates, num_sets, num_rows;
  int num_ids, top_k, wide, num_experts, slots, num_nodes;
  unsigned char body_of[NODES];
};

__device__ __forceinline__ int expert_of(const Params& p, int i, int valid) {
  if (i >= p.num_ids) return -1;
  const long long e = p.wide ? __ldg((const long long*)p.ids + i) : __ldg((const int*)p.ids + i);
  return i < valid && e >= 0 && e < p.num_experts ? (int)e : -1;
}

__device__ __forceinline__ void load_experts(const Params& p, int first, int valid, int e[BATCH]) {
#pragma unroll
  for (int j = 0; j < BATCH; j++) e[j] = expert_of(p, first + j * THREADS, valid);
}

// The least of the lanes' costs, none of which is negative, and the first of the candidates that have it.
__device__ __forceinline__ void cheapest(unsigned& bits, int& candidate) {
  const unsigned least = __reduce_min_sync(ALL, bits);
  candidate = __reduce_min_sync(ALL, bits == least ? candidate : CANDIDATES);
  bits = least;
}

__device__ __forceinline__ float cost_of(const Params& p, const int* table, const int* counts, int candidate) {
  auto ints = [&](int at) { return table + at; };
  auto floats = [&](int at) { return (const float*)(table + at); };
  float total = 0;
#pragma unroll 1
  for (int k = ints(p.at.first)[candidate]; k < ints(p.at.first)[candidate + 1]; k++) {
    const int part = ints(p.at.parts)[k], launch = ints(p.at.launch_of)[part];
    float waves = 0, ceil_waves = 0, ctas = 0;
#pragma unroll 1
    for (int g = 0; g < p.num_grids; g++) {
      const int i = g * p.num_launches + launch;
      const int cluster = ints(p.at.grid_cluster)[i], tiles = counts[ints(p.at.grid_block)[i]] + cluster - 1 & -cluster;
      const float n = tiles * floats(p.at.grid_ctas)[i];
      const float work = floats(p.at.grid_work)[i], filled = n / floats(p.at.grid_slots)[i];
      waves += work * filled; ceil_waves += work * ceilf(filled); ctas += work * n;
    }
    const float* c = floats(p.at.coefficients) + part;
    const int n = p.num_parts;
    const float us = c[0] + c[n] * waves + c[2 * n] * ceil_waves + c[3 * n] * ctas + c[4 * n] * log1pf(ctas)
                     + c[5 * n] * counts[p.num_blocks - 1];
    total += fmaxf(us, floats(p.at.floor_us)[part]);
  }
  return total;
}

extern "C" __global__ void __launch_bounds__(THREADS) select_candidate(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) int table[];
  __shared__ int hist[EXPERTS], counts[BLOCKS];
  __shared__ float us[CANDIDATES], away[DISTANCES], share[THREADS + WARPS];
  __shared__ unsigned best[WARPS];
  __shared__ int of_warp[WARPS];
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  auto ints = [&](int at) { return (const int*)table + at; };
  auto floats = [&](int at) { return (const float*)table + at; };

#pragma unroll 1
  for (int i = 4 * t; i < p.num_shared; i += 4 * THREADS) {
    const unsigned to = (unsigned)__cvta_generic_to_shared(table + i);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p.table + i));
  }
  const int before = p.last ? *p.last : -1;
  const long long entry = p.ring ? *p.counter : 0;
  const int all = p.num_ids / p.top_k, tokens = p.num_valid ? min(max(*p.num_valid, 0), all) : all;
  const int valid = tokens * p.top_k;
  int e[BATCH];
  load_experts(p, t, valid, e);
#pragma unroll 1
  for (int i = t; i < p.num_experts; i += THREADS) hist[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int first = t; first < p.num_ids; first += BATCH * THREADS) {
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      if (e[j] >= 0) atomicAdd(&hist[e[j]], 1);
      if (p.kernel_ids && first + j * THREADS < p.num_ids) p.kernel_ids[first + j * THREADS] = e[j];
    }
    load_experts(p, first + BATCH * THREADS, valid, e);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

#pragma unroll 1
  for (int i = t; i < p.num_experts; i += THREADS) p.histogram[i] = hist[i];
#pragma unroll 1
  for (int b = warp; b < p.num_blocks; b += WARPS) {
    // ceil(count / block) is the floor of (count + block - 1/2) / block, which single precision computes exactly up to
    // 65,536 ids and blocks of 2,048. The last block takes any number of tokens: it counts experts that have some.
    const float block = ints(p.at.blocks)[b], share_of = __frcp_rn(block);
    int n = 0;
#pragma unroll 4
    for (int i = lane; i < p.num_experts; i += 32)
      n += b == p.num_blocks - 1 ? hist[i] > 0 : (int)((hist[i] + block - 0.5f) * share_of);
    n = __reduce_add_sync(ALL, n);
    if (lane == 0) counts[b] = n;
  }
  __syncthreads();

  if (t < p.num_candidates) us[t] = cost_of(p, table, counts, t);
  const float log_routed = __logf(max(counts[0], 1)), log_active = __logf(max(counts[p.num_blocks - 1], 1));
#pragma unroll 1
  for (int q = WARPS - 1 - warp; q < p.num_sets; q += WARPS) {
    const float *unit = floats(p.at.unit) + 3 * q, *point = floats(p.at.points) + 3 * q * p.num_rows;
    const float x = log_routed * unit[0], y = log_active * unit[1];
    const float z = __logf(max(counts[ints(p.at.set_block)[q]], 1)) * unit[2];
#pragma unroll 1
    for (int r = lane; r < p.num_rows; r += 32) {
      const float dx = x - point[r], dy = y - point[p.num_rows + r], dz = z - point[2 * p.num_rows + r];
      away[q * p.num_rows + r] = __fsqrt_rn(dx * dx + dy * dy + dz * dz);
    }
  }
  __syncthreads();

  // Each candidate has a column of threads. Columns are a power of two, at least 32, and divide all threads.
  int log_columns = 5;
  while (1 << log_columns < p.num_candidates) log_columns++;
  const int log_rows = 10 - log_columns, columns = 1 << log_columns, rows = 1 << log_rows, column = t & columns - 1;
  float sum = 0;
  if (column < p.num_candidates && p.num_sets) {
    const float* weights = p.at.weights < p.num_shared ? floats(p.at.weights) : (const float*)p.table + p.at.weights;
    const float* distance = away + ints(p.at.set_of)[column] * p.num_rows;
#pragma unroll 4
    for (int r = t >> log_columns; r < p.num_rows; r += rows)
      sum += weights[r * p.num_candidates + column] * distance[r];
  }
  share[(t >> log_columns) * (columns + 1) + column] = sum;  // + 1: the next reads go down the columns
  __syncthreads();

  int candidate = t >> log_rows;
  unsigned bits = ALL;
  if (32 * warp >> log_rows < p.num_candidates) {
    float logarithm = share[(t & rows - 1) * (columns + 1) + candidate];
    for (int o = rows / 2; o; o /= 2) logarithm += __shfl_xor_sync(ALL, logarithm, o);
    if (candidate < p.num_candidates) {
      const float v = us[candidate] * __expf(floats(p.at.constant)[candidate] + logarithm);
      if (p.cost && !(t & rows - 1)) p.cost[candidate] = v;
      bits = __float_as_uint(v);  // keeps the order of numbers that are not negative
    }
    cheapest(bits, candidate);
  }
  if (lane == 0) { best[warp] = bits; of_warp[warp] = candidate; }
  __syncthreads();
  bits = best[lane];
  int choice = of_warp[lane];
  cheapest(bits, choice);

  if (t == 0) {
    *p.choice = choice;
    if (p.handle) cudaGraphSetConditional(p.handle, choice);
    if (p.last) *p.last = choice;
    if (p.ring) *p.counter = entry + 1;
  }
  if (before != choice)
#pragma unroll 1
    for (int i = t; i < p.num_nodes; i += THREADS) {
      const int body = p.body_of[i];
      if (before < 0 || body == before || body == choice)
        cudaGraphKernelNodeSetEnabled((cudaGraphDeviceNode_t)p.nodes[i], body == choice);
    }
  if (p.ring) {
    int* at = p.ring + entry % p.slots * (2 + p.num_experts);
    if (t == 0) { at[0] = tokens; at[1] = ints(p.at.label)[choice]; }
#pragma unroll 1
    for (int i = t; i < p.num_experts; i += THREADS) at[2 + i] = hist[i];
  }
}
