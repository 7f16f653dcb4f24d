// out[tokens, rows] = act(x[tokens, cols] W^T + b) by wgmma on Hopper (sm_90a).
//
// Of every STAGE_COLS columns of W, 128 rows (or each 64 of them) keep KEPT chunks of 16 columns, or
// of 32 with 2:4 within (SPARSE). A stage of the pipeline is all STAGE_COLS columns of x, brought in
// by the tensor copy engine, swizzled; a chunk that is kept is chosen by the start address in the
// descriptor of the second operand, so that skipping a chunk costs nothing.
//
// The packed weight (format.py) is one unit for 128 rows and a stage:
//   values   [2 blocks of 64 rows][KEPT] x 2048 bytes: [k half][64 rows][16 bytes], unswizzled
//   meta     SPARSE only, KEPT x 512 bytes: words as quads of threads hold them
//   chunks   [KEPT][2 blocks] u32: the number of the chunk in the stage; 128 bytes
// PICKED, for the gradient of x: of a unit's two blocks of 64 rows a stage holds one at most, whole,
// so that the values are [KEPT] x 2048 bytes, all columns of the stage, and the first word behind them
// says which block it is; 2 for none.
// Rows of a unit are permuted, so that a thread's sums are neighbours in the output: 4 of them where
// both blocks keep the same chunks (MIXED), else 2 and 2.
//
// One warpgroup copies, WARPGROUPS multiply, 128 rows each by TOKENS tokens. A block of threads takes
// one tile after another. SLICES > 0: outputs leave through shared memory, in so many slices, while
// the next tile begins. With splits > 1 the columns are cut, and sums go to `parts` in float32, which
// reduce_parts adds.
//
// Set by the compiler's options: BFLOAT16, SPARSE, TOKENS, WARPGROUPS, STAGE_COLS, KEPT, STAGES,
// SLICES, MIXED, PICKED, ACT. Product<TOKENS>::run<selector> is written by build.py.

struct LaunchArguments {
  TensorMap x, out_map;
  const u8* packed;
  u16* out;
  const void* bias;
  float* parts;
  int tokens, rows, stages, units;
  int row_tiles, token_tiles, group, splits;
  int bias_is_float, sums;
};

constexpr int CHUNK_BYTES = SPARSE ? 64 : 32;  // of one token of x
constexpr int X_BYTES = TOKENS * STAGE_COLS * 2;
constexpr int VALUE_BYTES = (PICKED ? 1 : 2) * KEPT * 2048;
constexpr int META_BYTES = SPARSE ? KEPT * 512 : 0;
constexpr int UNIT = VALUE_BYTES + META_BYTES + 128;
constexpr int SLICE_TOKENS = SLICES ? TOKENS / SLICES : 0;
constexpr int OUT_BYTES = WARPGROUPS * 2 * SLICE_TOKENS * 128;
constexpr int WORDS = SPARSE ? (KEPT + 1) / 2 : 1;  // of metadata, for each block of 64 rows
static_assert(KEPT <= 4 && (KEPT == 1 || !SPARSE || KEPT % 2 == 0), "");
static_assert(!PICKED || (!SPARSE && !MIXED && KEPT == STAGE_COLS / 16), "");
static_assert(X_BYTES % 1024 == 0 && TOKENS % 32 == 0, "");

// Unswizzled: 128 bytes from 8 rows to the next, 1024 from one half of k to the other.
#define VALUES_DESCRIPTOR ((64ull << 16) | (8ull << 32))
// Swizzled by 128 bytes: 1024 bytes from 8 tokens to the next.
#define X_DESCRIPTOR ((1ull << 16) | (64ull << 32) | (1ull << 62))

DEVICE u32 descriptor_address(u32 address) { return (address & 0x3FFFF) >> 4; }

struct Place {
  int row_tile, token_tile, split;
};

// The place of the index-th piece of work: neighbours share W or x, which the L2 cache then holds.
DEVICE Place place_of(const LaunchArguments& p, int index) {
  const int tile = p.splits == 1 ? index : index / p.splits, column = p.group * p.token_tiles;
  const int group = tile / column, within = tile - group * column;
  const int width = smaller(p.group, p.row_tiles - group * p.group);
  Place place;
  place.token_tile = within / width;
  place.row_tile = group * p.group + within - place.token_tile * width;
  place.split = index - tile * p.splits;
  return place;
}

DEVICE int first_stage(const LaunchArguments& p, int split) {
  return p.splits == 1 ? split * p.stages : p.stages * split / p.splits;
}

DEVICE float bias_of(const LaunchArguments& p, int row) {
  if (!p.bias || row >= p.rows) return 0.0f;
  return p.bias_is_float ? ((const float*)p.bias)[row] : widened(((const u16*)p.bias)[row]);
}

