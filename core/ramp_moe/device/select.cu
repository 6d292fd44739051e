// Chooses a candidate for a batch: top-k ids -> expert histogram -> cost of every candidate (see table.py) -> the
// cheapest, of equal ones the first; and acts on the graph that it runs in. One CTA of 1024 threads.
//
// Little is computed: the time is that of waiting. So the table is on its way to shared memory from the beginning, and
// is there when the histogram is; everything else that is read from global memory is asked for at once, too. Between
// barriers,
//
//   threads    an id each              -> hist[], by atomics; ids as kernels take them
//   a warp     a token block           -> counts[]: its M-tiles
//   a thread   a candidate             -> us[] by the terms; others, a point of a set -> away[], how far the batch is
//   a column of threads   a candidate  -> share[]: of the sum of weights times distances
//   a warp     candidates              -> the cheapest of them
//   a thread   a node of the graph     -> on if its body is chosen, else off

constexpr int THREADS = 1024, WARPS = THREADS / 32, EXPERTS = 1024, BLOCKS = 64, CANDIDATES = 512, DISTANCES = 6144;
constexpr int NODES = 128, BATCH = 4;
constexpr unsigned ALL = 0xffffffffu;

// Arrays of the table, by where they begin, in words.
struct Table {
  int blocks, grid_block, grid_ctas, grid_slots, grid_work, launch_of, coefficients, floor_us, first, parts, unit,
      points, set_block, set_of, constant, weights;
};

