// out = act(W x + b) for a V:n:m weight (Castro et al. 2023, VENOM): V rows share 4 of every m
// columns, and each row keeps at most 2 of those 4, so that 2:4 tensor-core instructions apply.
//
// x lies feature-major ([cols, tokens], tokens side by side). A block of threads brings a dense
// tile of x into shared memory and every warp gathers its own columns from there: a row of the tile
// is a column of W, and ldmatrix takes the address of each row apart. So all V-blocks of a tile
// share one read of x, and the gather costs no instruction.
//
// A step is 32 kept columns: 8 groups of m. The weight is packed by format.py in the order in which
// lanes hold it:
//   values   [rows / 16][steps][32 lanes][4 x 32 bits]
//   meta     [rows / 16][steps][8 quads][2 halves of the step] 32 bits: row q, row q + 8 above it
//   columns  [rows / V][steps][32] 16 bits: the row of the tile, in 0 .. 8 m - 1
//
// Set by the compiler's options: BFLOAT16, GROUP (m), SHARE (V), WARP_ROWS (what divides V: 16, 32
// or 64), WARP_TOKENS, WARPS_DOWN, WARPS_ACROSS, STAGES, BIAS (0 none, 1 as x, 2 float), ACT,
// FEATURE_MAJOR (of out).

constexpr int BLOCK_ROWS = WARP_ROWS * WARPS_DOWN;
constexpr int BLOCK_TOKENS = WARP_TOKENS * WARPS_ACROSS;
constexpr int THREADS = 32 * WARPS_DOWN * WARPS_ACROSS;
constexpr int UP = WARP_ROWS / 16;       // row tiles of a warp
constexpr int ACROSS = WARP_TOKENS / 8;  // token tiles of a warp
constexpr int TILE_COLS = 8 * GROUP;     // columns of W in a step
constexpr int ROW_BYTES = 2 * BLOCK_TOKENS;
constexpr int TURNS = BLOCK_TOKENS < 64 ? BLOCK_TOKENS / 8 : 8;  // places a piece may take

constexpr int PIECES = BLOCK_TOKENS / 8;    // of 16 bytes, in a row of the tile
constexpr int AT_ONCE = THREADS / PIECES;  // rows of the tile that all threads copy at once
constexpr int VALUE_TURNS = (BLOCK_ROWS * 2 + THREADS - 1) / THREADS;
static_assert(THREADS % PIECES == 0, "a thread must copy the same piece of every row");

// A stage of shared memory.
constexpr int VALUES = TILE_COLS * ROW_BYTES;
constexpr int META = VALUES + BLOCK_ROWS / 16 * 512;
constexpr int COLUMNS = META + BLOCK_ROWS / 16 * 64;
constexpr int STAGE = COLUMNS + (WARPS_DOWN * 64 + 127) / 128 * 128;

// The output of a warp on its way out: lines of tokens or of rows, in pieces of 16 bytes.
constexpr int LINES = FEATURE_MAJOR ? WARP_ROWS : WARP_TOKENS;
constexpr int LINE_PIECES = (FEATURE_MAJOR ? WARP_TOKENS : WARP_ROWS) / 8;

struct LaunchArguments {
  const u16* x;
  const u8* packed;
  const void* bias;
  u16* out;
  i64 x_stride, out_stride;  // elements from one column (of W) of x to the next; of a line of out
  i64 meta, columns;         // where they begin in packed
  int rows, cols, tokens, steps;
};

DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Pieces of 16 bytes are turned by their row, so that 8 rows of one token tile lie in all banks
// (as far as the gathered columns differ modulo 8).
DEVICE u32 piece_at(int row, int piece) {
  return row * ROW_BYTES + ((piece ^ (row & (TURNS - 1))) << 4);
}

// What one thread copies for every step: where it begins, and where in a stage it goes.
struct Source {
  const u16* x;
  const u8 *values[VALUE_TURNS], *meta, *columns;
  int x_bytes, first_col;
  u32 to;
};

