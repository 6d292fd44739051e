// Chooses a candidate for a batch: top-k ids -> expert histogram -> cost of every candidate (see table.py) -> the
// cheapest, of equal ones the first; and acts on the graph that it runs in. One CTA of 1024 threads.
//
//   threads    an id each                  -> hist[], by atomics in shared memory; ids as kernels take them
//   a warp     a token block               -> counts[]: its M-tiles
//   a thread   a grid's launch             -> term[][]
//   a thread   a part                      -> part_us[]
//   a thread   a point of a set            -> away[]: distances from the batch
//   a column of threads   a candidate      -> its correction, every thread a share of the points
//   a thread   a candidate                 -> the cheapest
//   a thread   a node of the graph         -> on if its body is chosen, else off

constexpr int THREADS = 1024, EXPERTS = 1024, BLOCKS = 64, LAUNCHES = 256, PARTS = 1024, CANDIDATES = 512;
constexpr int DISTANCES = 6144, NODES = 128;
constexpr unsigned ALL = 0xffffffffu;
enum { ONE, WAVES, CEIL_WAVES, CTAS, LOG_CTAS, ACTIVE, TERMS };

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
  // the table
  const int *blocks, *grid_block;
  const float *grid_ctas, *grid_slots, *grid_work;
  const int* launch_of;
  const float *coefficients, *floor_us;
  const int *first, *parts;
  const float *unit, *points;
  const int *set_block, *set_of;
  const float *constant, *weights;
  // the graph
  unsigned long long handle;  // of a conditional node, or 0
  unsigned long long nodes[NODES];
  int num_ids, top_k, wide, num_experts, slots;
  int num_blocks, num_launches, num_grids, num_parts, num_candidates, num_sets, num_rows, num_nodes;
  unsigned char body_of[NODES];
};

__device__ __forceinline__ int expert_of(const Params& p, int i, int valid) {
  if (i >= valid) return -1;
  const long long e = p.wide ? ((const long long*)p.ids)[i] : ((const int*)p.ids)[i];
  return e >= 0 && e < p.num_experts ? (int)e : -1;
}

