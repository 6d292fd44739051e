// Chooses a candidate for a batch: top-k ids -> expert histogram -> cost of every candidate (see table.py) -> the
// cheapest, of equal ones the first; and acts on the graph that it runs in. One CTA.
//
//   threads      ids, int32 or int64          -> hist[] by atomics in shared memory; ids as the kernels take them
//   a warp       one token block              -> tiles[]; one more counts active experts and routed ids
//   a thread     one part                     -> part_us[]
//   a thread     one candidate                -> us[], the least of them; those near it are listed
//   a warp       one candidate of the list    -> corrected by its set of points, a lane every 32nd of them
//   threads      a node of the graph each     -> on if its body is chosen, else off

constexpr int EXPERTS = 1024, BLOCKS = 64, PARTS = 1024, CANDIDATES = 512, NODES = 128, TERMS = 6;
constexpr unsigned ALL = 0xffffffffu;

struct Params {
  // the batch
  const void* ids;            // [num_ids] int32, or int64 if wide
  const int* num_valid;       // [1]: tokens from there on are padding; or null
  // out
  int* choice;                // [1]
  int* histogram;             // [num_experts]
  int* kernel_ids;            // [num_ids]: int32, -1 for what is not in range or padding; or null
  float* cost;                // [num_candidates], infinite where not near; or null
  int* last;                  // [1]: the choice that the nodes are set to, -1 at first; or null
  int* ring;                  // [slots, 2 + num_experts]: tokens, choice, histogram; or null
  long long* counter;         // [1]: entries written to the ring so far
  // the table
  const int *blocks, *grid_block;
  const float *grid_ctas, *grid_slots, *grid_work, *coefficients, *floor_us;
  const int *first, *parts;
  const float *points, *mean, *unit;
  const int *set_block, *set_of;
  const float* weights;
  // the graph
  unsigned long long handle;  // of a conditional node, or 0
  unsigned long long nodes[NODES];
  int num_ids, top_k, wide, num_experts, slots;
  int num_blocks, num_parts, num_grids, num_candidates, num_rows, num_nodes;
  float near;
  unsigned char body_of[NODES];
};

__device__ __forceinline__ int expert_of(const Params& p, int i, int num_ids) {
  if (i >= num_ids) return -1;
  if (p.wide) {
    long long e = ((const long long*)p.ids)[i];
    return e >= 0 && e < p.num_experts ? (int)e : -1;
  }
  int e = ((const int*)p.ids)[i];
  return e >= 0 && e < p.num_experts ? e : -1;
}

__device__ __forceinline__ int sum(int v) {
  return __reduce_add_sync(ALL, v);
}