DEVICE void copy_in(const LaunchArguments& p, u32 xs, u32 ws, u32 barriers, int pieces) {
  int slot = 0;
  u32 parity = 1;
  wait_for_previous();  // others read or write only after products of what is copied from here on
  for (int index = blockIdx.x; index < pieces; index += gridDim.x) {
    const Place place = place_of(p, index);
    const int begin = first_stage(p, place.split), end = first_stage(p, place.split + 1);
    for (int stage = begin; stage < end; ++stage) {
      const u32 full = barriers + 16 * slot;
      barrier_wait(full + 8, parity);
      barrier_expect(full, X_BYTES + WARPGROUPS * UNIT);
#pragma unroll
      for (int box = 0; box < STAGE_COLS / 64; ++box)
        copy_box(xs + slot * X_BYTES + box * (TOKENS * 128), &p.x, stage * STAGE_COLS + box * 64,
                 place.token_tile * TOKENS, full);
#pragma unroll
      for (int group = 0; group < WARPGROUPS; ++group) {
        const int unit = smaller(place.row_tile * WARPGROUPS + group, p.units - 1);
        copy_bytes(ws + (slot * WARPGROUPS + group) * UNIT,
                   p.packed + ((long long)unit * p.stages + stage) * UNIT, UNIT, full);
      }
      if (++slot == STAGES) slot = 0, parity ^= 1;
    }
  }
}

// The rows of a thread's sums in its unit, and how many of them are neighbours.
DEVICE int row_of(int warp, int quad, int block) {
  return MIXED ? 32 * warp + 4 * quad + 2 * block : 64 * block + 16 * warp + 2 * quad;
}

typedef float Sums[2][TOKENS / 2];

// Sums of a tile to `parts`, as they are.
DEVICE void write_sums(const LaunchArguments& p, Sums& sums, int first_row, int first_token, int split) {
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, quad = lane >> 2;
  const int token = first_token + 2 * (lane & 3), left = p.tokens - token;
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    const int row = first_row + row_of(warp, quad, block);
    if (row >= p.rows) continue;
    float* to = p.parts + ((long long)split * p.tokens + token) * p.rows + row;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
      for (int t = 0; t < 2; ++t)
        if (8 * j + t < left)
          *(float2*)(to + (long long)(8 * j + t) * p.rows) =
              make_float2(sums[block][4 * j + t], sums[block][4 * j + 2 + t]);
  }
}

DEVICE void read_bias(const LaunchArguments& p, float (&bias)[2][2], int first_row) {
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, quad = lane >> 2;
#pragma unroll
  for (int block = 0; block < 2; ++block)
#pragma unroll
    for (int h = 0; h < 2; ++h) bias[block][h] = bias_of(p, first_row + row_of(warp, quad, block) + h);
}

DEVICE u32 finished(const Sums& sums, const float (&bias)[2][2], int block, int j, int t) {
  return rounded(activated(sums[block][4 * j + t] + bias[block][0]),
                 activated(sums[block][4 * j + 2 + t] + bias[block][1]));
}

// A tile straight to the output.
DEVICE void write_out(const LaunchArguments& p, Sums& sums, int first_row, int first_token) {
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, quad = lane >> 2;
  const int token = first_token + 2 * (lane & 3), left = p.tokens - token;
  float bias[2][2];
  read_bias(p, bias, first_row);
  u16* to[2];
  bool inside[2];
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    const int row = first_row + row_of(warp, quad, block);
    inside[block] = row < p.rows;
    to[block] = p.out + (long long)token * p.rows + row;
  }
#pragma unroll
  for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if (8 * j + t >= left) continue;
      const long long off = (long long)(8 * j + t) * p.rows;
      const u32 low = finished(sums, bias, 0, j, t), high = finished(sums, bias, 1, j, t);
#if MIXED
      if (inside[0]) *(uint2*)(to[0] + off) = make_uint2(low, high);
#else
      if (inside[0]) *(u32*)(to[0] + off) = low;
      if (inside[1]) *(u32*)(to[1] + off) = high;
#endif
    }
}

// A tile through shared memory: [2 x 64 rows][SLICE_TOKENS][128 bytes], swizzled, a store for each.
DEVICE void send_out(const LaunchArguments& p, Sums& sums, u32 own, int first_row, int first_token) {
#if SLICES
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, quad = lane >> 2;
  const int pair = 2 * (lane & 3), barrier = threadIdx.x >> 7;
  const bool leads = (threadIdx.x & 127) == 0;
  float bias[2][2];
  read_bias(p, bias, first_row);
  u32 to[2][2];  // by block and token
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    const int byte = 2 * row_of(warp, quad, block);
    const u32 half = own + (byte >> 7) * (SLICE_TOKENS * 128), piece = (byte & 127) >> 4;
#pragma unroll
    for (int t = 0; t < 2; ++t)
      to[block][t] = half + (pair + t) * 128 + ((piece ^ (pair + t)) << 4) + (byte & 15);
  }