struct Params {
  // the batch
  const void* ids;            // [num_ids] int32, or int64 if wide
  const int* num_valid;       // [1]: tokens from there on are padding; or null
  // out
  int* choice;                // [1]
  int* histogram;             // [num_experts]
  int* kernel_ids;            // [num_ids]: int32, -1 for what is not in range or padding; or null
  float* cost;                // [num_candidates], microseconds; or null
  int* last;                  // [1]: the choice that the nodes are set to, -1 at first; or null
  int* ring;                  // [slots, 2 + num_experts]: tokens, choice, histogram; or null
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

__device__ __forceinline__ float cost_of(const Params& p, const int* table, const int* counts, int candidate) {
  auto ints = [&](int at) { return table + at; };
  auto floats = [&](int at) { return (const float*)(table + at); };
  float total = 0;
  for (int k = ints(p.at.first)[candidate]; k < ints(p.at.first)[candidate + 1]; k++) {
    const int part = ints(p.at.parts)[k], launch = ints(p.at.launch_of)[part];
    float waves = 0, ceil_waves = 0, ctas = 0;
    for (int g = 0; g < p.num_grids; g++) {
      const int i = g * p.num_launches + launch;
      const float n = counts[ints(p.at.grid_block)[i]] * floats(p.at.grid_ctas)[i];
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
  __shared__ unsigned long long best[WARPS];
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  auto ints = [&](int at) { return (const int*)table + at; };
  auto floats = [&](int at) { return (const float*)table + at; };

  for (int i = 4 * t; i < p.num_shared; i += 4 * THREADS) {
    const unsigned to = (unsigned)__cvta_generic_to_shared(table + i);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p.table + i));
  }
  const int before = p.last ? *p.last : -1;
  const long long entry = p.ring ? *p.counter : 0;
  const int valid = p.num_valid ? min(max(*p.num_valid, 0) * p.top_k, p.num_ids) : p.num_ids;
  for (int e = t; e < p.num_experts; e += THREADS) hist[e] = 0;
  __syncthreads();
  for (int first = t; first < p.num_ids; first += BATCH * THREADS) {
    int e[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; j++) e[j] = expert_of(p, first + j * THREADS, valid);
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      if (e[j] >= 0) atomicAdd(&hist[e[j]], 1);
      if (p.kernel_ids && first + j * THREADS < p.num_ids) p.kernel_ids[first + j * THREADS] = e[j];
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

  for (int e = t; e < p.num_experts; e += THREADS) p.histogram[e] = hist[e];
  for (int b = warp; b < p.num_blocks; b += WARPS) {
    const unsigned block = ints(p.at.blocks)[b];
    unsigned n = 0;
    for (int e = lane; e < p.num_experts; e += 32) n += (hist[e] + block - 1) / block;
    n = __reduce_add_sync(ALL, n);
    if (lane == 0) counts[b] = n;
  }
  __syncthreads();

  if (t < p.num_candidates) us[t] = cost_of(p, table, counts, t);
  const float log_routed = logf(max(counts[0], 1)), log_active = logf(max(counts[p.num_blocks - 1], 1));
  for (int i = THREADS - 1 - t; i < p.num_sets * p.num_rows; i += THREADS) {
    const int q = i / p.num_rows, r = i % p.num_rows;
    const float *unit = floats(p.at.unit) + 3 * q, *point = floats(p.at.points) + 3 * q * p.num_rows + r;
    const float x = log_routed * unit[0] - point[0], y = log_active * unit[1] - point[p.num_rows];
    const float z = logf(max(counts[ints(p.at.set_block)[q]], 1)) * unit[2] - point[2 * p.num_rows];
    away[i] = sqrtf(x * x + y * y + z * z);
  }
  __syncthreads();

  // Columns for 32 candidates or more, a power of two, of as many threads each as there are.
  int columns = 32;
  while (columns < p.num_candidates) columns *= 2;
  const int rows = THREADS / columns, column = t % columns;
  float sum = 0;
  if (column < p.num_candidates && p.num_sets) {
    const float* weights = p.at.weights < p.num_shared ? floats(p.at.weights) : (const float*)p.table + p.at.weights;
    const float* distance = away + ints(p.at.set_of)[column] * p.num_rows;
#pragma unroll 8
    for (int r = t / columns; r < p.num_rows; r += rows) sum += weights[r * p.num_candidates + column] * distance[r];
  }
  share[t / columns * (columns + 1) + column] = sum;  // one more: the next lines read down the columns
  __syncthreads();

  const int c = t / rows;
  unsigned long long mine = ~0ull;
  if (warp * 32 / rows < p.num_candidates) {
    float logarithm = share[t % rows * (columns + 1) + c];
    for (int o = rows / 2; o; o /= 2) logarithm += __shfl_xor_sync(ALL, logarithm, o);
    if (c < p.num_candidates) {
      const float v = us[c] * expf(floats(p.at.constant)[c] + logarithm);
      if (p.cost && t % rows == 0) p.cost[c] = v;
      mine = (unsigned long long)__float_as_uint(v) << 32 | c;  // of numbers that are not negative, in their order
    }
    for (int o = 16; o; o /= 2) mine = min(mine, __shfl_xor_sync(ALL, mine, o));
  }
  if (lane == 0) best[warp] = mine;
  __syncthreads();
  mine = best[lane];
  for (int o = 16; o; o /= 2) mine = min(mine, __shfl_xor_sync(ALL, mine, o));

  const int choice = (int)(mine & ALL);
  if (t == 0) {
    *p.choice = choice;
    if (p.handle) cudaGraphSetConditional(p.handle, choice);
    if (p.last) *p.last = choice;
    if (p.ring) *p.counter = entry + 1;
  }
  if (before != choice)
    for (int i = t; i < p.num_nodes; i += THREADS) {
      const int body = p.body_of[i];
      if (before < 0 || body == before || body == choice)
        cudaGraphKernelNodeSetEnabled((cudaGraphDeviceNode_t)p.nodes[i], body == choice);
    }
  if (p.ring) {
    int* at = p.ring + entry % p.slots * (2 + p.num_experts);
    if (t == 0) { at[0] = valid / p.top_k; at[1] = choice; }
    for (int e = t; e < p.num_experts; e += THREADS) at[2 + e] = hist[e];
  }
}