extern "C" __global__ void __launch_bounds__(1024) select_candidate(const __grid_constant__ Params p) {
  __shared__ int hist[EXPERTS], tiles[BLOCKS], active, routed, listed, winner_at;
  __shared__ float part_us[PARTS], us[CANDIDATES];
  __shared__ short list[CANDIDATES];
  __shared__ unsigned least;
  __shared__ unsigned long long best;
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, warps = blockDim.x / 32;

  for (int e = t; e < p.num_experts; e += blockDim.x) hist[e] = 0;
  if (t == 0) { least = ALL; best = ~0ull; listed = 0; }
  const int valid = p.num_valid ? min(max(*p.num_valid, 0) * p.top_k, p.num_ids) : p.num_ids;
  __syncthreads();
  for (int i = t; i < p.num_ids; i += blockDim.x) {
    int e = expert_of(p, i, valid);
    if (e >= 0) atomicAdd(&hist[e], 1);
    if (p.kernel_ids) p.kernel_ids[i] = e;
  }
  __syncthreads();

  for (int e = t; e < p.num_experts; e += blockDim.x) p.histogram[e] = hist[e];
  for (int b = warp; b <= p.num_blocks; b += warps) {
    int a = 0, n = 0;
    if (b < p.num_blocks) {
      const int block = p.blocks[b];
      for (int e = lane; e < p.num_experts; e += 32) a += (hist[e] + block - 1) / block;
    } else {
      for (int e = lane; e < p.num_experts; e += 32) { a += hist[e] > 0; n += hist[e]; }
    }
    a = sum(a); n = sum(n);
    if (lane == 0) {
      if (b < p.num_blocks) tiles[b] = a;
      else { active = a; routed = n; }
    }
  }
  __syncthreads();

  for (int i = t; i < p.num_parts; i += blockDim.x) {
    float waves = 0, whole_waves = 0, ctas = 0;
    for (int g = 0; g < p.num_grids; g++) {
      const int at = g * p.num_parts + i;
      const float n = tiles[p.grid_block[at]] * p.grid_ctas[at], w = p.grid_work[at], filled = n / p.grid_slots[at];
      waves += w * filled; whole_waves += w * ceilf(filled); ctas += w * n;
    }
    const float term[TERMS] = {1, waves, whole_waves, ctas, log1pf(ctas), (float)active};
    float v = 0;
    for (int k = 0; k < TERMS; k++) v += p.coefficients[k * p.num_parts + i] * term[k];
    part_us[i] = fmaxf(v, p.floor_us[i]);
  }
  __syncthreads();

  unsigned mine = ALL;
  for (int c = t; c < p.num_candidates; c += blockDim.x) {
    float v = 0;
    for (int i = p.first[c]; i < p.first[c + 1]; i++) v += part_us[p.parts[i]];
    us[c] = v;
    mine = min(mine, __float_as_uint(v));  // of numbers that are not negative, in their order
  }
  mine = __reduce_min_sync(ALL, mine);
  if (lane == 0) atomicMin(&least, mine);
  __syncthreads();

  const float far = p.near * __uint_as_float(least);
  for (int c = t; c < p.num_candidates; c += blockDim.x) {
    if (us[c] <= far) list[atomicAdd(&listed, 1)] = c;
    if (p.cost) p.cost[c] = __int_as_float(0x7f800000);
  }
  __syncthreads();

  const float log_routed = logf(max(routed, 1)), log_active = logf(max(active, 1));
  for (int i = warp; i < listed; i += warps) {
    const int c = list[i], q = p.set_of[c];
    float v = us[c];
    if (q >= 0) {
      const float* mean = p.mean + 3 * q; const float* unit = p.unit + 3 * q;
      const float z0 = (log_routed - mean[0]) * unit[0], z1 = (log_active - mean[1]) * unit[1];
      const float z2 = (logf(max(tiles[p.set_block[q]], 1)) - mean[2]) * unit[2];
      const float* at = p.points + 3 * q * p.num_rows; const float* weight = p.weights + c * p.num_rows;
      float log_factor = 0;
      for (int r = lane; r < p.num_rows; r += 32) {
        const float d0 = z0 - at[r], d1 = z1 - at[p.num_rows + r], d2 = z2 - at[2 * p.num_rows + r];
        log_factor += weight[r] * expf(-sqrtf(d0 * d0 + d1 * d1 + d2 * d2));
      }
      for (int o = 16; o; o /= 2) log_factor += __shfl_xor_sync(ALL, log_factor, o);
      v *= expf(log_factor);
    }
    if (lane == 0) {
      if (p.cost) p.cost[c] = v;
      atomicMin(&best, (unsigned long long)__float_as_uint(v) << 32 | c);
    }
  }
  __syncthreads();

  const int choice = (int)(best & ALL);
  if (t == 0) {
    *p.choice = choice;
    if (p.handle) cudaGraphSetConditional(p.handle, choice);
    if (p.ring) {
      const long long entry = *p.counter;
      *p.counter = entry + 1;
      winner_at = (int)(entry % p.slots);
    }
  }
  if (p.num_nodes) {
    const int before = *p.last;
    __syncthreads();
    if (t == 0) *p.last = choice;
    if (before != choice)
      for (int i = t; i < p.num_nodes; i += blockDim.x) {
        const int body = p.body_of[i];
        if (before < 0 || body == before || body == choice)
          cudaGraphKernelNodeSetEnabled((cudaGraphDeviceNode_t)p.nodes[i], body == choice);
      }
  }
  if (p.ring) {
    __syncthreads();
    int* entry = p.ring + (long long)winner_at * (2 + p.num_experts);
    if (t == 0) { entry[0] = valid / p.top_k; entry[1] = choice; }
    for (int e = t; e < p.num_experts; e += blockDim.x) entry[2 + e] = hist[e];
  }
}