DEVICE Source source_of(const LaunchArguments& p, int first_row, int first_token) {
  Source found;
  const u32 thread = threadIdx.x, piece = thread % PIECES, row = thread / PIECES;
  const int token = first_token + 8 * piece, last = p.rows - 16;
  found.x_bytes = token < p.tokens ? 2 * smaller(8, p.tokens - token) : 0;
  found.first_col = row;
  found.x = p.x + (found.x_bytes ? row * p.x_stride + token : 0);
  found.to = piece_at(row, piece);
#pragma unroll
  for (int turn = 0; turn < VALUE_TURNS; ++turn) {
    const u32 at = thread + turn * THREADS;
    const i64 tile = smaller(first_row + at / 32 * 16, last) / 16;  // again, where there is none
    found.values[turn] = p.packed + (tile * p.steps * 32 + at % 32) * 16;
  }
  const i64 tile = smaller(first_row + thread / 4 * 16, last) / 16;
  found.meta = p.packed + p.meta + (tile * p.steps * 4 + thread % 4) * 16;
  const i64 block = smaller(first_row + thread / 4 * WARP_ROWS, last) / SHARE;
  found.columns = p.packed + p.columns + (block * p.steps * 4 + thread % 4) * 16;
  return found;
}

// Start copying what one step needs.
DEVICE void bring(const LaunchArguments& p, const Source& from, u32 stage, int step) {
  const u32 thread = threadIdx.x;
  const i64 skipped = (i64)step * TILE_COLS;
#pragma unroll
  for (int row = 0; row < TILE_COLS; row += AT_ONCE) {
    const int mine = from.first_col + row;
    if (TILE_COLS % AT_ONCE && mine >= TILE_COLS) break;
    const bool there = skipped + mine < p.cols;
    // A turn of 8 rows or more leaves the place of the piece as it is.
    const u32 to = AT_ONCE % 8 ? piece_at(mine, thread % PIECES) : from.to + row * ROW_BYTES;
    copy_async(stage + to, there ? from.x + (skipped + row) * p.x_stride : p.x,
               there ? from.x_bytes : 0);
  }
#pragma unroll
  for (int turn = 0; turn < VALUE_TURNS; ++turn) {
    const u32 at = thread + turn * THREADS;
    if (at < BLOCK_ROWS * 2) copy_async(stage + VALUES + 16 * at, from.values[turn] + step * 512, 16);
  }
  if (thread < BLOCK_ROWS / 4) copy_async(stage + META + 16 * thread, from.meta + step * 64, 16);
  if (thread < WARPS_DOWN * 4)
    copy_async(stage + COLUMNS + 16 * thread, from.columns + step * 64, 16);
  copy_commit();
}

// sums += one step, for the warp's rows and tokens.
DEVICE void multiply(float (&sums)[UP][ACROSS][4], const u8* stage, int down, int across) {
  const int lane = lane_id();
  u32 a[UP][4], meta[UP];
#pragma unroll
  for (int up = 0; up < UP; ++up) {
    const int tile = down * UP + up;
    const uint4 held = *(const uint4*)(stage + VALUES + tile * 512 + lane * 16);
    a[up][0] = held.x, a[up][1] = held.y, a[up][2] = held.z, a[up][3] = held.w;
    meta[up] = *(const u32*)(stage + META + tile * 64 + lane / 4 * 8 + lane % 2 * 4);
  }
  const int row = *(const u16*)(stage + COLUMNS + down * 64 + lane * 2);
  const u32 base = shared_at(stage);
#pragma unroll
  for (int n = 0; n < ACROSS; ++n) {
    u32 b[4];
    load_transposed(b, base + piece_at(row, across * ACROSS + n));
#pragma unroll
    for (int up = 0; up < UP; ++up) multiply_sparse(sums[up][n], a[up], b, meta[up]);
  }
}

DEVICE float bias_of(const void* bias, int row) {
#if BIAS == 1
  return widened(((const u16*)bias)[row]);
#elif BIAS == 2
  return ((const float*)bias)[row];
#else
  return 0.0f;
#endif
}

// Where a piece of a line is in the warp's own part of shared memory.
DEVICE int line_at(int line, int piece) {
  return (line * LINE_PIECES + (piece ^ (line % smaller(8, LINE_PIECES)))) * 16;
}