#pragma unroll
  for (int slice = 0; slice < SLICES; ++slice) {
    if (leads) store_wait_read();
    group_sync(barrier);
#pragma unroll
    for (int jj = 0; jj < SLICE_TOKENS / 8; ++jj)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int j = slice * (SLICE_TOKENS / 8) + jj;
        const u32 low = finished(sums, bias, 0, j, t), high = finished(sums, bias, 1, j, t);
#if MIXED
        store_pair(to[0][t] + jj * 1024, low, high);
#else
        store_word(to[0][t] + jj * 1024, low);
        store_word(to[1][t] + jj * 1024, high);
#endif
      }
    fence_for_copies();
    group_sync(barrier);
    if (leads) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + 64 * half, token = first_token + slice * SLICE_TOKENS;
        if (row < p.rows && token < p.tokens)
          store_box(&p.out_map, own + half * (SLICE_TOKENS * 128), row, token);
      }
      store_commit();
    }
  }
#endif
}

// wgmma.sp reads its metadata register after it was issued, which the compiler does not know: two
// sets of registers take turns, and each has this use after the wait for its products. No metadata
// is all ones, so it is always true.
DEVICE bool is_used(const u32 (&meta)[WORDS][2]) {
  u32 all = meta[0][0];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) all &= meta[i][0] & meta[i][1];
  return all != 0xffffffffu;
}

#if PICKED
DEVICE void multiply_whole(float (&sums)[TOKENS / 2], u64 values, u64 x) {
#pragma unroll
  for (int s = 0; s < KEPT; ++s) Product<TOKENS>::run<0>(sums, values + s * 128, x + s * 2, 0, 1);
}

// The products of one stage, issued: of the block that it holds, by all its columns.
DEVICE void multiply(Sums& sums, u32 (&meta)[WORDS][2], u32 unit, u64 values, u64 x, int adds) {
  const u32 picked = __shfl_sync(0xffffffffu, load_word(unit + VALUE_BYTES), 0);
  product_fence();
  // Committed in each branch: behind them, the compiler would commit twice, and wait for this stage.
  if (picked == 0) {
    multiply_whole(sums[0], values, x);
    product_commit();
  } else if (picked == 1) {
    multiply_whole(sums[1], values, x);
    product_commit();
  } else {
    product_commit();
  }
}
#else
// The products of one stage, issued.
DEVICE void multiply(Sums& sums, u32 (&meta)[WORDS][2], u32 unit, u64 values, u64 x, int adds) {
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  u32 offset[KEPT][2];
#pragma unroll
  for (int s = 0; s < KEPT; ++s)
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const u32 at = unit + VALUE_BYTES + META_BYTES + 8 * s + 4 * block;
      const u32 chunk = __shfl_sync(0xffffffffu, load_word(at), 0);
      const u32 box = STAGE_COLS == 64 ? 0 : chunk / (128 / CHUNK_BYTES);
      const u32 within = STAGE_COLS == 64 ? chunk : chunk % (128 / CHUNK_BYTES);
      offset[s][block] = box * (TOKENS * 8) + within * (CHUNK_BYTES / 16);
    }
#if SPARSE
  const u32 own = KEPT == 1 ? (warp * 16 + (lane >> 2) * 2 + (lane & 1)) * 8 : (warp * 32 + lane) * 8;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    const uint2 pair = load_pair(unit + VALUE_BYTES + own + i * 1024);
    meta[i][0] = pair.x, meta[i][1] = pair.y;
  }
#endif
  product_fence();
#pragma unroll
  for (int s = 0; s < KEPT; s += 2) {
#pragma unroll
    for (int block = 0; block < 2; ++block)
      Product<TOKENS>::run<0>(sums[block], values + (block * KEPT + s) * 128, x + offset[s][block],
                              meta[SPARSE ? s / 2 : 0][block], s ? 1 : adds);
    if (s + 1 < KEPT) {
#pragma unroll
      for (int block = 0; block < 2; ++block)
        Product<TOKENS>::run<1>(sums[block], values + (block * KEPT + s + 1) * 128,
                                x + offset[s + 1 < KEPT ? s + 1 : s][block],
                                meta[SPARSE ? s / 2 : 0][block], 1);
    }
  }
  product_commit();
}
#endif