extern "C" __global__ void __launch_bounds__(THREADS) select_candidate(const __grid_constant__ Params p) {
  __shared__ int hist[EXPERTS], counts[BLOCKS];
  __shared__ float term[TERMS][LAUNCHES], part_us[PARTS], us[CANDIDATES], away[DISTANCES], share[THREADS];
  __shared__ unsigned long long best;
  __shared__ long long entry;
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;

  for (int e = t; e < p.num_experts; e += THREADS) hist[e] = 0;
  if (t == 0) best = ~0ull;
  const int valid = p.num_valid ? min(max(*p.num_valid, 0) * p.top_k, p.num_ids) : p.num_ids;
  __syncthreads();
  for (int i = t; i < p.num_ids; i += THREADS) {
    const int e = expert_of(p, i, valid);
    if (e >= 0) atomicAdd(&hist[e], 1);
    if (p.kernel_ids) p.kernel_ids[i] = e;
  }
  __syncthreads();

  for (int e = t; e < p.num_experts; e += THREADS) p.histogram[e] = hist[e];
  for (int b = warp; b < p.num_blocks; b += THREADS / 32) {
    const int block = p.blocks[b];
    int n = 0;
    for (int e = lane; e < p.num_experts; e += 32) n += (hist[e] + block - 1) / block;
    n = __reduce_add_sync(ALL, n);
    if (lane == 0) counts[b] = n;
  }
  __syncthreads();

  for (int i = t; i < p.num_launches; i += THREADS) {
    float waves = 0, ceil_waves = 0, ctas = 0;
    for (int g = 0; g < p.num_grids; g++) {
      const int at = g * p.num_launches + i;
      const float n = counts[p.grid_block[at]] * p.grid_ctas[at], w = p.grid_work[at], filled = n / p.grid_slots[at];
      waves += w * filled; ceil_waves += w * ceilf(filled); ctas += w * n;
    }
    term[ONE][i] = 1; term[WAVES][i] = waves; term[CEIL_WAVES][i] = ceil_waves; term[CTAS][i] = ctas;
    term[LOG_CTAS][i] = log1pf(ctas); term[ACTIVE][i] = counts[p.num_blocks - 1];
  }
  const float log_routed = logf(max(counts[0], 1)), log_active = logf(max(counts[p.num_blocks - 1], 1));
  for (int i = t; i < p.num_sets * p.num_rows; i += THREADS) {
    const int q = i / p.num_rows, r = i % p.num_rows;
    const float *unit = p.unit + 3 * q, *at = p.points + 3 * q * p.num_rows + r;
    const float x = log_routed * unit[0] - at[0], y = log_active * unit[1] - at[p.num_rows];
    const float z = logf(max(counts[p.set_block[q]], 1)) * unit[2] - at[2 * p.num_rows];
    away[i] = sqrtf(x * x + y * y + z * z);
  }
  __syncthreads();

  for (int i = t; i < p.num_parts; i += THREADS) {
    float v = 0;
    for (int k = 0; k < TERMS; k++) v += p.coefficients[k * p.num_parts + i] * term[k][p.launch_of[i]];
    part_us[i] = fmaxf(v, p.floor_us[i]);
  }
  __syncthreads();

  for (int c = t; c < p.num_candidates; c += THREADS) {
    float v = 0;
    for (int i = p.first[c]; i < p.first[c + 1]; i++) v += part_us[p.parts[i]];
    us[c] = v;
  }
  // Columns of 32 candidates or more, a power of two; then as many rows of threads as there are.
  int columns = 32;
  while (columns < p.num_candidates) columns *= 2;
  const int rows = THREADS / columns, column = t % columns;
  float sum = 0;
  if (column < p.num_candidates && p.num_sets) {
    const float* of_set = away + p.set_of[column] * p.num_rows;
#pragma unroll 8
    for (int r = t / columns; r < p.num_rows; r += rows) sum += p.weights[r * p.num_candidates + column] * of_set[r];
  }
  share[t] = sum;
  __syncthreads();

  // A candidate's shares lie a column apart: `rows` neighbours, up to a warp, add them up.
  const int c = t / rows;
  float logarithm = share[t % rows * columns + c];
  for (int o = rows / 2; o; o /= 2) logarithm += __shfl_xor_sync(ALL, logarithm, o);
  unsigned long long mine = ~0ull;
  if (c < p.num_candidates) {
    const float v = us[c] * expf(p.constant[c] + logarithm);
    if (p.cost && t % rows == 0) p.cost[c] = v;
    mine = (unsigned long long)__float_as_uint(v) << 32 | c;  // of numbers that are not negative, in their order
  }
  for (int o = 16; o; o /= 2) {
    const unsigned long long other = __shfl_xor_sync(ALL, mine, o);
    mine = other < mine ? other : mine;
  }
  if (lane == 0) atomicMin(&best, mine);
  __syncthreads();

  const int choice = (int)(best & ALL);
  if (t == 0) {
    *p.choice = choice;
    if (p.handle) cudaGraphSetConditional(p.handle, choice);
    if (p.ring) { entry = *p.counter; *p.counter = entry + 1; }
  }
  if (p.num_nodes) {
    const int before = *p.last;
    __syncthreads();
    if (t == 0) *p.last = choice;
    if (before != choice)
      for (int i = t; i < p.num_nodes; i += THREADS) {
        const int body = p.body_of[i];
        if (before < 0 || body == before || body == choice)
          cudaGraphKernelNodeSetEnabled((cudaGraphDeviceNode_t)p.nodes[i], body == choice);
      }
  }
  if (p.ring) {
    __syncthreads();
    int* at = p.ring + entry % p.slots * (2 + p.num_experts);
    if (t == 0) { at[0] = valid / p.top_k; at[1] = choice; }
    for (int e = t; e < p.num_experts; e += THREADS) at[2 + e] = hist[e];
  }
}