// Bias, activation and rounding, into shared memory in the order of the output.
DEVICE void stage_out(const LaunchArguments& p, float (&sums)[UP][ACROSS][4], u8* own, int first_row) {
  const int lane = lane_id(), quad = lane / 4, pair = lane % 4;
#pragma unroll
  for (int up = 0; up < UP; ++up) {
    float bias[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * up + 8 * half + quad;
      bias[half] = row < p.rows ? bias_of(p.bias, row) : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < ACROSS; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 both = rounded(activated(sums[up][n][2 * half] + bias[half]),
                                 activated(sums[up][n][2 * half + 1] + bias[half]));
        const int eight = 2 * up + half;  // which 8 rows of the warp
        if (FEATURE_MAJOR)
          *(u32*)(own + line_at(8 * eight + quad, n) + 4 * pair) = both;
        else
          *(u32*)(own + line_at(8 * n + quad, eight) + 4 * pair) = transposed(both);
      }
  }
}

// From shared memory to the output, 16 bytes at a time.
DEVICE void write_out(const LaunchArguments& p, const u8* own, int first_row, int first_token) {
  for (int i = lane_id(); i < LINES * LINE_PIECES; i += 32) {
    const int line = i / LINE_PIECES, piece = i % LINE_PIECES;
    const int row = first_row + (FEATURE_MAJOR ? line : 8 * piece);
    const int token = first_token + (FEATURE_MAJOR ? 8 * piece : line);
    if (row >= p.rows || token >= p.tokens) continue;
    const uint4 held = *(const uint4*)(own + line_at(line, piece));
    if (FEATURE_MAJOR) {  // its lines are padded to whole pieces
      *(uint4*)(p.out + row * p.out_stride + token) = held;
    } else {
      *(uint4*)(p.out + token * p.out_stride + row) = held;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) vnm_linear(LaunchArguments p) {
  const int warp = threadIdx.x / 32, down = warp % WARPS_DOWN, across = warp / WARPS_DOWN;
  const int first_row = blockIdx.x * BLOCK_ROWS, first_token = blockIdx.y * BLOCK_TOKENS;
  const u32 base = shared_at(shared_bytes);
  const Source source = source_of(p, first_row, first_token);
  float sums[UP][ACROSS][4] = {};
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < p.steps)
      bring(p, source, base + step * STAGE, step);
    else
      copy_commit();
  }
  int slot = 0;
  for (int step = 0; step < p.steps; ++step) {
    copy_wait<STAGES - 2>();
    __syncthreads();  // this step is there for all, and nobody reads the stage before it any more
    const int next = step + STAGES - 1;
    if (next < p.steps)
      bring(p, source, base + (slot ? slot - 1 : STAGES - 1) * STAGE, next);
    else
      copy_commit();
    multiply(sums, shared_bytes + slot * STAGE, down, across);
    slot = slot + 1 < STAGES ? slot + 1 : 0;
  }
  copy_wait<0>();
  __syncthreads();
  u8* own = shared_bytes + warp * (LINES * LINE_PIECES * 16);
  const int row = first_row + down * WARP_ROWS, token = first_token + across * WARP_TOKENS;
  stage_out(p, sums, own, row);
  __syncwarp();
  write_out(p, own, row, token);
}

// [tokens, cols] (lines x_stride apart) -> [cols, tokens] (lines out_stride apart, in whole pieces).
extern "C" __global__ void __launch_bounds__(256) to_feature_major(LaunchArguments p) {
  u16(*tile)[66] = (u16(*)[66])shared_bytes;
  const int first_col = blockIdx.x * 64, first_token = blockIdx.y * 64;
  for (int i = threadIdx.x; i < 64 * 64; i += 256) {
    const int token = i / 64, col = i % 64;
    const bool there = first_token + token < p.tokens && first_col + col < p.cols;
    tile[token][col] = there ? p.x[(first_token + token) * p.x_stride + first_col + col] : (u16)0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * 32; i += 256) {
    const int col = i / 32, token = i % 32 * 2;
    if (first_col + col >= p.cols || first_token + token >= p.tokens) continue;
    const u32 both = tile[token][col] | (u32)tile[token + 1][col] << 16;
    *(u32*)(p.out + (first_col + col) * p.out_stride + first_token + token) = both;
  }
}