DEVICE void multiply_tiles(const LaunchArguments& p, u32 xs, u32 ws, u32 outs, u32 barriers, int pieces) {
  const int group = (threadIdx.x >> 7) - 1, lane = threadIdx.x & 31;
  const u64 values = VALUES_DESCRIPTOR + descriptor_address(ws + group * UNIT);
  const u64 x = X_DESCRIPTOR + descriptor_address(xs);
  int slot = 0, before = 0;
  u32 parity = 0;
  u32 even[WORDS][2] = {}, odd[WORDS][2] = {};
  Sums sums;
  auto step = [&](u32 (&meta)[WORDS][2], int adds) {
    barrier_wait(barriers + 16 * slot, parity);
    multiply(sums, meta, ws + (slot * WARPGROUPS + group) * UNIT,
             values + (u32)(slot * (WARPGROUPS * UNIT >> 4)), x + (u32)(slot * (X_BYTES >> 4)), adds);
  };
  auto release = [&](int which) {
    if (lane == 0) barrier_arrive(barriers + 16 * which + 8);
  };
  auto advance = [&]() {
    before = slot;
    if (++slot == STAGES) slot = 0, parity ^= 1;
  };
  Place next = place_of(p, blockIdx.x);
  for (int index = blockIdx.x; index < pieces; index += gridDim.x) {
    const Place place = next;
    const int count = first_stage(p, place.split + 1) - first_stage(p, place.split);
#if PICKED
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) sums[0][i] = sums[1][i] = 0.0f;
#endif
#if SPARSE
#pragma unroll 1
    for (int k = 0; k < count; k += 2) {
      step(even, k);
      if (k == 0) next = place_of(p, smaller(index + gridDim.x, pieces - 1));  // while it multiplies
      product_wait<1>();
      if (k && is_used(odd)) release(before);
      advance();
      if (k + 1 < count) {
        step(odd, 1);
        product_wait<1>();
        if (is_used(even)) release(before);
        advance();
      }
    }
#else
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      step(even, k);
      if (k == 0) next = place_of(p, smaller(index + gridDim.x, pieces - 1));
      product_wait<1>();
      if (k) release(before);
      advance();
    }
#endif
    product_wait<0>();
    release(before);
    const int row = (place.row_tile * WARPGROUPS + group) * 128, token = place.token_tile * TOKENS;
    if (p.sums)
      write_sums(p, sums, row, token, place.split);
    else if (SLICES)
      send_out(p, sums, outs + group * (2 * SLICE_TOKENS * 128), row, token);
    else
      write_out(p, sums, row, token);
  }
  if (SLICES && (threadIdx.x & 127) == 0) store_wait();
}

extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)
    wgmma_linear(const __grid_constant__ LaunchArguments p) {
  extern __shared__ u8 shared_bytes[];
  const u32 base = (shared_at(shared_bytes) + 1023u) & ~1023u;
  const u32 xs = base, outs = xs + STAGES * X_BYTES, ws = outs + OUT_BYTES;
  const u32 barriers = ws + STAGES * WARPGROUPS * UNIT;
  const int group = __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(barriers + 16 * i, 1);                   // full
      barrier_init(barriers + 16 * i + 8, WARPGROUPS * 4);  // empty: every warp arrives
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_for_copies();
  }
  __syncthreads();
  let_next_begin();
  const int pieces = p.row_tiles * p.token_tiles * p.splits;
  if (group == 0) {
    if (WARPGROUPS > 1) fewer_registers<WARPGROUPS == 3 ? 32 : 24>();
    if (threadIdx.x == 0) copy_in(p, xs, ws, barriers, pieces);
  } else {
    if (WARPGROUPS > 1) more_registers<WARPGROUPS == 3 ? 160 : 240>();
    multiply_tiles(p, xs, ws, outs, barriers, pieces);
  }
}

// out = act(parts summed + b), 4 rows of a token for each thread.
extern "C" __global__ void __launch_bounds__(256) reduce_parts(const __grid_constant__ LaunchArguments p) {
  const long long all = (long long)p.tokens * p.rows;
  const long long at = ((long long)blockIdx.x * 256 + threadIdx.x) * 4;
  let_next_begin();
  wait_for_previous();
  if (at >= all) return;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int split = 0; split < p.splits; ++split) {
    const float4 part = *(const float4*)(p.parts + split * all + at);
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  const int row = (int)(at % p.rows);
  const u32 low = rounded(activated(sum.x + bias_of(p, row)), activated(sum.y + bias_of(p, row + 1)));
  const u32 high =
      rounded(activated(sum.z + bias_of(p, row + 2)), activated(sum.w + bias_of(p, row + 3)));
  *(uint2*)(p.out + at) = make_uint2(low, high);
}
